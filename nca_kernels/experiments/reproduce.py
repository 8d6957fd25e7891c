"""The paper's experiments in small: ``nca-kernels reproduce``. The record of every run is kept, and a run is done once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from . import runs
from .reports import REPORTS, Outcome, Outcomes
from .runs import Settings
from .search import Contender
from .world import Size


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is. A seed stands for all that is random: problems, model, samples, batches."""

    # Half a minute on one core for a world, ten seconds for a run in it.
    size: Size = Size(hidden_size=128, taught=700 * 64, rewarded=2800, probed=150, validated=2000, tested=2000, steps=150)
    draws: int = 16
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


# Taught so little, the model has one chain in some hundreds right, by luck: enough to have pairs.
QUICK = Scale(
    Size(hidden_size=32, taught=120 * 64, rewarded=400, probed=200, validated=20, tested=20, steps=4, batch_size=4),
    draws=1,
    seeds=(0,),
)


def run(what: str, out: Path, quick: bool = False) -> None:
    """Do the runs that ``out/runs`` lacks; write ``out/NAME.md`` and ``out/NAME.png`` of each table or figure."""
    scale = QUICK if quick else Scale()
    torch.set_num_threads(1)  # a run's numbers depend on the order of its sums
    datasets.disable_progress_bars()  # every run would show several
    names = list(REPORTS) if what == "all" else [what]
    out.mkdir(parents=True, exist_ok=True)
    contenders = list(dict.fromkeys(contender for name in names for contender in REPORTS[name].contenders))
    outcomes = compare(contenders, out / "runs", scale)
    for name in names:
        report = REPORTS[name]
        compared = {contender.name: outcomes[contender.name] for contender in report.contenders}
        table = report.table(compared)
        (out / f"{name}.md").write_text(table)
        report.draw(compared, out / f"{name}.png")
        print(f"\n{name}: {out / name}.md, {out / name}.png, {out / 'runs'}\n\n{table}")


def compare(contenders: list[Contender], folder: Path, scale: Scale) -> Outcomes:
    """Tune each contender, then run it at its best with every seed."""
    trials = {contender: contender.trials(scale.draws, scale.size) for contender in contenders}
    total = sum(map(len, trials.values())) + len(contenders) * len(scale.seeds)
    # No smoothing: the time of a run varies, since some make their world first.
    with tqdm(total=total, desc="runs", smoothing=0) as bar:
        searched = _do(trials, folder, bar)
        tuned = {contender: contender.tuned(searched[contender]) for contender in contenders}
        tests = {
            contender: [Settings(contender.task, method, seed, "test", scale.size) for seed in scale.seeds]
            for contender, method in tuned.items()
        }
        tested = _do(tests, folder, bar)
    return {
        contender.name: Outcome(contender, method, searched[contender], tested[contender]) for contender, method in tuned.items()
    }


def _do(wanted: dict[Contender, list[Settings]], folder: Path, bar: tqdm) -> dict[Contender, list[dict[str, Any]]]:
    """Do the runs that ``folder`` lacks, those of one world in a row; the records of all ``wanted``."""
    everything = [settings for of_one in wanted.values() for settings in of_one]
    for settings in sorted(everything, key=lambda settings: (settings.task != "sums", settings.seed)):
        if runs.is_stored(settings, folder):
            assert bar.total is not None
            bar.total -= 1  # the bar estimates the time of the runs that are left
            bar.refresh()
            continue
        bar.set_postfix_str(settings.name)
        runs.store(runs.execute(settings), settings, folder)
        bar.update()
    return {contender: [runs.load(settings, folder) for settings in of_one] for contender, of_one in wanted.items()}
