"""The paper's experiments at a small size: worlds, runs that are stored and done once, the search, intervals and answers."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from nca_kernels import cli
from nca_kernels.experiments import annotators, inference, optimum, reproduce, runs
from nca_kernels.experiments.align import Method
from nca_kernels.experiments.questions import DPO, DPO_ALL, NCA, QUESTIONS, SFT
from nca_kernels.experiments.reproduce import QUICK, Scale
from nca_kernels.experiments.samples import response_logps, sampled_logps, scored_samples
from nca_kernels.experiments.search import RANGES, TUNING_SEEDS, draws
from nca_kernels.experiments.tasks import CHARS, TASKS
from nca_kernels.experiments.teach import build_model, sequences
from nca_kernels.experiments.world import WORLDS, Kind, Size, make_world

ROOT = Path(__file__).parents[1]
CONTENDERS = tuple(dict.fromkeys(contender for question in QUESTIONS.values() for contender in question.contenders))
SEARCHED = [contender for contender in CONTENDERS if contender.loss and not contender.given]
SMALL = Size(hidden_size=16, taught=20 * 64, rewarded=60, probed=20, validated=10, tested=10, steps=2, batch_size=4)


@pytest.fixture(autouse=True, scope="module")
def without_interpreter():
    """Run as a user does, without Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


# --- worlds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_world(without_interpreter):
    return make_world(WORLDS["exact"], 3, SMALL)


@pytest.mark.parametrize("name", ["noise_0.2", "noise_0.4", "noise_0.8", "noise_by_rank", "noise_heavy"])
def test_noise_changes_the_scores_alone(name, exact_world):
    """Noise may keep a prompt that exact scores leave out; prompts in both worlds have the same responses."""
    noisy = make_world(WORLDS[name], 3, SMALL)
    assert noisy.reference is exact_world.reference and torch.equal(noisy.test, exact_world.test)
    exact = {row.tobytes(): scores for row, scores in zip(exact_world.train.tokens.numpy(), exact_world.train.scores, strict=True)}
    shared = [
        (exact[row.tobytes()], scores)
        for row, scores in zip(noisy.train.tokens.numpy(), noisy.train.scores, strict=True)
        if row.tobytes() in exact
    ]
    assert len(shared) == len(exact_world.train)
    assert any(not torch.equal(a, b) for a, b in shared)


@pytest.mark.parametrize("annotator, size", [("normal_02", 0.2), ("normal_04", 0.4), ("normal_08", 0.8)])
def test_normal_noise_has_its_deviation(annotator, size):
    rewards = torch.rand(4000, 4)
    responses = torch.arange(4)[None, :, None].expand(4000, 4, 2)
    noise = getattr(annotators, annotator)(rewards, responses, torch.Generator().manual_seed(0)) - rewards
    assert noise.std().item() == pytest.approx(size, rel=0.03) and abs(noise.mean().item()) < 0.05 * size


def test_heavy_tails_have_the_median_of_normal_noise():
    rewards, responses = torch.rand(20_000, 4), torch.arange(4)[None, :, None].expand(20_000, 4, 2)
    noise = annotators.heavy_tailed(rewards, responses, torch.Generator().manual_seed(0)) - rewards
    assert noise.abs().median().item() == pytest.approx(0.4 * 0.6745, rel=0.03)
    assert noise.abs().max() > 10


def test_noise_by_rank_is_largest_at_the_best():
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.25]]).expand(4000, 4)
    responses = torch.arange(4)[None, :, None].expand(4000, 4, 2)
    noise = annotators.by_rank(rewards, responses, torch.Generator().manual_seed(0)) - rewards
    assert noise.std(0).tolist() == pytest.approx([0.1, 0.6, 0.4, 0.2], rel=0.05)


