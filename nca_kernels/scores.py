"""The order of a prompt's responses by their scores: the best-scored ones, and the pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def best_scored(scores: Tensor, mask: Tensor) -> Tensor:
    """The valid responses with the highest score, ties included: bool ``[B, K]``."""
    valid = torch.where(mask, scores, -torch.inf)  # floating, also for integer scores
    return mask & (valid == valid.amax(-1, keepdim=True))


def score_pairs(scores: Tensor, mask: Tensor, pairs: str) -> Tensor:
    """Whether ``(i, j)`` is a pair: bool ``[B, K, K]``.

    A pair has two valid responses with ``s_i > s_j``; for ``"best_vs_rest"``, ``i`` is also among the best-scored.
    """
    better = (scores.unsqueeze(2) > scores.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)
    return better & best_scored(scores, mask).unsqueeze(2) if pairs == "best_vs_rest" else better
