"""Operators of ``token_logps`` and ``token_stats``: ``logits [..., V]`` and ``labels [...]``, already shifted.

``stats`` is ``[3, ...]`` in float32: the row's maximum of ``z``, its sum of ``exp(z - max)`` and the label's ``z``. Maximum and
sum are separate, because a log-sum-exp of 1e4 has an ulp of 1e-3 in float32, and every probability formed from it would have that
error. ``token_stats`` has a fourth number for the entropy, the sum of ``(z - max) exp(z - max)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, memory
from ..rows import RowOptions, from_stats, three_dimensional
from .library import LIBRARY, define, differentiable, fields, no_second_derivative


def _forward(logits: Tensor, labels: Tensor, stat_rows: int, options: RowOptions) -> tuple[Tensor, Tensor]:
    if options.backend != "cpu" and checks.are_read(labels):  # the cpu kernel checks the labels itself
        checks.vocabulary(labels, options.ignore_index, logits.shape[-1])
    logps, stats = _empty_results(logits, labels, stat_rows)
    if logits.ndim == 3:
        options.forward(logits, labels.contiguous(), logps, stats)
    else:
        rows = three_dimensional(logits)
        shape = rows.shape[:2]
        options.forward(rows, labels.reshape(shape).contiguous(), logps.view(shape), stats.view(stat_rows, *shape))
    return logps, stats


def _empty_results(logits: Tensor, labels: Tensor, stat_rows: int) -> tuple[Tensor, Tensor]:
    logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    return logps, torch.empty((stat_rows, *labels.shape), dtype=torch.float32, device=logits.device)


# --- token_logps -----------------------------------------------------------------------------------------------------


@define(f"token_logps(Tensor logits, Tensor labels, bool inplace_backward, {fields(RowOptions)}) -> (Tensor logps, Tensor stats)")
def _token_logps(logits: Tensor, labels: Tensor, inplace_backward: bool, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward(logits, labels, 3, RowOptions(*options))


@torch.library.register_fake("nca_kernels::token_logps", lib=LIBRARY)
def _token_logps_fake(logits: Tensor, labels: Tensor, inplace_backward: bool, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(logits, labels, 3)


def _token_logps_setup(ctx: Any, variables: tuple, constants: tuple, output: tuple) -> None:
    labels, ctx.inplace_backward, *options = constants
    ctx.options = RowOptions(*options)
    ctx.save_for_backward(*variables, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _token_logps_backward(ctx: Any, dlogps: Tensor | None, _dstats: None) -> tuple[Tensor | None]:
    if dlogps is None:
        return (None,)
    logits, labels, stats = ctx.saved_tensors
    if not ctx.inplace_backward:
        return (token_logps_bwd(dlogps, None, None, logits, labels, stats, *ctx.options),)
    if torch.is_grad_enabled():
        no_second_derivative()
    # If another operator saved these logits, PyTorch's version error is right, not a wrong gradient.
    torch.autograd.graph.increment_version(logits)
    if not memory.may_be_overwritten(logits, ctx):
        return (token_logps_bwd(dlogps, None, None, logits, labels, stats, *ctx.options),)
    dlogits = logits.detach()
    _write_dlogits(dlogps, None, None, dlogits, labels, stats, dlogits, ctx.options)
    return (dlogits,)


token_logps = differentiable(_token_logps, 1, _token_logps_setup, _token_logps_backward)


# --- token_stats -----------------------------------------------------------------------------------------------------


@define(
    f"token_stats(Tensor logits, Tensor labels, bool entropy_gradient, {fields(RowOptions)}) "
    "-> (Tensor logps, Tensor entropy, Tensor lse, Tensor top1, Tensor stats)"
)
def _token_stats(logits: Tensor, labels: Tensor, entropy_gradient: bool, *options: Any) -> tuple[Tensor, ...]:
    rows = RowOptions(*options)
    logps, stats = _forward(logits, labels, 4, rows)
    return logps, *from_stats(logps, stats, labels == rows.ignore_index), stats


@torch.library.register_fake("nca_kernels::token_stats", lib=LIBRARY)
def _token_stats_fake(logits: Tensor, labels: Tensor, entropy_gradient: bool, *options: Any) -> tuple[Tensor, ...]:
    logps, stats = _empty_results(logits, labels, 4)
    top1 = torch.empty_like(logps, dtype=torch.bool)
    return logps, torch.empty_like(logps), torch.empty_like(logps), top1, stats


def _token_stats_setup(ctx: Any, variables: tuple, constants: tuple, output: tuple) -> None:
    labels, entropy_gradient, *options = constants
    _, entropy, _, top1, stats = output
    ctx.options = RowOptions(*options)
    ctx.save_for_backward(*variables, labels, stats)
    ctx.mark_non_differentiable(*(() if entropy_gradient else (entropy,)), top1, stats)
    ctx.set_materialize_grads(False)


def _token_stats_backward(
    ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None]:
    if dlogps is None and dentropy is None and dlse is None:
        return (None,)
    logits, labels, stats = ctx.saved_tensors
    dlogps = torch.zeros_like(stats[0]) if dlogps is None else dlogps
    return (token_logps_bwd(dlogps, dlse, dentropy, logits, labels, stats, *ctx.options),)


token_stats = differentiable(_token_stats, 1, _token_stats_setup, _token_stats_backward)


# --- the gradient of both --------------------------------------------------------------------------------------------


@define(
    "token_logps_bwd(Tensor dlogps, Tensor? dlse, Tensor? dentropy, Tensor logits, Tensor labels, Tensor stats, "
    f"{fields(RowOptions)}) -> Tensor dlogits"
)
def _token_logps_bwd(
    dlogps: Tensor, dlse: Tensor | None, dentropy: Tensor | None, logits: Tensor, labels: Tensor, stats: Tensor, *options: Any
) -> Tensor:
    dlogits = memory.empty(logits.shape, logits.dtype, logits.device)
    _write_dlogits(dlogps, dlse, dentropy, logits, labels, stats, dlogits, RowOptions(*options))
    return dlogits


@torch.library.register_fake("nca_kernels::token_logps_bwd", lib=LIBRARY)
def _token_logps_bwd_fake(
    dlogps: Tensor, dlse: Tensor | None, dentropy: Tensor | None, logits: Tensor, labels: Tensor, stats: Tensor, *options: Any
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _write_dlogits(
    dlogps: Tensor,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    dlogits: Tensor,
    options: RowOptions,
) -> None:
    if logits.ndim != 3:
        logits, dlogits = three_dimensional(logits), three_dimensional(dlogits)
        shape = logits.shape[:2]
        dlogps, labels, stats = dlogps.reshape(shape), labels.reshape(shape), stats.view(len(stats), *shape)
        dlse, dentropy = (g if g is None else g.reshape(shape) for g in (dlse, dentropy))
    options.backward(
        dlogps.contiguous(),
        logits,
        labels.contiguous(),
        stats,
        dlogits,
        dlse=None if dlse is None else dlse.contiguous(),
        dentropy=None if dentropy is None else dentropy.contiguous(),
    )


token_logps_bwd = differentiable(_token_logps_bwd, 4, lambda *_: None, no_second_derivative)