def test_one_text_has_one_score():
    rewards = torch.rand(50, 1).expand(50, 4)
    responses = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 2]]).expand(50, 4, 2)
    scores = annotators.normal_04(rewards, responses, torch.Generator().manual_seed(0))
    assert torch.equal(scores[:, 0], scores[:, 2]) and torch.equal(scores[:, 0], scores[:, 3])
    assert (scores[:, 0] != scores[:, 1]).all()


def test_writers_are_not_the_policy():
    world = make_world(Kind(writers=(2.4, 2.2)), 3, SMALL)
    assert world.train.scores.shape[1] == 2
    other = make_world(WORLDS["exact"], 3, SMALL)
    assert world.reference is other.reference and not torch.equal(world.train.tokens[0, :2], other.train.tokens[0, :2])


def test_the_reward_of_near_sums_falls_with_the_error():
    problems = torch.tensor([[123, 456]])
    texts = ["0579", "0578", "0570", "0179", "9999", "+579"]
    responses = torch.tensor([[[CHARS.index(char) for char in text] for text in texts]])
    rewards = TASKS["near"].rewards(problems, responses)[0].tolist()
    errors = np.array([0, 1, 9, 400, 9420])
    assert rewards[:5] == pytest.approx(1 - np.log2(1 + errors) / np.log2(10_000), abs=1e-6)
    assert rewards[5] == 0


@pytest.mark.parametrize("loss", ["nca", "info_nca"])
def test_the_optimum_fits_itself(loss):
    scores = torch.rand(20, 4)
    best = scores / 0.3 + 5 if loss == "info_nca" else (scores / 0.3).log_softmax(1) + np.log(4)
    assert optimum.fit(Method(loss, alpha=0.3), scores, best) == {"slope": 1.0, "deviation": 0.0}
    half = optimum.fit(Method(loss, alpha=0.3), scores, best / 2)
    assert half["slope"] == pytest.approx(0.5) and half["deviation"] > 0.4


def test_log_probs_of_samples_are_those_of_whole_rows(exact_world):
    """Also where responses agree in part, and under another model than their own."""
    model, reference = build_model(7, 16), exact_world.reference
    task, problems = TASKS["sums"], exact_world.test
    prompts = task.prompts(problems)
    responses, _ = scored_samples(model, task, problems, 9, torch.Generator().manual_seed(0))
    assert (responses.tokens[:, :1, 0] == responses.tokens[:, 1:, 0]).any(), "some responses to a prompt begin alike"
    rows, labels = sequences(prompts, responses.tokens)
    for whose, logps in ((model, responses.logps), (reference, sampled_logps(reference, prompts, responses.tokens))):
        torch.testing.assert_close(logps, response_logps(whose, rows, labels, "logits"), rtol=0, atol=2e-5)


# --- runs ------------------------------------------------------------------------------------------------------------


