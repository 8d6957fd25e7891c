r"""Measures how close trained rewards come to the closed-form optimum of the loss on the training prompts.

If the rewards ``r`` are free, the minimum of InfoNCA is ``r_i = s_i / alpha + C`` with any C per prompt, and that of NCA is
``r_i = log(K softmax(s / alpha)_i)`` (Chen et al. 2024, arXiv 2402.05369, and ``docs/math.md``).
"""

from __future__ import annotations

import math

from torch import Tensor

from .align import Method


def fit(method: Method, scores: Tensor, rewards: Tensor) -> dict[str, float]:
    """Slope of the rewards against the optimum, and the root-mean-square deviation relative to the optimum's own spread.

    Args:
        method: a method with loss ``"nca"`` or ``"info_nca"`` and ``alpha`` > 0.
        scores: [n, K], those of the training.
        rewards: [n, K], ``beta * (logps - ref_logps)`` after training.
    """
    if method.loss == "info_nca":
        optimum = scores / method.alpha
        optimum, rewards = optimum - optimum.mean(1, keepdim=True), rewards - rewards.mean(1, keepdim=True)
    else:
        optimum = (scores / method.alpha).log_softmax(1) + math.log(scores.shape[1])
    optimum, rewards = optimum.double().flatten(), rewards.double().flatten()
    variance = optimum.var(correction=0)
    covariance = ((optimum - optimum.mean()) * (rewards - rewards.mean())).mean()
    deviation = (rewards - optimum).square().mean().sqrt() / variance.sqrt()
    return {"slope": round((covariance / variance).item(), 4), "deviation": round(deviation.item(), 4)}
