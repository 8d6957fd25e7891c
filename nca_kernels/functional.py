"""The public functions of logits: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, memory, ops, reference
from .dispatch import layout_obstacle, resolve
from .rows import RowOptions
from .segments import sequence_sums, shift_labels


class TokenStats(NamedTuple):
    """What :func:`token_stats` and :func:`linear_token_stats` return; each field has the shape of ``labels``."""

    logps: Tensor  # log-probs of the labels in nats, float32 (float64 for float64 inputs), as the next two
    entropy: Tensor  # in nats
    lse: Tensor  # log-sum-exp of the row
    top1: Tensor  # bool: the label has the row's largest logit


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
        shift: the label of ``logits[:, t]`` is ``labels[:, t + shift]``; 1 is the Hugging Face convention. The last ``shift``
            positions of a row have no label and count as ignored. ``[M, V]`` takes 0 only.
        ignore_index: positions with this label are not read: log-prob 0, gradient 0.
        scale: factor of the logits, > 0; a temperature ``t`` is ``scale = 1 / t``. For a model with a softcap ``c``, which applies
            before the temperature, pass ``scale = 1 / t, softcap = c / t``.
        softcap: > 0, or ``None`` for none.
        inplace_backward: the gradient overwrites the storage of ``logits``, which halves the peak memory. Any other operator that
            saved the logits for its backward (another call, a ``tanh`` that made them) gets PyTorch's error on tensors modified in
            place. The gradient still gets memory of its own in five cases: another tensor shares that storage (other than the one
            that ``logits`` is a view of); saved-tensor hooks (checkpointing, offloading) hold the logits for this call or for the
            operator that made them; the call is in a compiled graph; ``backend="torch"``; PyTorch is older than 2.8. Hooks must not
            keep the very tensor that they are given, which PyTorch's documentation rules out: another operator's would read the
            gradient.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; ``None`` takes the first that can run the
            call (:func:`explain`).

    Returns:
        Log-probs in nats, float32 (float64 for float64 logits), in the shape of ``labels``; position ``t`` is that of the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: a label outside ``[0, V)`` that is not ``ignore_index``, on the CPU. On a GPU, where the check would cost
            a sync, that row's log-prob and gradient are NaN; ``NCA_KERNELS_CHECK=1`` raises the error there, too. They are also NaN
            with ``backend="torch"`` in a compiled graph or under ``vmap``.
        RuntimeError: the named backend cannot run; the message has every reason.
        NotImplementedError: second derivatives, and ``torch.func`` transforms other than ``vmap``, except on
            ``backend="torch"``.

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
    rows = _row_options("token_logps", logits, ignore_index, scale, softcap, backend)
    return _token_logps(logits, labels, inplace_backward, rows)


def token_stats(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    shift: int = 0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
    backend: str | None = None,
) -> TokenStats:
    r"""The log-probability of each label, and its row's entropy, log-sum-exp and top-1 hit, in one read of the logits.

    With the ``z`` of :func:`token_logps` and ``p = softmax(z[t])``::

        logps    z[t, labels[t + shift]] - lse[t]
        entropy  - sum_v p_v log p_v, in nats
        lse      log sum_v exp(z[t, v])
        top1     z[t, labels[t + shift]] = max_v z[t, v]

    The backward reads the logits once and writes their gradient once, whichever outputs have upstream gradients.

    Args:
        logits, labels, shift, ignore_index, scale, softcap, backend: as in :func:`token_logps`. ``logits`` gets a gradient from
            ``logps`` and ``lse``, and from ``entropy`` with ``entropy_gradient``.
        entropy_gradient: if true, ``entropy`` has a gradient, ``dz_v = - p_v (log p_v + entropy)``; if false, it is detached.

    Returns:
        ``TokenStats(logps, entropy, lse, top1)``, each in the shape of ``labels``. The first three are float32 (float64 for float64
        logits), in nats; ``top1`` is bool. Ignored positions hold 0, 0, 0 and False. Where ``logps`` is NaN, ``entropy`` and
        ``lse`` are NaN, too, and ``top1`` is False.

    Raises:
        As :func:`token_logps`.

    Source: ``docs/math.md``, section 2.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 1.0986123]]])
        >>> token_stats(logits, torch.tensor([[1, 1]])).entropy
        tensor([[0.6931, 0.5623]])
        >>> token_stats(logits, torch.tensor([[-100, 1]])).top1
        tensor([[False,  True]])
    """
    checks.flag("entropy_gradient", entropy_gradient)
    _check_logits(logits, labels, shift, ignore_index, None)
    labels = shift_labels(labels.to(torch.int64), shift, ignore_index, None)
    rows = _row_options("token_stats", logits, ignore_index, scale, softcap, backend)
    if rows.backend == "torch":
        check_vocabulary(labels, ignore_index, logits.shape[-1])
        return TokenStats(*reference.token_stats(logits, labels, entropy_gradient=entropy_gradient, **rows.transformation()))
    logps, entropy, lse, top1, _stats = ops.token_stats(logits, labels, entropy_gradient, *rows)
    return TokenStats(logps, entropy, lse, top1)


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
    r"""The log-probability of each sequence: the sum, or the average, of the log-probs of its tokens (:func:`token_logps`).

    ``logp = sum over t of log softmax(z[t])[labels[t + shift]]`` over the labelled positions, with the ``z`` of
    :func:`token_logps`. ``average=True`` divides by the number of labelled positions.

    Args:
        logits: ``[N, T, V]``, any leading dimensions, or ``[M, V]`` with ``cu_seqlens``. Gets a gradient.
        labels, shift, ignore_index, scale, softcap, inplace_backward, backend: as in :func:`token_logps`.
        average: divide by the number of labelled tokens of the sequence; a sequence without any gives 0.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to ``M``: the bounds of S sequences packed into one row
            ``[M, V]`` or ``[1, M, V]``. ``shift`` then stays within each sequence. The values are checked on the CPU, and on a GPU,
            where that costs a sync, under ``NCA_KERNELS_CHECK=1``. Unchecked bounds make no kernel read outside the row.

    Returns:
        Log-probs in nats, float32 (float64 for float64 logits): ``[N]``, the shape of ``labels`` without its last dimension, or
        ``[S]`` with ``cu_seqlens``.

    Raises:
        As :func:`token_logps`. In a compiled graph, ``RuntimeError`` for bounds that do not rise from 0 to ``M`` (PyTorch 2.6
        drops this check).

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
    rows = _row_options("token_logps", logits, ignore_index, scale, softcap, backend)
    logps = _token_logps(logits, labels, inplace_backward, rows)
    return over_sequences(logps, labels, ignore_index, average, cu_seqlens)


