"""The paper's experiments in small: their runs, which are kept and done once, their search and their tables."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from nca_kernels import cli
from nca_kernels.experiments import reproduce, runs
from nca_kernels.experiments.reports import DPO, REPORTS
from nca_kernels.experiments.reproduce import QUICK, Scale
from nca_kernels.experiments.search import RANGES, TUNING_SEED, draws
from nca_kernels.experiments.tasks import TASKS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "reproduce"
CONTENDERS = list(dict.fromkeys(contender for report in REPORTS.values() for contender in report.contenders))
SEARCHED = [contender for contender in CONTENDERS if contender.loss and not contender.given]


@pytest.fixture(autouse=True, scope="module")
def without_interpreter():
    """As a user runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


def records(folder):
    return {file.name: json.loads(file.read_text()) for file in (folder / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def quick(without_interpreter, tmp_path_factory):
    """The folder of a whole quick reproduction whose first program was killed, and the records that it had left."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    arguments = ["reproduce", "all", "--quick", "--out", str(out)]
    begun = subprocess.Popen([sys.executable, "-m", "nca_kernels", *arguments], stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/*.json"))) < 2 and begun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        begun.send_signal(signal.SIGKILL)
        begun.wait()
    left = records(out)
    assert cli.main(arguments) == 0
    return out, left


def test_a_killed_reproduction_continues(quick):
    out, left = quick
    assert 2 <= len(left) < len(records(out))
    assert all(record == left[name] for name, record in records(out).items() if name in left), "a run was done again"
    for name in REPORTS:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.md").read_text().startswith("|")


def test_every_run_is_done_once(quick):
    out = quick[0]
    settings = [json.dumps(record["settings"], sort_keys=True) for record in records(out).values()]
    assert len(settings) == len(set(settings))
    assert len(settings) == len(SEARCHED) * QUICK.draws + len(CONTENDERS) * len(QUICK.seeds)


def test_nothing_is_left_to_do(quick, monkeypatch, capsys):
    out = quick[0]
    monkeypatch.setattr(runs, "execute", lambda settings: pytest.fail(f"{settings.name} was done again"))
    tables = {name: (out / f"{name}.md").read_text() for name in REPORTS}
    reproduce.run("table2", out, quick=True)
    assert tables["table2"] in capsys.readouterr().out
    assert tables == {name: (out / f"{name}.md").read_text() for name in REPORTS}


def test_a_run_is_a_function_of_its_settings(quick):
    trial = next(contender for contender in CONTENDERS if contender.loss == "kto").trials(1, QUICK.size)[0]
    kept = runs.load(trial, quick[0] / "runs")
    again = runs.execute(trial)
    assert {**again, "seconds": 0} == {**kept, "seconds": 0}
    assert kept["settings"] == asdict(trial)


def test_a_record_is_small_and_its_own_summary(quick):
    for record in records(quick[0]).values():
        levels, rewards = (
            TASKS[record["settings"]["task"]].levels,
            np.array([int(digit) for digit in record["rewards"]]),
        )
        assert record["reward"] == pytest.approx(rewards.mean() / levels, abs=1e-5)
        assert len(rewards) == record["settings"]["size"]["tested" if record["settings"]["split"] == "test" else "validated"]
        assert len(json.dumps(record)) < 2000


def test_half_a_record_is_none(tmp_path):
    trial = DPO.trials(1, QUICK.size)[0]
    (tmp_path / f"{trial.name}.part").write_text('{"settings": {')
    assert not runs.is_stored(trial, tmp_path)
    runs.store({"reward": 1}, trial, tmp_path)
    assert runs.is_stored(trial, tmp_path) and runs.load(trial, tmp_path) == {"reward": 1}
    assert [file.name for file in tmp_path.iterdir()] == [f"{trial.name}.json"]


def test_every_method_is_tuned_alike():
    scale = Scale()
    points = draws(scale.draws)
    assert len(SEARCHED) == 14
    for contender in SEARCHED:
        trials = contender.trials(scale.draws, scale.size)
        assert {(trial.seed, trial.split) for trial in trials} == {(TUNING_SEED, "validation")}
        assert [(t.method.beta, t.method.lr) for t in trials] == [(point["beta"], point["lr"]) for point in points]
        assert [t.method.alpha for t in trials] == [0.0 if contender.pairwise else point["alpha"] for point in points]
    assert TUNING_SEED not in scale.seeds and len(scale.seeds) == 5


def test_draws_fill_their_ranges():
    points = draws(16)
    logs = np.log([list(point.values()) for point in points])
    assert np.abs(np.corrcoef(logs.T) - np.eye(3)).max() < 0.05
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        places = (logs[:, column] - np.log(low)) / np.log(high / low) * 16
        # Two significant digits move a point by less than a tenth of its sixteenth.
        assert np.abs(np.sort(places) - np.arange(0.5, 16)).max() < 0.6, f"one {name} in each sixteenth of its range"


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """The outcomes of three seeds of invented runs, and their folder."""

    def execute(settings):
        draw = random.Random(settings.name)
        levels = TASKS[settings.task].levels
        rewards = [draw.randint(0, levels) for _ in range(50)]
        curves = {which: [round(draw.uniform(-9, 0), 4) for _ in range(3)] for which in ("chosen", "rejected")}
        return {
            "settings": asdict(settings),
            "reward": round(sum(rewards) / 50 / levels, 5),
            "greedy_reward": round(draw.random(), 5),
            "rewards": "".join(map(str, rewards)),
            "curves": {"steps": [0, 1, 2], **curves} if settings.method else None,
        }

    monkeypatch.setattr(runs, "execute", execute)
    outcomes = reproduce.compare(CONTENDERS, tmp_path / "runs", Scale(seeds=(5, 6, 7)))
    return outcomes, tmp_path


def table_of(name, outcomes):
    """The rows of the report's first table, each as a list of its cells."""
    table = REPORTS[name].table({contender.name: outcomes[contender.name] for contender in REPORTS[name].contenders})
    lines = table.split("\n\n")[0].strip().splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(header) for row in rows)
    return {row[0] + (f"/{row[1]}" if name == "table2" else ""): dict(zip(header, row, strict=True)) for row in rows}


def test_the_best_trial_is_taken(invented):
    outcomes, folder = invented
    for contender in SEARCHED:
        trials = [runs.load(trial, folder / "runs") for trial in contender.trials(16, Scale().size)]
        rewards = [trial["reward"] for trial in trials]
        assert asdict(outcomes[contender.name].method) == trials[rewards.index(max(rewards))]["settings"]["method"]
    for name in ("DPO at beta 0.1", "pairwise NCA at beta 0.1"):
        assert (outcomes[name].method.beta, outcomes[name].method.lr, outcomes[name].trials) == (0.1, 1e-4, [])


def of(folder, method, task="sums"):
    """What the files say of a method on the test split, in the order of the seeds."""
    method = None if method is None else asdict(method)
    found = [record for record in records(folder).values() if record["settings"]["split"] == "test"]
    found = [r for r in found if r["settings"]["method"] == method and r["settings"]["task"] == task]
    return sorted(found, key=lambda record: record["settings"]["seed"])


def digits(record):
    return np.array([int(digit) for digit in record["rewards"]])


def shown(values, form=".3f"):
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):.{form[-2]}f}"