def records(folder):
    return {file.name: json.loads(file.read_text()) for file in (folder / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def quick(without_interpreter, tmp_path_factory):
    """The folder of a quick reproduction of one question whose first process was killed, and the records that it left."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    arguments = ["reproduce", "table3", "--quick", "--workers", "1", "--out", str(out)]
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
    assert (out / "table3.md").read_text().startswith("| method")


def test_nothing_is_left_to_do(quick, monkeypatch, capsys):
    out = quick[0]
    monkeypatch.setattr(runs, "execute", lambda settings: pytest.fail(f"{settings.name} was done again"))
    reproduce.run("table3", out, quick=True, workers=1)
    assert (out / "table3.md").read_text() in capsys.readouterr().out


def test_a_run_is_a_function_of_its_settings(quick):
    contender = next(c for c in QUESTIONS["table3"].contenders if c.loss and not c.given)
    trial = contender.trials(1, QUICK.tuning_seeds, QUICK.size)[0]
    kept = runs.load(trial, quick[0] / "runs")
    again = runs.execute(trial)
    assert {**again, "seconds": 0} == {**kept, "seconds": 0}
    assert kept["settings"] == asdict(trial)


def test_half_a_record_is_none(tmp_path):
    trial = DPO.trials(1, (1000,), QUICK.size)[0]
    (tmp_path / f"{trial.name}.part").write_text('{"settings": {')
    assert not runs.is_stored(trial, tmp_path)
    runs.store({"reward": 1}, trial, tmp_path)
    assert runs.load(trial, tmp_path) == {"reward": 1}
    assert [file.name for file in tmp_path.iterdir()] == [f"{trial.name}.json"]


# --- the search ------------------------------------------------------------------------------------------------------


def test_every_method_is_tuned_alike():
    scale = Scale()
    points = draws(scale.draws)
    for contender in SEARCHED:
        trials = contender.trials(scale.draws, scale.tuning_seeds, scale.size)
        assert {(trial.seed, trial.split) for trial in trials} == {(seed, "validation") for seed in TUNING_SEEDS}
        methods = list(dict.fromkeys(trial.method for trial in trials))
        assert [(method.beta, method.lr) for method in methods] == [(point["beta"], point["lr"]) for point in points]
    assert len(TUNING_SEEDS) >= 3 and len(scale.seeds) >= 8 and not set(TUNING_SEEDS) & set(scale.seeds)


def test_draws_fill_their_ranges():
    points = draws(16)
    logs = np.log([list(point.values()) for point in points])
    assert np.abs(np.corrcoef(logs.T) - np.eye(3)).max() < 0.05
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        places = (logs[:, column] - np.log(low)) / np.log(high / low) * 16
        # Two significant digits move a point by less than a tenth of its sixteenth.
        assert np.abs(np.sort(places) - np.arange(0.5, 16)).max() < 0.6, f"one {name} in each sixteenth of its range"


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    """The outcomes of all questions from invented runs, and their folder."""
    folder = tmp_path_factory.mktemp("invented")

    def execute(settings):
        draw = random.Random(settings.name)
        values = {name: round(draw.random(), 5) for name in ("reward", "reward_error", "exact", "kl", "kl_error", "greedy_reward")}
        curves = {which: [round(draw.uniform(-9, 0), 4) for _ in range(3)] for which in ("chosen", "rejected")}
        fit = {"optimum": {"slope": draw.random(), "deviation": draw.random()}}
        return {"settings": asdict(settings), **values, **fit, **curves, "steps": [0, 1, 2]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "execute", execute)
        yield reproduce.compare(CONTENDERS, folder / "runs", Scale(seeds=tuple(range(6)))), folder


def test_the_best_setting_is_the_best_over_all_validation_seeds(invented):
    outcomes, folder = invented
    scale = Scale()
    for contender in (DPO, NCA[4], replace(NCA[4], world="writers")):
        trials = contender.trials(scale.draws, scale.tuning_seeds, scale.size)
        rewards = {}
        for trial in trials:
            rewards.setdefault(trial.method, []).append(runs.load(trial, folder / "runs")["reward"])
        means = {method: np.mean(values) for method, values in rewards.items()}
        assert outcomes[contender].method == max(means, key=means.get) and all(len(values) == 3 for values in rewards.values())


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_has_its_table(name, invented, tmp_path):
    outcomes, _ = invented
    question = QUESTIONS[name]
    reproduce.report(name, question, {contender: outcomes[contender] for contender in question.contenders}, tmp_path)
    table, _, _ = (tmp_path / f"{name}.md").read_text().partition("\n\n")  # a line about the question as a whole may follow
    header, _, *rows = table.splitlines()
    assert rows and all(row.count("|") == header.count("|") for row in rows)
    assert (tmp_path / f"{name}.png").exists() == (question.draw is not None)


def test_table1_is_what_the_files_say(invented):
    outcomes, _ = invented
    table = QUESTIONS["table1"].table({contender: outcomes[contender] for contender in QUESTIONS["table1"].contenders})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    row = next(dict(zip(rows[0], row, strict=True)) for row in rows if row[:2] == ["writers", "NCA, K = 4"])
    ours, dpo, every, start = (outcomes[replace(c, world="writers")].values("reward") for c in (NCA[4], DPO, DPO_ALL, SFT))
    gaps = np.subtract(ours, every)
    half = 2.571 * gaps.std(ddof=1) / 6**0.5
    assert row["less DPO x C(4,2)'s"] == f"{gaps.mean():+.4f} [{gaps.mean() - half:+.4f}, {gaps.mean() + half:+.4f}]"
    assert row["less DPO's"].startswith(f"{np.subtract(ours, dpo).mean():+.4f}")
    assert row["less SFT's"].startswith(f"{np.subtract(ours, start).mean():+.4f}")
    assert "With Holm's correction for 16 differences, above 0: " in table


# --- intervals and answers -------------------------------------------------------------------------------------------


def test_the_interval_covers_95_percent():
    generator = np.random.default_rng(0)
    inside = [abs(i.mean - 2) < i.half for i in (inference.interval(list(generator.normal(2, 3, 12))) for _ in range(4000))]
    assert 0.94 < np.mean(inside) < 0.96


@pytest.mark.parametrize(
    "mean, half, delta, wanted",
    [(0.01, 0.005, 0.003, "yes"), (0.0, 0.002, 0.003, "no"), (-0.01, 0.005, 0.003, "no"), (0.001, 0.005, 0.003, "cannot tell")],
)
def test_answers(mean, half, delta, wanted):
    assert inference.answer(inference.Interval(mean, half), delta) == wanted


def test_a_single_seed_answers_nothing():
    assert inference.answer(inference.interval([0.5]), 0.003) == "cannot tell"
    assert inference.p_value([0.5], [0.1]) == 1


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_p_value_is_5_percent_where_the_interval_ends_at_0(n):
    values = list(np.random.default_rng(n).normal(0, 1, n))
    found = inference.interval(values)
    for end in (found.low, found.high):
        assert inference.p_value(values, [end] * n) == pytest.approx(0.05, rel=1e-3)
    assert inference.p_value(values, values) == 1 and inference.p_value([2.0] * n, [1.0] * n) == 0


def test_holms_correction():
    assert inference.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert inference.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])


def test_the_share_has_an_interval_over_settings():
    share, low, high = inference.share_above([[True] * 3] * 4 + [[False] * 3] * 4)
    assert share == 0.5 and low < 0.25 and high > 0.75


# --- what the documents say ------------------------------------------------------------------------------------------


def test_the_first_experiments_tables_stay():
    """The tables of the first experiments in docs/experiments.md are those that were stored with their runs."""
    document = (ROOT / "docs" / "experiments.md").read_text()
    for table in sorted((ROOT / "bench" / "results" / "reproduce").glob("*.md")):
        assert table.read_text().strip() in document


def test_the_second_experiments_numbers_are_those_of_their_tables():
    document = (ROOT / "docs" / "experiments.md").read_text()
    stored = {file.stem: file.read_text() for file in (ROOT / "bench" / "results" / "noisy").glob("*.md")}
    for name in ("table2", "table3", "optimum", "figure2", "frontier"):
        assert stored[name].partition("\n\n")[0].strip() in document
    section = document[document.index("## T1:") : document.index("## T2:")]
    numbers = re.findall(r"[+-]0\.\d{4} \[[^\]]*\]|\b0\.[89]\d{3}\b", section.replace("\n", " "))
    assert len(numbers) > 70 and all(number in stored["table1"] for number in numbers)


def test_the_protocol_names_every_world_and_question():
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    assert all(name in protocol for name in WORLDS)
    assert ", ".join(f"{beta:g}" for beta in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)) in protocol
    assert all(str(seed) in protocol for seed in TUNING_SEEDS)


@pytest.mark.parametrize("arguments", [["table4"], ["table1", "--seeds", "9"], ["table1", "--workers", "0"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["reproduce", *arguments])
    assert error.value.code == 2
    assert "usage: nca-kernels" in capsys.readouterr().err
