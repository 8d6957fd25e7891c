"""The public functions of hidden states and a head: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops, parallel, reference
from .dispatch import resolve
from .functional import check_rows, check_vocabulary, over_sequences
from .linear_head import Settings
from .segments import shift_labels


def linear_token_logps(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    shift: int = 0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    save_budget: int = 0,
    tp_group=None,
    backend: str | None = None,
) -> Tensor:
    r"""The log-probability of each label from hidden states and the head: :func:`token_logps` of
    ``logits = hidden @ weight.T + bias``, which are never held as ``[N, T, V]``.

    In units of the one GEMM: 1 without a gradient, 2 where only ``hidden`` needs one (the head is frozen), 4 where the head
    is trained, down to 3 as ``save_budget`` grows. Ignored positions cost no arithmetic.

    Args:
        hidden: ``[N, T, D]`` or ``[M, D]``, any leading dimensions; float32, bfloat16 or float16 (float64 on
            ``backend="torch"``, which holds the logits). Gets a gradient.
        weight: ``[V, D]``, the dtype of ``hidden``, as ``lm_head.weight``. Gets a gradient, summed over tiles in float32.
        labels, shift, ignore_index, scale, softcap, backend: as in :func:`token_logps`.
        bias: ``[V]``, the dtype of ``hidden``. Gets a gradient.
        save_budget: bytes of logits tiles that a trained head keeps from forward instead of computing them again.
        tp_group: the process group of a vocabulary-parallel head; ``weight`` and ``bias`` are then this rank's rows (slices may
            be uneven), ``hidden`` and ``labels`` the same on every rank. A ``DTensor`` weight sharded on dim 0 names its own.

    Under autocast the GEMM runs in the autocast dtype. ``NCA_KERNELS_TILE_BYTES`` overrides the size of a tile, on which the
    result depends by rounding alone.

    Returns:
        float32 (float64 for float64 inputs), the shape of ``labels``.

    Raises:
        As :func:`token_logps`; ``ValueError`` for a ``DTensor`` placement it cannot use.

    Source: ``docs/math.md``; Chen et al. 2024 (arXiv 2402.05369) for what the log-probs are for.

    Example:
        >>> hidden, weight = torch.eye(2).unsqueeze(0), torch.zeros(4, 2)
        >>> linear_token_logps(hidden, weight, torch.tensor([[3, -100]]))
        tensor([[-1.3863,  0.0000]])
    """
    weight, bias, group = parallel.local_head(weight, bias, tp_group)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_linear(hidden, weight, bias, labels, shift, ignore_index, None, save_budget, group)
    labels = shift_labels(labels.to(torch.int64), shift, ignore_index, None)
    return _linear_token_logps(hidden, weight, bias, labels, ignore_index, scale, softcap, save_budget, group, backend)


def linear_sequence_logps(
    hidden: Tensor,  # [N, T, D], or [M, D] with cu_seqlens
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N, T], or [M]
    *,
    average: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    bias: Tensor | None = None,  # [V]
    shift: int = 0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    save_budget: int = 0,
    tp_group=None,
    backend: str | None = None,
) -> Tensor:
    r"""The log-probability of each sequence from hidden states: the sum of :func:`linear_token_logps`, or the average.

    :func:`sequence_logps` of ``logits = hidden @ weight.T + bias``, which are never held.

    Args:
        hidden, weight, labels, bias, shift, ignore_index, scale, softcap, save_budget, tp_group, backend: as in
            :func:`linear_token_logps`.
        average, cu_seqlens: as in :func:`sequence_logps`.

    Returns:
        float32 ``[N]``, or ``[S]`` with ``cu_seqlens``.

    Raises:
        As :func:`linear_token_logps`.

    Source: ``docs/math.md``.

    Example:
        >>> linear_sequence_logps(torch.zeros(1, 3, 2), torch.zeros(4, 2), torch.tensor([[3, 1, 2]]), shift=1)
        tensor([-2.7726])
    """
    checks.flag("average", average)
    weight, bias, group = parallel.local_head(weight, bias, tp_group)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_linear(hidden, weight, bias, labels, shift, ignore_index, cu_seqlens, save_budget, group)
    labels = shift_labels(labels.to(torch.int64), shift, ignore_index, cu_seqlens)
    logps = _linear_token_logps(hidden, weight, bias, labels, ignore_index, scale, softcap, save_budget, group, backend)
    return over_sequences(logps, labels, ignore_index, average, cu_seqlens)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the active autocast dtype, if there is one; float64 stays, as in autocast's own matrix products."""
    first = tensors[0]
    # "meta" has no autocast to ask for.
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_linear(hidden, weight, bias, labels, shift, ignore_index, cu_seqlens, save_budget, group) -> None:
    checks.floating("hidden", hidden)
    if hidden.ndim < 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, wanted [N, T, D] or [M, D]")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.tensor(name, value, (hidden.dtype,), f"a tensor of {hidden.dtype}, the dtype of hidden")
            checks.same_device(name, value, "hidden", hidden)
    empty = weight.shape[:1] == (0,) and not group  # a rank without rows is found out where all ranks are
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or empty:
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted [V, {hidden.shape[-1]}] with V >= 1")
    if bias is not None:
        checks.shape("bias", bias, (len(weight),), "the rows of weight")
    checks.integer_between("save_budget", save_budget, 0, checks.INT64.max, "an int >= 0, in bytes")
    check_rows(labels, hidden, "hidden", shift, ignore_index, cu_seqlens)


def _linear_token_logps(hidden, weight, bias, labels, ignore_index, scale, softcap, save_budget, group, backend) -> Tensor:
    """:func:`linear_token_logps` after its checks of shapes, for labels already shifted."""
    scale = checks.positive("scale", scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    name = resolve("linear_token_logps", backend, hidden.device, hidden.dtype)
    if name == "torch":
        if group:
            raise ValueError("tp_group: backend 'torch' has no vocabulary-parallel head; wanted None or another backend")
        check_vocabulary(labels, ignore_index, len(weight))
        return reference.linear_token_logps(
            hidden, weight, labels, bias=bias, ignore_index=ignore_index, scale=scale, softcap=softcap
        )
    vocab_start, vocab_total = parallel.slice_of(len(weight), labels, group) if group else (0, len(weight))
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    mode = "none" if not any(needs) else "trained" if any(needs[1:]) else "frozen"
    settings = Settings(ignore_index, scale, softcap, vocab_start, vocab_total, hidden.dtype, save_budget, mode, group, name)
    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    logps, *_ = ops.linear_token_logps(rows, weight, bias, labels.reshape(-1).contiguous(), *settings)
    return logps.view(labels.shape)