def test_table1_is_what_the_files_say(invented):
    outcomes, folder = invented
    table = table_of("table1", outcomes)
    assert list(table) == ["SFT", "KTO", "IPO", "DPO", "DPO x 3", "DPO x C(4,2)", "InfoNCA, K = 4", "NCA, K = 4"]
    dpo = of(folder, outcomes["DPO"].method)
    assert len(dpo) == 3
    for name, row in table.items():
        ours = of(folder, outcomes[name].method)
        assert row["reward"] == shown([r["reward"] for r in ours])
        assert row["exact"] == shown([(digits(r) == 4).mean() for r in ours])
        trials = [runs.load(trial, folder / "runs")["reward"] for trial in outcomes[name].contender.trials(16, Scale().size)]
        assert row["rewards in the search"] == (f"{min(trials):.3f} to {max(trials):.3f}" if trials else "")
        if name == "DPO":
            continue
        signs = [np.sign(digits(a) - digits(b)).mean() for a, b in zip(ours, dpo, strict=True)]
        assert row["win rate against DPO"] == shown([(sign + 1) / 2 for sign in signs])
        gaps = [a["reward"] - b["reward"] for a, b in zip(ours, dpo, strict=True)]
        assert row["reward less DPO's"] == f"{shown(gaps, '+.3f')} ({sum(gap > 0 for gap in gaps)} of 3)"


def test_table2_is_what_the_files_say(invented):
    outcomes, folder = invented
    table = table_of("table2", outcomes)
    assert list(table) == [f"{name}/{K}" for name in ("InfoNCA", "NCA") for K in (2, 3, 4)]
    for key, row in table.items():
        name, K = key.split("/")
        ours, two = (of(folder, outcomes[f"{name}, K = {k}"].method) for k in (K, 2))
        assert row["reward"] == shown([r["reward"] for r in ours])
        gaps = [a["reward"] - b["reward"] for a, b in zip(ours, two, strict=True)]
        wanted = "" if K == "2" else f"{shown(gaps, '+.3f')} ({sum(gap > 0 for gap in gaps)} of 3)"
        assert row["reward less that at K = 2"] == wanted


def test_table3_is_what_the_files_say(invented):
    outcomes, folder = invented
    table = table_of("table3", outcomes)
    supervised = of(folder, None, "chains")
    for name, row in table.items():
        ours = of(folder, outcomes[name].method, "chains")
        assert row["accuracy, sampled"] == shown([digits(r).mean() for r in ours])
        assert row["likeliest"] == shown([r["greedy_reward"] for r in ours])
        if name == "SFT, chains":
            continue
        gaps = [a["greedy_reward"] - b["greedy_reward"] for a, b in zip(ours, supervised, strict=True)]
        assert row["likeliest less SFT's"].startswith(shown(gaps, "+.3f"))
        moves = [r["curves"]["chosen"][2] - r["curves"]["chosen"][0] for r in ours]
        assert row["chosen log-prob, change"] == shown(moves, "+.2f")


def test_figure2_is_what_the_files_say(invented):
    outcomes, folder = invented
    for name, row in table_of("figure2", outcomes).items():
        ours = of(folder, outcomes[name].method)
        for which in ("chosen", "rejected"):
            moves = [r["curves"][which][2] - r["curves"][which][0] for r in ours]
            assert row[f"{which} log-prob, change"] == shown(moves, "+.2f")


def test_the_document_shows_what_came_out(monkeypatch):
    """The tables in docs/experiments.md are those of the stored runs."""
    monkeypatch.setattr(runs, "execute", lambda settings: pytest.fail(f"{settings.name} is not among the stored runs"))
    outcomes = reproduce.compare(CONTENDERS, RESULTS / "runs", Scale())
    document = (ROOT / "docs" / "experiments.md").read_text()
    for name, report in REPORTS.items():
        table = report.table({contender.name: outcomes[contender.name] for contender in report.contenders})
        assert (RESULTS / f"{name}.md").read_text() == table
        assert table.strip() in document


@pytest.mark.parametrize("arguments", [["table4"], ["table1", "--seeds", "9"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["reproduce", *arguments])
    assert error.value.code == 2
    assert "usage: nca-kernels" in capsys.readouterr().err
