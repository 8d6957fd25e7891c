"""The paper's experiments at a small size: ``nca-kernels reproduce``. The record of every run is stored, so no run is repeated."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from . import runs
from .questions import QUESTIONS, Outcome, Outcomes, Question
from .runs import Settings
from .search import TUNING_SEEDS, Contender
from .world import WORLDS, Size

# The most runs that one worker takes at a time: they share a world, which takes longer to make than a run.
CHUNK = 48


@dataclass(frozen=True)
class Scale:
    """The size of a reproduction. A seed determines everything that is random: problems, model, samples and batches."""

    size: Size = Size(hidden_size=128, taught=700 * 64, rewarded=2800, probed=150, validated=4000, tested=4000, steps=150)
    draws: int = 8
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    seeds: tuple[int, ...] = tuple(range(12))

    def tests(self, contender: Contender) -> list[tuple[int, Size]]:
        """The test seeds of a contender, each with the size of its run; a contender that is not tuned has fewer seeds."""
        size = replace(self.size, steps=6 * self.size.steps) if contender.world == "unlikely" else self.size
        fewer = contender.given is not None and contender.world != "chains"
        return [(seed, size) for seed in (self.seeds[:5] if fewer else self.seeds)]


# With so little training the model gets about one chain in a few hundred right, by luck, which is enough to have pairs.
QUICK = Scale(
    Size(hidden_size=32, taught=120 * 64, rewarded=400, probed=200, validated=20, tested=20, steps=4, batch_size=4),
    draws=1,
    tuning_seeds=(1000,),
    seeds=(0,),
)


def run(what: str, out: Path, quick: bool = False, workers: int = 0) -> None:
    """Do the runs that are missing in ``out/runs``; write ``out/NAME.md`` and, if it has a picture, ``out/NAME.png`` per question.

    ``workers``: the number of parallel processes; 0 for one per core.
    """
    scale = QUICK if quick else Scale()
    names = list(QUESTIONS) if what == "all" else [what]
    out.mkdir(parents=True, exist_ok=True)
    # Together, since the questions share worlds, and making a world takes longer than a run.
    outcomes = compare(dict.fromkeys(c for name in names for c in QUESTIONS[name].contenders), out / "runs", scale, workers)
    for name in names:
        question = QUESTIONS[name]
        report(name, question, {contender: outcomes[contender] for contender in question.contenders}, out)


def report(name: str, question: Question, outcomes: Outcomes, out: Path) -> None:
    """Write and print the answer to a question."""
    text = question.table(outcomes)
    (out / f"{name}.md").write_text(text)
    if question.draw is not None:
        question.draw(outcomes, out / f"{name}.png")
    print(f"\n{name}: {out / name}.md, {out / 'runs'}\n\n{text}")


def compare(contenders: Iterable[Contender], folder: Path, scale: Scale, workers: int = 1) -> Outcomes:
    """Tune each contender, then run its best method with every test seed."""
    contenders = tuple(contenders)
    trials = {contender: contender.trials(scale.draws, scale.tuning_seeds, scale.size) for contender in contenders}
    searched = _do(trials, folder, "search", workers)
    tuned = {contender: contender.tuned(searched[contender]) for contender in contenders}
    tests = {
        contender: [Settings(contender.world, method, seed, "test", size) for seed, size in scale.tests(contender)]
        for contender, method in tuned.items()
    }
    tested = _do(tests, folder, "tests", workers)
    return {contender: Outcome(method, searched[contender], tested[contender]) for contender, method in tuned.items()}


def _do(wanted: dict[Contender, list[Settings]], folder: Path, desc: str, workers: int) -> dict[Contender, list[dict[str, Any]]]:
    """The records of all these runs; those that are missing are run now."""
    missing = [
        settings
        for settings in dict.fromkeys(s for of_one in wanted.values() for s in of_one)
        if not runs.is_stored(settings, folder)
    ]
    chunks = list(_chunks(missing))
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    with tqdm(total=len(missing), desc=desc, smoothing=0, disable=not missing) as bar:
        if workers <= 1:
            for chunk in chunks:
                bar.update(_execute(chunk, folder))
        else:
            # A forked child would inherit PyTorch's threads in an unknown state.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for done in as_completed([pool.submit(_execute, chunk, folder) for chunk in chunks]):
                    bar.update(done.result())
    return {contender: [runs.load(settings, folder) for settings in of_one] for contender, of_one in wanted.items()}


def _chunks(missing: list[Settings]) -> Iterator[list[Settings]]:
    """Group the runs of one world and seed, and put worlds that share their reference model after each other."""

    def world(settings: Settings) -> tuple[Any, ...]:
        return WORLDS[settings.world].task, settings.seed, bool(WORLDS[settings.world].writers), settings.world, settings.size.steps

    for _, group in groupby(sorted(missing, key=world), key=lambda settings: world(settings)[:3]):
        together = list(group)
        yield from (together[start : start + CHUNK] for start in range(0, len(together), CHUNK))


def _execute(chunk: list[Settings], folder: Path) -> int:
    torch.set_num_threads(1)  # results depend on the order of sums, which depends on the number of threads
    datasets.disable_progress_bars()  # each run would show several
    for settings in chunk:
        runs.store(runs.execute(settings), settings, folder)
    return len(chunk)
