"""The public log-prob functions: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks, ops, parallel, reference
from .dispatch import layout_obstacle, resolve
from .segments import sequence_sums, shift_labels


def token_logps(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    shift: int = 0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The log-probability of each label under its row of logits, in one read of the logits.

    ``logp[t] = z[t, labels[t + shift]] - log sum_v exp(z[t, v])`` with ``z = scale * logits``, then
    ``z = softcap * tanh(z / softcap)`` if ``softcap`` is given.

    Args:
        logits: ``[N, T, V]`` or ``[M, V]``, any leading dimensions; float32, bfloat16 or float16 (float64 on
            ``backend="torch"``). Rows may have any stride; they are never copied. ``-inf`` (masked vocabulary) is legal;
            NaN makes that row's result NaN and no other's. Gets a gradient, in its own dtype.
        labels: token ids, int64 or int32, the shape of ``logits`` without its last dimension.
        shift: score ``labels[:, t + shift]`` with ``logits[:, t]``; 1 is the Hugging Face convention. The last ``shift``
            positions of a row have no label and count as ignored. ``[M, V]`` takes 0 only.
        ignore_index: positions with this label are not read: log-prob 0, gradient 0.
        scale: factor of the logits, > 0; a temperature ``t`` is ``scale = 1 / t``.
        softcap: > 0, or ``None`` for none.
        inplace_backward: the gradient overwrites the storage of ``logits``, which halves the peak memory. Whatever else
            needs them for a backward of its own (another call, a ``tanh`` that made them) gets PyTorch's error on tensors
            modified in place. ``backend="torch"`` does not overwrite.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"torch"``; ``None`` takes the first that can (:func:`explain`).

    Returns:
        float32 (float64 for float64 logits), the shape of ``labels``; position ``t`` is that of the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a label outside ``[0, V)`` that is not ``ignore_index``, on the CPU. On a GPU, where looking would cost
            a sync (and in a compiled graph of ``backend="torch"``), that row's log-prob and gradient are NaN;
            ``NCA_KERNELS_CHECK=1`` turns that into the error.
        RuntimeError: the named backend cannot run, with every reason.
        NotImplementedError: second derivatives and ``torch.func`` transforms but ``vmap``, except on ``backend="torch"``.

    Source: log-probs enter the losses through r = beta * (logp - ref_logp), Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 1.0986123]]], requires_grad=True)
        >>> logps = token_logps(logits, torch.tensor([[1, -100]]))
        >>> logps
        tensor([[-0.6931,  0.0000]], grad_fn=<...>)
        >>> logps.sum().backward(); logits.grad
        tensor([[[-0.5000,  0.5000],
                 [ 0.0000,  0.0000]]])
    """
    _check_logits(logits, labels, shift, ignore_index, None)
    labels = shift_labels(labels.to(torch.int64), shift, ignore_index, None)
    return _token_logps(logits, labels, ignore_index, scale, softcap, inplace_backward, backend)


