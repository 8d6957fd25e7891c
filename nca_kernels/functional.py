"""The public functions of logits: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks, ops, reference
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
    return over_sequences(logps, labels, ignore_index, average, cu_seqlens)


def _check_logits(logits, labels, shift, ignore_index, cu_seqlens) -> None:
    checks.floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits: got shape {list(logits.shape)}, wanted [N, T, V] or [M, V] with V >= 1")
    check_rows(labels, logits, "logits", shift, ignore_index, cu_seqlens)


def check_rows(labels, values, name, shift, ignore_index, cu_seqlens) -> None:
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
        check_vocabulary(labels, ignore_index, logits.shape[-1])
        return reference.token_logps(logits, labels, ignore_index=ignore_index, scale=scale, softcap=softcap)
    rows = _three_dimensional(logits)
    shape = rows.shape[:2]
    logps, _stats = ops.token_logps(rows, labels.reshape(shape).contiguous(), ignore_index, scale, softcap, inplace_backward, name)
    return logps.view(labels.shape)


def check_vocabulary(labels, ignore_index, V) -> None:
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


def over_sequences(logps, labels, ignore_index, average, cu_seqlens) -> Tensor:
    """Sum or average token log-probs over each sequence."""
    sums = sequence_sums(logps, cu_seqlens)
    if not average:
        return sums
    scored = (labels != ignore_index).to(logps.dtype)
    return sums / sequence_sums(scored, cu_seqlens).clamp(min=1)


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
