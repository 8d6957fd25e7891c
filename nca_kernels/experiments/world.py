"""A world is what a seed determines for every method: problems, the supervised model, training responses and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .annotators import Annotator, by_rank, exact, heavy_tailed, normal_02, normal_04, normal_08
from .samples import Preferences, prefer, sample
from .tasks import TASKS
from .teach import build_model, teach


@dataclass(frozen=True)
class Size:
    """The sizes of a world and its runs. By default a world takes half a minute on one core, and a run in it ten seconds."""

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
class Kind:
    """How the training responses of a world are made and scored. Models are always evaluated with the reward of the task.

    ``writers``: the losses per token to which four other models are trained. Each of them writes one response per prompt, and the
    reference, from which training starts, writes none. Without ``writers`` the reference writes all responses.
    ``unlikely``: keep only this many prompts, whose responses all differ and have a probability of at most 0.2 each, so that a
    model can reach the closed-form optimum.
    """

    task: str = "sums"
    annotator: Annotator = exact
    writers: tuple[float, ...] = ()
    unlikely: int | None = None


# The losses per token to which the four writers are trained; that of the policy is 0.25.
WRITERS = (0.9, 0.6, 0.4, 0.15)

WORLDS = {
    "exact": Kind(),
    "noise_0.2": Kind(annotator=normal_02),
    "noise_0.4": Kind(annotator=normal_04),
    "noise_0.8": Kind(annotator=normal_08),
    "noise_by_rank": Kind(annotator=by_rank),
    "noise_heavy": Kind(annotator=heavy_tailed),
    "writers": Kind(writers=WRITERS),
    "near": Kind("near"),
    "chains": Kind("chains"),
    "unlikely": Kind(writers=WRITERS, unlikely=32),
}


@dataclass(frozen=True)
class World:
    """The supervised model and the data of one seed. The parts of the data share no problem."""

    reference: LlamaForCausalLM
    supervised_loss: list[float]  # one per step
    train: Preferences
    probe: Preferences
    validation: Tensor  # problems
    test: Tensor  # problems


def make_world(kind: Kind, seed: int, size: Size, *, path: str = "linear", progress: bool = False) -> World:
    """Make a world. The result depends only on the arguments, as long as PyTorch runs on one thread.

    Worlds of one task and seed that differ only in their annotator have the same problems, reference and responses.
    """
    task = TASKS[kind.task]
    generator = torch.Generator().manual_seed(seed)
    parts = [size.taught, size.rewarded, size.probed, size.validated, size.tested]
    taught, rewarded, probed, validation, test = task.draw(sum(parts), generator).split(parts)
    reference, losses = taught_model(kind.task, seed, size.hidden_size, task.target_loss, taught, progress)
    noise = torch.Generator().manual_seed(seed + 77)

    def scored(problems: Tensor) -> Preferences:
        prompts, length = task.prompts(problems), task.answers(problems).shape[1]
        if kind.writers:
            models = [
                taught_model(kind.task, seed + 10_000 * i, size.hidden_size, target, taught, progress)[0]
                for i, target in enumerate(kind.writers, start=1)
            ]
            responses = torch.cat([sample(model, prompts, 1, length, generator).tokens for model in models], dim=1)
        else:
            responses = sample(reference, prompts, size.responses, length, generator).tokens
        scores = kind.annotator(task.rewards(problems, responses), responses, noise)
        return prefer(reference, task, problems, responses, scores, path)

    train, probe = scored(rewarded), scored(probed)
    if kind.unlikely is not None:
        train = train.at(_unlikely(train)[: kind.unlikely])
    return World(reference, losses, train, probe, validation, test)


def _unlikely(train: Preferences) -> Tensor:
    """The prompts whose responses all differ and are unlikely under the reference."""
    tokens = train.tokens
    same = (tokens[:, :, None] == tokens[:, None, :]).all(-1).sum((1, 2)) > tokens.shape[1]
    return (~same & (train.ref_logps.exp() <= 0.2).all(1)).nonzero()[:, 0]


# Worlds that differ only in their annotator follow each other, and training the model takes longer than a run.
@lru_cache(maxsize=8)
def _taught(
    task: str, seed: int, hidden_size: int, target: float, taught: _Problems, progress: bool
) -> tuple[LlamaForCausalLM, list[float]]:
    model = build_model(seed, hidden_size)
    return model, teach(model, TASKS[task], taught.values, batch_size=64, target=target, progress=progress)


class _Problems:
    """Makes problems usable as a key of a cache."""

    def __init__(self, values: Tensor):
        self.values = values
        self._key = (tuple(values.shape), hash(values.numpy().tobytes()))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Problems) and self._key == other._key


def taught_model(
    task: str, seed: int, hidden_size: int, target: float, taught: Tensor, progress: bool
) -> tuple[LlamaForCausalLM, list[float]]:
    """A model trained on ``taught`` to the loss ``target``, and its losses. The model is cached and shared: do not train it."""
    return _taught(task, seed, hidden_size, target, _Problems(taught), progress)
