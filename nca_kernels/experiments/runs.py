"""One run of the experiments: a pure function of its settings. Its record is written to a file when it ends."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from . import optimum
from .align import Curves, Method, align
from .samples import response_logps, sampled_logps, scored_samples
from .tasks import TASKS
from .world import WORLDS, Size, World, make_world

# Samples of each held-out problem.
SAMPLES = {"validation": 1, "test": 4}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run.

    ``world`` names a kind of ``WORLDS``. ``method`` None is the supervised model. ``split`` is ``validation`` or ``test``.
    """

    world: str
    method: Method | None
    seed: int
    split: str
    size: Size

    @property
    def name(self) -> str:
        """The name of the record's file: the settings that a reader looks for, and a digest of all settings."""
        method = f"{self.method.loss}-{self.method.K}" if self.method else "supervised"
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.world}-{method}-{self.split}-{self.seed}-{digest}"


def is_stored(settings: Settings, folder: Path) -> bool:
    """Whether this run has already ended and stored its record."""
    return _file(settings, folder).exists()


def load(settings: Settings, folder: Path) -> dict[str, Any]:
    """The record of a run that has ended."""
    return json.loads(_file(settings, folder).read_text())


def store(record: dict[str, Any], settings: Settings, folder: Path) -> None:
    """Write the record whole or not at all, so that a killed program leaves no half-written file for the next one to read."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{settings.name}.part"
    unfinished.write_text(json.dumps(record) + "\n")
    unfinished.replace(_file(settings, folder))


def _file(settings: Settings, folder: Path) -> Path:
    return folder / f"{settings.name}.json"


def execute(settings: Settings) -> dict[str, Any]:
    """Do the run and return its record.

    ``reward`` and ``exact`` (the share of samples with the highest reward) are means over :data:`SAMPLES` samples of each held-out
    problem, with the standard error of the reward. ``kl`` estimates KL(policy || reference) on the same samples, with its standard
    error; a run of the search has no ``kl``. ``chosen`` and ``rejected`` are the mean log-probs of held-out best and worst
    responses, at ``steps``.
    """
    began = time.perf_counter()
    world, size = _world(settings.world, settings.seed, settings.size), settings.size
    problems = getattr(world, settings.split)
    model, curves, record = world.reference, Curves(), dict[str, Any]()
    if settings.method:
        model, curves = align(
            world.reference,
            world.train,
            world.probe,
            settings.method,
            seed=settings.seed,
            steps=size.steps,
            batch_size=size.batch_size,
            probes=2,
            share_prompt=True,  # the same results in two thirds of the time
        )
    task = TASKS[WORLDS[settings.world].task]
    samples = SAMPLES[settings.split]
    responses, rewards = scored_samples(model, task, problems, samples, torch.Generator().manual_seed(settings.seed))
    if settings.split == "test":
        kl = responses.logps - sampled_logps(world.reference, task.prompts(problems), responses.tokens)
        record |= {"kl": round(kl.mean().item(), 5), "kl_error": _error(kl)}
    if settings.world == "chains":
        record["greedy_reward"] = round(scored_samples(model, task, problems, 1, None)[1].mean().item(), 5)
    if settings.world == "unlikely" and settings.method:
        record["optimum"] = _fit(model, world, settings.method)
    return {
        "settings": asdict(settings),
        "supervised_steps": len(world.supervised_loss),
        "train_prompts": len(world.train),
        "reward": round(rewards.mean().item(), 5),
        "reward_error": _error(rewards),
        "exact": round((rewards == 1).float().mean().item(), 5),
        **record,
        **{which: [round(value, 4) for value in getattr(curves, which)] for which in ("steps", "chosen", "rejected")},
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _error(values: Tensor) -> float:
    """The standard error of the mean of values [n, K]. It uses the mean of each problem, whose samples are not independent."""
    return round((values.mean(1).std() / len(values) ** 0.5).item(), 5)


def _fit(model: LlamaForCausalLM, world: World, method: Method) -> dict[str, float]:
    train = world.train
    rewards = method.beta * (response_logps(model, train.tokens, train.labels, "linear") - train.ref_logps)
    return optimum.fit(method, train.scores, rewards)


# Consecutive runs share their world.
@lru_cache(maxsize=1)
def _world(name: str, seed: int, size: Size) -> World:
    return make_world(WORLDS[name], seed, size)
