"""The operator of ``linear_token_stats``: as that of ``linear_token_logps``, with four statistics of a row and not three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear_head import Settings
from ..rows import from_stats
from ..slices import logps_of
from .library import LIBRARY, define, differentiable, fields
from .linear_token_logps import Saved, fake_forward, gradients, run_forward, save


@define(
    "linear_token_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, bool entropy_gradient, "
    f"{fields(Settings)}) -> (Tensor logps, Tensor entropy, Tensor lse, Tensor top1, {fields(Saved)})"
)
def _linear_token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, entropy_gradient: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    settings = Settings(*arguments)
    saved = run_forward(hidden, weight, bias, labels, settings, stat_rows=4, with_entropy=entropy_gradient)
    logps = logps_of(saved.stats)
    return logps, *from_stats(logps, saved.stats, labels == settings.ignore_index), *saved


@torch.library.register_fake("nca_kernels::linear_token_stats", lib=LIBRARY)
def _linear_token_stats_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, entropy_gradient: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    saved = fake_forward(hidden, weight, labels, Settings(*arguments), stat_rows=4, with_entropy=entropy_gradient)
    dtypes = (torch.float32, torch.float32, torch.float32, torch.bool)
    return *(torch.empty_like(labels, dtype=dtype) for dtype in dtypes), *saved


def _linear_token_stats_setup(ctx: Any, variables: tuple, constants: tuple, output: tuple[Tensor, ...]) -> None:
    labels, entropy_gradient, *arguments = constants
    _, entropy, _, top1, *saved = output
    save(ctx, variables, labels, Settings(*arguments), Saved(*saved), needs_weight=True)
    ctx.mark_non_differentiable(*(() if entropy_gradient else (entropy,)), top1, *saved)


def _linear_token_stats_backward(
    ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    return gradients(ctx, dlogps, dlse, dentropy)


linear_token_stats = differentiable(_linear_token_stats, 3, _linear_token_stats_setup, _linear_token_stats_backward)
