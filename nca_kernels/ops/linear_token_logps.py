"""Operators of ``linear_token_logps``: ``hidden [M, D]``, ``weight [V, D]``, ``bias [V]``, ``labels [M]``.

``mode`` is "none" (no gradient), "frozen" (only ``hidden`` gets one, made in forward as ``u [M, D]``) or "trained" (made in
backward, from the logits in ``kept`` or from new ones). ``group`` names the process group of a vocabulary-parallel head, "" for
none.
"""

from __future__ import annotations

import torch

from .. import checks, linear
from ..backends import BACKENDS
from .library import LIBRARY, define, differentiable, no_second_derivative


def _head(weight, bias, vocab_start, vocab_total, ignore_index, scale, softcap, backend) -> linear.Head:
    return linear.Head(weight, bias, BACKENDS[backend], ignore_index, scale, softcap, vocab_start, vocab_total)


@define(
    "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int vocab_start, int vocab_total, "
    "int ignore_index, float scale, float? softcap, int save_budget, str mode, str group, str backend) "
    "-> (Tensor logps, Tensor stats, Tensor u, Tensor kept)"
)
def _linear_token_logps(
    hidden,
    weight,
    bias,
    labels,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    save_budget,
    mode,
    group,
    backend,
):
    if checks.are_read(labels):
        checks.vocabulary(labels, ignore_index, vocab_total)
    head = _head(weight, bias, vocab_start, vocab_total, ignore_index, scale, softcap, backend)
    kept = hidden.new_empty(_kept_elements(hidden, weight, save_budget, mode))
    return *linear.forward(head, hidden, labels, kept, mode == "frozen", group), kept


def _kept_elements(hidden, weight, save_budget, mode) -> int:
    """Room for logits, and for one number that says whether they are there."""
    room = min(save_budget // hidden.dtype.itemsize, len(hidden) * len(weight)) if mode == "trained" else 0
    return room + 1 if room else 0


@torch.library.register_fake("nca_kernels::linear_token_logps", lib=LIBRARY)
def _linear_token_logps_fake(
    hidden,
    weight,
    bias,
    labels,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    save_budget,
    mode,
    group,
    backend,
):
    M, D = hidden.shape
    u = hidden.new_empty((M if mode == "frozen" else 0, D), dtype=torch.float32 if group else hidden.dtype)
    logps, stats = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((M,), (3, M)))
    return logps, stats, u, hidden.new_empty(_kept_elements(hidden, weight, save_budget, mode))


@define(
    "linear_token_logps_bwd(Tensor dlogps, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor stats, Tensor kept, "
    "bool[] needs, int vocab_start, int vocab_total, int ignore_index, float scale, float? softcap, str group, str backend) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
def linear_token_logps_bwd(
    dlogps,
    hidden,
    weight,
    bias,
    labels,
    stats,
    kept,
    needs,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    group,
    backend,
):
    head = _head(weight, bias, vocab_start, vocab_total, ignore_index, scale, softcap, backend)
    return linear.backward(head, dlogps.contiguous(), hidden, labels, stats, kept, needs, group)


@torch.library.register_fake("nca_kernels::linear_token_logps_bwd", lib=LIBRARY)
def _linear_token_logps_bwd_fake(
    dlogps,
    hidden,
    weight,
    bias,
    labels,
    stats,
    kept,
    needs,
    vocab_start,
    vocab_total,
    ignore_index,
    scale,
    softcap,
    group,
    backend,
):
    shapes = (hidden.shape, weight.shape, (len(weight),))
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


@define(
    "linear_frozen_bwd(Tensor dlogps, Tensor labels, Tensor u, int ignore_index, ScalarType dtype, str group) -> Tensor dhidden"
)
def linear_frozen_bwd(dlogps, labels, u, ignore_index, dtype, group):
    return linear.frozen_backward(dlogps, labels, u, ignore_index, dtype, group)


@torch.library.register_fake("nca_kernels::linear_frozen_bwd", lib=LIBRARY)
def _linear_frozen_bwd_fake(dlogps, labels, u, ignore_index, dtype, group):
    return u.new_empty(u.shape, dtype=dtype)


def _linear_setup(ctx, variables, constants, output):
    hidden, weight, bias = variables
    labels, *ctx.settings = constants
    _, stats, u, kept = output
    ctx.dtype = hidden.dtype
    # With the head frozen, u takes the place of the hidden states.
    ctx.save_for_backward(*((labels, u) if ctx.settings[6] == "frozen" else (hidden, weight, bias, labels, stats, kept)))
    ctx.mark_non_differentiable(stats, u, kept)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, dlogps, *_):
    if dlogps is None:
        return None, None, None
    if torch.is_grad_enabled():
        no_second_derivative()
    vocab_start, vocab_total, ignore_index, scale, softcap, _, mode, group, backend = ctx.settings
    if mode == "frozen":
        labels, u = ctx.saved_tensors
        return linear_frozen_bwd(dlogps, labels, u, ignore_index, ctx.dtype, group), None, None
    hidden, weight, bias, labels, stats, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:])
    gradients = linear_token_logps_bwd(
        dlogps, hidden, weight, bias, labels, stats, kept, needs,
        vocab_start, vocab_total, ignore_index, scale, softcap, group, backend,
    )  # fmt: skip
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


linear_token_logps = differentiable(_linear_token_logps, 3, _linear_setup, _linear_backward)