def _check_logits(logits: Tensor, labels: Tensor, shift: int, ignore_index: int, cu_seqlens: Tensor | None) -> None:
    checks.floating("logits", logits)
    if logits.ndim < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits: got shape {list(logits.shape)}, wanted [N, T, V] or [M, V] with V >= 1")
    check_rows(labels, logits, "logits", shift, ignore_index, cu_seqlens)


def check_rows(labels: Tensor, values: Tensor, name: str, shift: int, ignore_index: int, cu_seqlens: Tensor | None) -> None:
    """Check labels and segment bounds against ``values``, the logits or hidden states."""
    checks.rows(labels, tuple(values.shape[:-1]), name, shift, cu_seqlens)
    checks.same_device("labels", labels, name, values)
    checks.integer_between("ignore_index", ignore_index, checks.INT64.min, checks.INT64.max, "an int of 64 bits")
    if cu_seqlens is not None and checks.are_read(cu_seqlens):
        checks.segment_bounds(cu_seqlens, labels.numel())


def _row_options(
    op: str, logits: Tensor, ignore_index: int, scale: float, softcap: float | None, backend: str | None
) -> RowOptions:
    scale = checks.positive("scale", scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    name = resolve(op, backend, logits.device, logits.dtype, obstacle=layout_obstacle(logits))
    return RowOptions(ignore_index, scale, softcap, name)


def _token_logps(logits: Tensor, labels: Tensor, inplace_backward: bool, rows: RowOptions) -> Tensor:
    """:func:`token_logps` after its checks of shapes, for labels already shifted."""
    checks.flag("inplace_backward", inplace_backward)
    # A compiled graph never overwrites the logits, and this check would turn its sizes into constants.
    if inplace_backward and not torch.compiler.is_compiling() and memory.rows_overlap(logits):
        shared = "one row for several positions" if 0 in logits.stride() else "rows that overlap"
        raise ValueError(
            f"inplace_backward: logits of shape {list(logits.shape)} has strides {list(logits.stride())}, {shared}; wanted a row "
            "for each gradient, or inplace_backward=False"
        )
    if rows.backend == "torch":
        check_vocabulary(labels, rows.ignore_index, logits.shape[-1])
        return reference.token_logps(logits, labels, **rows.transformation())
    logps, _stats = ops.token_logps(logits, labels, inplace_backward, *rows)
    return logps


def check_vocabulary(labels: Tensor, ignore_index: int, V: int) -> None:
    """Check the labels for backend ``torch``; the operators of the other backends do it themselves."""
    if not torch.compiler.is_compiling() and checks.are_read(labels):
        checks.vocabulary(labels, ignore_index, V)


def over_sequences(logps: Tensor, labels: Tensor, ignore_index: int, average: bool, cu_seqlens: Tensor | None) -> Tensor:
    """Sum or average token log-probs over each sequence."""
    sums = sequence_sums(logps, cu_seqlens)
    if not average:
        return sums
    labelled = (labels != ignore_index).to(logps.dtype)
    return sums / sequence_sums(labelled, cu_seqlens).clamp(min=1)
