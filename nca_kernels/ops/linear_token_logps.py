"""Operators of the functions on hidden states: ``hidden [M, D]``, ``weight [V, D]``, ``bias [V]``, ``labels [M]``.

In mode "frozen" (only ``hidden`` needs a gradient, and ``skip_mass`` is 0) forward computes the derivatives ``u`` and ``w``,
which backward scales. In mode "trained" backward takes the logits from ``kept`` or computes them again. ``indices`` and
``number`` say which rows have a label (:class:`nca_kernels.linear.Rows`), ``order`` and ``stays`` which slices backward computes
(:class:`nca_kernels.skipping.Forward`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, linear, memory, skipping, tiles
from ..linear_head import Head, Settings, Upstream
from ..slices import logps_of
from .library import LIBRARY, define, differentiable, fields, no_second_derivative


class Saved(NamedTuple):
    """The last outputs of the forward operators: what backward needs in addition to their inputs."""

    stats: Tensor
    u: Tensor
    w: Tensor
    kept: Tensor
    indices: Tensor
    number: Tensor
    order: Tensor  # as stays, empty unless backward leaves out slices (nca_kernels.skipping)
    stays: Tensor


def run_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: Settings, stat_rows: int, with_entropy: bool
) -> Saved:
    """The forward pass of both operators."""
    if checks.are_read(labels):
        checks.vocabulary(labels, settings.ignore_index, settings.vocab_total)
    rows = linear.labelled_rows(labels, settings.ignore_index)
    kept = memory.empty((_room_for_logits(hidden, weight, settings),), settings.logits_dtype, hidden.device)
    head = Head(weight, bias, settings)
    indices = rows.indices if settings.mode == "trained" else labels.new_empty(0)
    if skipping.is_used(settings):
        stats, order, stays = skipping.forward(head, hidden, labels, rows, kept, stat_rows)
        u, w = stats.new_empty(0, hidden.shape[1]), stats.new_empty(0, hidden.shape[1])
        return Saved(stats, u, w, kept, indices, rows.number, order, stays)
    passed = linear.forward(head, hidden, labels, rows, kept, stat_rows, with_entropy)
    return Saved(*passed, kept, indices, rows.number, labels.new_empty(0), labels.new_empty((0, 0), dtype=torch.bool))


def fake_forward(hidden: Tensor, weight: Tensor, labels: Tensor, settings: Settings, stat_rows: int, with_entropy: bool) -> Saved:
    """The shapes that :func:`run_forward` returns."""
    M, D = hidden.shape
    frozen = settings.mode == "frozen"
    shapes = (stat_rows, M), (M if frozen else 0, D), (M if frozen and with_entropy else 0, D)
    stats, u, w = (hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)
    indices = torch.empty_like(labels) if settings.mode == "trained" else labels.new_empty(0)
    kept = hidden.new_empty(_room_for_logits(hidden, weight, settings), dtype=settings.logits_dtype)
    V = weight.shape[0] if skipping.is_used(settings) else 0
    order = labels.new_empty(V)
    stays = labels.new_empty(skipping.stays_shape(M, V) if V else (0, 0), dtype=torch.bool)
    return Saved(stats, u, w, kept, indices, torch.empty(1, dtype=torch.int64), order, stays)


def _room_for_logits(hidden: Tensor, weight: Tensor, settings: Settings) -> int:
    """The number of logits that are kept; 0 unless the head is trained and ``save_budget`` is above 0."""
    if settings.mode != "trained" or settings.save_budget == 0:
        return 0
    return tiles.stored_elements(hidden.shape[0], weight.shape[0], settings.save_budget, settings.logits_dtype)


@define(
    f"linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {fields(Settings)}) "
    f"-> (Tensor logps, {fields(Saved)})"
)
def _linear_token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    settings = Settings(*arguments)
    saved = run_forward(hidden, weight, bias, labels, settings, stat_rows=3, with_entropy=False)
    return logps_of(saved.stats), *saved


@torch.library.register_fake("nca_kernels::linear_token_logps", lib=LIBRARY)
def _linear_token_logps_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    saved = fake_forward(hidden, weight, labels, Settings(*arguments), stat_rows=3, with_entropy=False)
    return torch.empty_like(labels, dtype=torch.float32), *saved


# --- backward --------------------------------------------------------------------------------------------------------

_UPSTREAM = "Tensor? dlogps, Tensor? dlse, Tensor? dentropy"


def _upstream(dlogps: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None, labels: Tensor) -> Upstream:
    dlogps = torch.zeros_like(labels, dtype=torch.float32) if dlogps is None else dlogps.contiguous()
    return Upstream(dlogps, *(None if gradient is None else gradient.contiguous() for gradient in (dlse, dentropy)))


@define(
    f"linear_trained_bwd({_UPSTREAM}, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {fields(Saved)}, bool[] needs, "
    f"{fields(Settings)}) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
def linear_trained_bwd(
    dlogps: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    saved, needs, settings = _unpacked(arguments)
    upstream = _upstream(dlogps, dlse, dentropy, labels)
    rows = linear.Rows(saved.indices, saved.number)
    head = Head(weight, bias, settings)
    if skipping.is_used(settings):
        chosen = saved.order, saved.stays
        return skipping.backward(head, upstream, hidden, labels, saved.stats, rows, saved.kept, *chosen, needs)
    return linear.backward(head, upstream, hidden, labels, saved.stats, rows, saved.kept, needs)


def _unpacked(arguments: tuple[Any, ...]) -> tuple[Saved, Any, Settings]:
    end = len(Saved._fields)
    return Saved(*arguments[:end]), arguments[end], Settings(*arguments[end + 1 :])


@torch.library.register_fake("nca_kernels::linear_trained_bwd", lib=LIBRARY)
def _linear_trained_bwd_fake(
    dlogps: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    _, needs, _ = _unpacked(arguments)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


@define(
    f"linear_frozen_bwd({_UPSTREAM}, Tensor? weight, Tensor labels, Tensor stats, Tensor u, Tensor w, ScalarType dtype, "
    f"{fields(Settings)}) -> Tensor dhidden"
)
def linear_frozen_bwd(
    dlogps: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    weight: Tensor | None,
    labels: Tensor,
    stats: Tensor,
    u: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    *arguments: Any,
) -> Tensor:
    upstream = _upstream(dlogps, dlse, dentropy, labels)
    return linear.frozen_backward(weight, Settings(*arguments), upstream, labels, stats, u, w, dtype)


@torch.library.register_fake("nca_kernels::linear_frozen_bwd", lib=LIBRARY)
def _linear_frozen_bwd_fake(
    dlogps: Tensor | None,
    dlse: Tensor | None,
    dentropy: Tensor | None,
    weight: Tensor | None,
    labels: Tensor,
    stats: Tensor,
    u: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    *arguments: Any,
) -> Tensor:
    return torch.empty_like(u, dtype=dtype)


def save(ctx: Any, variables: tuple[Any, ...], labels: Tensor, settings: Settings, saved: Saved, needs_weight: bool) -> None:
    """Save what backward needs; for a frozen head ``u`` and ``w`` take the place of the hidden states."""
    hidden, weight, bias = variables
    ctx.settings, ctx.dtype = settings, hidden.dtype
    frozen = settings.mode == "frozen"
    ctx.save_for_backward(
        *(None, weight if needs_weight else None, None) if frozen else (hidden, weight, bias),
        labels,
        *saved,
    )
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, dlogps: Tensor | None, dlse: Tensor | None = None, dentropy: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dhidden``, ``dweight`` and ``dbias``; ``None`` for one that is not needed."""
    upstream = (dlogps, dlse, dentropy)
    if all(gradient is None for gradient in upstream):
        return None, None, None
    if torch.is_grad_enabled():
        no_second_derivative()
    hidden, weight, bias, labels, *saved = ctx.saved_tensors
    if ctx.settings.mode == "frozen":
        stats, u, w = saved[:3]
        return linear_frozen_bwd(*upstream, weight, labels, stats, u, w, ctx.dtype, *ctx.settings), None, None
    needs = list(ctx.needs_input_grad[1:])
    results = linear_trained_bwd(*upstream, hidden, weight, bias, labels, *saved, needs, *ctx.settings)
    dhidden, dweight, dbias = (result if need else None for result, need in zip(results, needs, strict=True))
    return dhidden, dweight, dbias


def _linear_token_logps_setup(ctx: Any, variables: tuple[Any, ...], constants: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    labels, *arguments = constants
    saved = Saved(*output[1:])
    save(ctx, variables, labels, Settings(*arguments), saved, needs_weight=False)
    ctx.mark_non_differentiable(*saved)


def _linear_token_logps_backward(ctx: Any, dlogps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return gradients(ctx, dlogps)


linear_token_logps = differentiable(_linear_token_logps, 3, _linear_token_logps_setup, _linear_token_logps_backward)