def sequence_logps(
    logits: Tensor,  # [N, T, V], or [M, V] with cu_seqlens
    labels: Tensor,  # [N, T], or [M]
    *,
    average: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    shift: int = 0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The log-probability of each sequence: the sum of its tokens' (:func:`token_logps`), or their average.

    ``logp = sum over t of log softmax(z[t])[labels[t + shift]]`` over the positions with a label, with the z of
    :func:`token_logps`; ``average=True`` divides by their number.

    Args:
        logits: ``[N, T, V]``, any leading dimensions, or ``[M, V]`` with ``cu_seqlens``. Gets a gradient.
        labels, shift, ignore_index, scale, softcap, inplace_backward, backend: as in :func:`token_logps`.
        average: divide by the number of scored tokens of the sequence; one with none gives 0.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to ``M``: the bounds of sequences packed into one row
            ``[M, V]`` or ``[1, M, V]``. ``shift`` then stays inside each of them. Its values are checked where that costs
            no sync: on the CPU, or under ``NCA_KERNELS_CHECK=1``. Elsewhere nothing outside of the row is read.

    Returns:
        float32 ``[N]`` (the leading shape without the last dimension), or ``[S]`` with ``cu_seqlens``.

    Raises:
        As :func:`token_logps`; in a compiled graph ``RuntimeError`` for bounds that do not rise from 0 to ``M`` (not with
        PyTorch 2.6, which drops the check).

    Source: the log pi(y|x) of Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> logits = torch.zeros(2, 3, 4)
        >>> labels = torch.tensor([[3, 1, 2], [0, 1, -100]])
        >>> sequence_logps(logits, labels, shift=1)
        tensor([-2.7726, -1.3863])
        >>> sequence_logps(logits, labels, shift=1, average=True)
        tensor([-1.3863, -1.3863])
    """
    checks.flag("average", average)
    _check_logits(logits, labels, shift, ignore_index, cu_seqlens)
    labels = shift_labels(labels.to(torch.int64), shift, ignore_index, cu_seqlens)
    logps = _token_logps(logits, labels, ignore_index, scale, softcap, inplace_backward, backend)
    return _over_sequences(logps, labels, ignore_index, average, cu_seqlens)


def _check_logits(logits, labels, shift, ignore_index, cu_seqlens) -> None:
    checks.floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits: got shape {list(logits.shape)}, wanted [N, T, V] or [M, V] with V >= 1")
    _check_rows(labels, logits, "logits", shift, ignore_index, cu_seqlens)


def _check_rows(labels, values, name, shift, ignore_index, cu_seqlens) -> None:
    """What the functions of logits and of hidden states (``values``) ask of labels and segment bounds alike."""
    checks.rows(labels, tuple(values.shape[:-1]), name, shift, cu_seqlens)
    checks.same_device("labels", labels, name, values)
    checks.integer_between("ignore_index", ignore_index, checks.INT64.min, checks.INT64.max, "an int of 64 bits")
    if cu_seqlens is not None and checks.are_read(cu_seqlens):
        checks.segment_bounds(cu_seqlens, labels.numel())


def _token_logps(logits, labels, ignore_index, scale, softcap, inplace_backward, backend) -> Tensor:
    """:func:`token_logps` after its checks of shapes, for labels already shifted."""
    scale = checks.positive("scale", scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    checks.flag("inplace_backward", inplace_backward)
    if inplace_backward and any(n > 1 and stride == 0 for n, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"inplace_backward: logits of shape {list(logits.shape)} has strides {list(logits.stride())}, one row for several "
            "positions; wanted a row for each gradient, or inplace_backward=False"
        )
    name = resolve("token_logps", backend, logits.device, logits.dtype, obstacle=layout_obstacle(logits))
    if name == "torch":
        _check_vocabulary(labels, ignore_index, logits.shape[-1])
        return reference.token_logps(logits, labels, ignore_index=ignore_index, scale=scale, softcap=softcap)
    rows = _three_dimensional(logits)
    shape = rows.shape[:2]
    logps, _stats = ops.token_logps(rows, labels.reshape(shape).contiguous(), ignore_index, scale, softcap, inplace_backward, name)
    return logps.view(labels.shape)


def _check_vocabulary(labels, ignore_index, V) -> None:
    """What the operators of the kernels do themselves, for the backend that has no operator."""
    if not torch.compiler.is_compiling() and checks.are_read(labels):
        checks.vocabulary(labels, ignore_index, V)


def _three_dimensional(logits: Tensor) -> Tensor:
    """``logits`` as ``[N, T, V]``, a view: the kernels take any two row strides, so only 4 and more dimensions can fail."""
    if logits.ndim == 2:
        return logits.unsqueeze(0)
    try:
        return logits.view(math.prod(logits.shape[:-2]), *logits.shape[-2:]) if logits.ndim > 3 else logits
    except RuntimeError:
        raise ValueError(
            f"logits: shape {list(logits.shape)} with strides {list(logits.stride())} is no view of [N, T, V]; wanted "
            "leading dimensions that collapse without a copy"
        ) from None


def _over_sequences(logps, labels, ignore_index, average, cu_seqlens) -> Tensor:
    """Sum or average token log-probs over each sequence."""
    sums = sequence_sums(logps, cu_seqlens)
    if not average:
        return sums
    scored = (labels != ignore_index).to(logps.dtype)
    return sums / sequence_sums(scored, cu_seqlens).clamp(min=1)


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
    return _over_sequences(logps, labels, ignore_index, average, cu_seqlens)


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
    _check_rows(labels, hidden, "hidden", shift, ignore_index, cu_seqlens)


def _linear_token_logps(hidden, weight, bias, labels, ignore_index, scale, softcap, save_budget, group, backend) -> Tensor:
    """:func:`linear_token_logps` after its checks of shapes, for labels already shifted."""
    scale = checks.positive("scale", scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    name = resolve("linear_token_logps", backend, hidden.device, hidden.dtype)
    if name == "torch":
        if group:
            raise ValueError("tp_group: backend 'torch' has no vocabulary-parallel head; wanted None or another backend")
        _check_vocabulary(labels, ignore_index, len(weight))
        return reference.linear_token_logps(
            hidden, weight, labels, bias=bias, ignore_index=ignore_index, scale=scale, softcap=softcap
        )
    vocab_start, vocab_total = parallel.slice_of(len(weight), labels, group) if group else (0, len(weight))
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    mode = "none" if not any(needs) else "trained" if any(needs[1:]) else "frozen"
    logps, *_ = ops.linear_token_logps(
        hidden.reshape(labels.numel(), hidden.shape[-1]), weight, bias, labels.reshape(-1).contiguous(), vocab_start, vocab_total,
        ignore_index, scale, softcap, save_budget, mode, group, name,
    )  # fmt: skip
    return logps.view(labels.shape)


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    r"""``logits.div(temperature).log_softmax(-1).gather(-1, index)``, with TRL's name, signature and result.

    Args:
        logits: ``[..., V]``; float32, bfloat16, float16 or float64. Gets a gradient.
        index: token ids, int64, ``[...]`` or, for ``K`` of them a row, ``[..., K]`` (each reads the logits once).
        temperature: > 0.
        row_mask: the shape of ``index``; where it is zero the row is not read and the result is 0.

    Returns:
        The log-probs in the shape of ``index`` and the dtype of ``logits``.

    Raises:
        As :func:`token_logps`.

    Source: ``trl.trainer.utils.selective_log_softmax`` (TRL 1.16).

    Example:
        >>> selective_log_softmax(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]))
        tensor([[-1.3863, -1.3863]])
    """
    checks.floating("logits", logits)
    checks.integer("index", index)
    if row_mask is not None:
        if not isinstance(row_mask, Tensor):
            raise TypeError(f"row_mask: got {type(row_mask).__name__}, wanted a tensor")
        checks.shape("row_mask", row_mask, tuple(index.shape), "that of index")
    if index.ndim == logits.ndim:
        if index.shape[-1] == 0:
            return logits.new_empty(index.shape)
        columns = [
            selective_log_softmax(logits, column, temperature, None if row_mask is None else row_mask[..., k])
            for k, column in enumerate(index.unbind(-1))
        ]
        return torch.stack(columns, dim=-1)
    # No id can be this one: every illegal id is then an error, as in TRL.
    unread = torch.iinfo(torch.int64).min
    labels = index.to(torch.int64)
    if row_mask is not None:
        labels = labels.masked_fill(row_mask == 0, unread)
    scale = 1.0 / checks.positive("temperature", temperature)
    _check_logits(logits, labels, 0, unread, None)
    return _token_logps(logits, labels, unread, scale, None, False, None).to(logits.dtype)
