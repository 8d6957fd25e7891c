"""Annotators make the scores of training responses from their exact rewards. Evaluation always uses the exact reward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# An annotator takes rewards [n, K], responses [n, K, R] and a generator, and returns scores [n, K].
Annotator = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def exact(rewards: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """The scores are the rewards."""
    return rewards


def normal_02(rewards: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of standard deviation 0.2, less than the 0.25 between two levels of the sums' reward."""
    return rewards + _of_each_text(0.2 * _normal(rewards, generator), responses)


def normal_04(rewards: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of standard deviation 0.4."""
    return rewards + _of_each_text(0.4 * _normal(rewards, generator), responses)


def normal_08(rewards: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of standard deviation 0.8, as wide as most of the range of rewards."""
    return rewards + _of_each_text(0.8 * _normal(rewards, generator), responses)


def by_rank(rewards: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise that is larger for better responses: standard deviation 0.6 for the best of four, then 0.4, 0.2, 0.1."""
    deviations = torch.tensor([0.6, 0.4, 0.2, 0.1])
    order = rewards.argsort(dim=1, descending=True, stable=True)
    deviation = torch.zeros_like(rewards).scatter(1, order, deviations.expand_as(rewards))
    return rewards + _of_each_text(deviation * _normal(rewards, generator), responses)


def heavy_tailed(rewards: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """Student's t noise of two degrees of freedom, whose median size is that of normal noise of 0.4; its variance is infinite."""
    # A chi-squared variable of two degrees of freedom is -2 log U; 0.33 = 0.4 * 0.674 / 0.816, the ratio of the medians.
    uniform = torch.rand(rewards.shape, generator=generator).clamp(min=1e-12)
    noise = 0.33 * _normal(rewards, generator) / (-uniform.log()).sqrt()
    return rewards + _of_each_text(noise, responses)


def _normal(rewards: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rewards.shape, generator=generator)


def _of_each_text(noise: Tensor, responses: Tensor) -> Tensor:
    """Use the same noise for equal responses to one prompt, as an annotator gives equal texts the same score."""
    same = (responses[:, :, None] == responses[:, None, :]).all(-1)
    first = same.int().argmax(-1)
    return noise.gather(1, first)
