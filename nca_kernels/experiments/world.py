"""All that a seed decides before a method comes in: the problems, the supervised model, its rewarded samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .tasks import Task
from .toy import Preferences, build_model, collect, teach


@dataclass(frozen=True)
class Size:
    """How much of everything; as it stands, half a minute on one core for a world, ten seconds for a run in it."""

    hidden_size: int = 192
    taught: int = 500 * 64  # at most: teaching ends at the target loss of the task
    rewarded: int = 3600
    responses: int = 4
    probed: int = 400
    validated: int = 0
    tested: int = 1000
    steps: int = 200
    batch_size: int = 16


@dataclass(frozen=True)
class World:
    """No problem is in two of its parts."""

    reference: LlamaForCausalLM
    supervised_loss: list[float]  # of each step
    train: Preferences
    probe: Preferences
    validation: Tensor  # problems
    test: Tensor  # problems


def make_world(task: Task, seed: int, size: Size, *, path: str = "linear", progress: bool = False) -> World:
    """A function of its arguments alone, as long as PyTorch runs on one thread."""
    generator = torch.Generator().manual_seed(seed)
    parts = [size.taught, size.rewarded, size.probed, size.validated, size.tested]
    taught, rewarded, probed, validation, test = task.draw(sum(parts), generator).split(parts)
    reference = build_model(seed, size.hidden_size)
    losses = teach(reference, task, taught, batch_size=64, target=task.target_loss, progress=progress)
    train, probe = (collect(reference, task, part, size.responses, generator, path) for part in (rewarded, probed))
    return World(reference, losses, train, probe, validation, test)
