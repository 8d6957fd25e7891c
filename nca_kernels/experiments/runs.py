"""One run of the paper's experiments: a pure function of its settings. Its record is written to a file when it ends."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .align import Method, align
from .tasks import TASKS
from .toy import rewards
from .world import Size, World, make_world


@dataclass(frozen=True)
class Settings:
    """``method`` None is the supervised model as it is; ``split`` is ``validation`` or ``test``."""

    task: str
    method: Method | None
    seed: int
    split: str
    size: Size

    @property
    def name(self) -> str:
        """Name of the record's file: what a reader looks for, and a digest of all settings."""
        method = f"{self.method.loss}-{self.method.K}" if self.method else "supervised"
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{method}-{self.split}-{self.seed}-{digest}"


def is_stored(settings: Settings, folder: Path) -> bool:
    """Whether this run has ended before."""
    return _file(settings, folder).exists()


def load(settings: Settings, folder: Path) -> dict[str, Any]:
    """The record of a run that has ended."""
    return json.loads(_file(settings, folder).read_text())


def store(record: dict[str, Any], settings: Settings, folder: Path) -> None:
    """Write the record, whole or not at all: a killed program leaves no half of a file for the next one to read."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{settings.name}.part"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(_file(settings, folder))


def _file(settings: Settings, folder: Path) -> Path:
    return folder / f"{settings.name}.json"


def execute(settings: Settings) -> dict[str, Any]:
    """Do the run and return its record.

    Log-probs are means over held-out problems; ``rewards`` has one digit for each problem, in units of 1 / levels.
    """
    began = time.perf_counter()
    task, size = TASKS[settings.task], settings.size
    world = _world(settings.task, settings.seed, size)
    problems = getattr(world, settings.split)
    model, curves = world.reference, None
    if settings.method:
        model, recorded = align(
            world.reference,
            world.train,
            world.probe,
            settings.method,
            seed=settings.seed,
            steps=size.steps,
            batch_size=size.batch_size,
        )
        curves = {which: _rounded(getattr(recorded, which)) for which in ("steps", "chosen", "rejected")}
    sampled = rewards(model, task, problems, torch.Generator().manual_seed(settings.seed))
    likeliest = rewards(model, task, problems, None)
    return {
        "settings": asdict(settings),
        "supervised_steps": len(world.supervised_loss),
        "train_prompts": len(world.train),
        "reward": round(sampled.mean().item(), 5),
        "greedy_reward": round(likeliest.mean().item(), 5),
        "greedy_exact": round((likeliest == 1).float().mean().item(), 5),
        "rewards": "".join(str(round(reward * task.levels)) for reward in sampled.tolist()),
        "curves": curves,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }


# Consecutive runs share their world, which takes longer to make than a run takes.
@lru_cache(maxsize=1)
def _world(task: str, seed: int, size: Size) -> World:
    return make_world(TASKS[task], seed, size)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
