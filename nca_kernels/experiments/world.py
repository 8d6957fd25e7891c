"""What a seed decides for every method: the problems, the supervised model, its samples and their rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .tasks import Task
from .toy import Preferences, build_model, collect, teach


@dataclass(frozen=True)
class Size:
    """Sizes of a world and its runs; by default a world takes half a minute on one core, a run in it ten seconds."""

    hidden_size: int = 192
    taught: int = 500 * 64  # at most: supervised training ends at the target loss of the task
    rewarded: int = 3600
    responses: int = 4
    probed: int = 400
    validated: int = 0
    tested: int = 1000
    steps: int = 200
    batch_size: int = 16


@dataclass(frozen=True)
class World:
    """The supervised model and the data of one seed. No problem is in two parts."""

    reference: LlamaForCausalLM
    supervised_loss: list[float]  # of each step
    train: Preferences
    probe: Preferences
    validation: Tensor  # problems
    test: Tensor  # problems


def make_world(task: Task, seed: int, size: Size, *, path: str = "linear", progress: bool = False) -> World:
    """Make the world of a seed; the same on every call if PyTorch runs on one thread."""
    generator = torch.Generator().manual_seed(seed)
    parts = [size.taught, size.rewarded, size.probed, size.validated, size.tested]
    taught, rewarded, probed, validation, test = task.draw(sum(parts), generator).split(parts)
    reference = build_model(seed, size.hidden_size)
    losses = teach(reference, task, taught, batch_size=64, target=task.target_loss, progress=progress)
    train, probe = (collect(reference, task, part, size.responses, generator, path) for part in (rewarded, probed))
    return World(reference, losses, train, probe, validation, test)
