"""Functions with the names, arguments and results of other libraries: TRL's on logits, verl's on hidden states and a head."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .functional import token_logps, token_stats
from .linear_functional import linear_token_stats

NO_IGNORE_INDEX = checks.INT64.min  # no label is ignored: every illegal id is an error


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    r"""``logits.div(temperature).log_softmax(-1).gather(-1, index)``, with TRL's name, signature and result.

    Args:
        logits: ``[..., V]``; float32, bfloat16, float16 or float64. Gets a gradient.
        index: token ids, int64 or int32, ``[...]``, or ``[..., K]`` for ``K`` ids a row (each of the K reads the logits once).
        temperature: > 0, a number or a tensor of one element. A tensor divides a float32 copy of the logits. It may require a
            gradient, and its value is not checked on a GPU.
        row_mask: the shape of ``index``, any dtype. Where it is zero the row is not read and the result is 0.

    Returns:
        The log-probs in nats, in the shape of ``index``, computed in float32 for 16-bit logits. As with TRL, they are float32 on a
        GPU, and rounded to the dtype of ``logits`` on a CPU.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range.
        IndexError: an id outside ``[0, V)`` in a row that is not masked, on a CPU. On a GPU its log-prob and gradient are NaN;
            ``NCA_KERNELS_CHECK=1`` raises the error there, too.

    Source: ``trl.trainer.utils.selective_log_softmax`` (TRL 1.16).

    Example:
        >>> selective_log_softmax(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]))
        tensor([[-1.3863, -1.3863]])
    """
    _check_selection(logits, index, row_mask, several=True)
    dtype = _result_dtype(logits)
    logits, scale = _tempered(logits, temperature)
    if index.ndim < logits.ndim:
        return token_logps(logits, _labels(index, row_mask), ignore_index=NO_IGNORE_INDEX, scale=scale).to(dtype)
    if index.shape[-1] == 0:
        return logits[..., :0].to(dtype)  # empty, but part of the autograd graph
    columns = _labels(index, row_mask).unbind(-1)
    logps = [token_logps(logits, column, ignore_index=NO_IGNORE_INDEX, scale=scale) for column in columns]
    return torch.stack(logps, dim=-1).to(dtype)


def selective_log_softmax_and_entropy(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...]
    entropy_requires_grad: bool = True,
    temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r""":func:`selective_log_softmax` and the entropy of each row, from one read of the logits.

    ``entropy = - sum_v p_v log p_v`` in nats, with ``p = softmax(logits / temperature)``; TRL's name, signature and results.

    Args:
        logits, temperature, row_mask: as in :func:`selective_log_softmax`. ``logits`` gets a gradient.
        index: token ids, int64 or int32, ``[...]``.
        entropy_requires_grad: if true, the entropy has a gradient; if false, it is detached.

    Returns:
        Log-probs and entropies in the shape of ``index``, 0 in masked rows, dtypes as in :func:`selective_log_softmax`.

    Raises:
        As :func:`selective_log_softmax`.

    Source: ``trl.trainer.utils.selective_log_softmax_and_entropy`` (TRL 1.16).

    Example:
        >>> logps, entropy = selective_log_softmax_and_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]))
        >>> entropy
        tensor([[1.3863, 1.3863]])
    """
    checks.flag("entropy_requires_grad", entropy_requires_grad)
    _check_selection(logits, index, row_mask, several=False)
    dtype = _result_dtype(logits)
    logits, scale = _tempered(logits, temperature)
    stats = token_stats(
        logits,
        _labels(index, row_mask),
        ignore_index=NO_IGNORE_INDEX,
        scale=scale,
        entropy_gradient=entropy_requires_grad,
    )
    return stats.logps.to(dtype), stats.entropy.to(dtype)


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The log-probability of each label and the entropy of its row from hidden states and the head, both with gradients.

    ``z = hidden @ weight.T / temperature`` is float32, also for 16-bit inputs, and never held as a whole.
    ``logprobs = z[label] - log sum_v exp(z_v)`` and ``entropy = - sum_v p_v log p_v``, in nats, with ``p = softmax(z)``. The name,
    signature and results are verl's: in spite of the name, it returns log-probs, not their negative.

    Args:
        hidden: ``[M, D]`` or ``[N, T, D]``; float32, bfloat16 or float16. Gets a gradient.
        weight: ``[V, D]``, the dtype of ``hidden``; with a group, this rank's rows of the head. Gets a gradient.
        labels: token ids, int64 or int32, one for each row of ``hidden``.
        temperature: > 0.
        reduction: ``"none"``, ``"sum"`` or ``"mean"`` of the log-probs. The entropies are not reduced.
        dist_process_group: the ranks over which the head's rows are spread; ``hidden`` and ``labels`` are the same on all of them.

    Returns:
        ``(logprobs, entropy)``: float32, ``[M]`` each for the ``M = N T`` tokens; ``logprobs`` is a scalar unless the reduction
        is ``"none"``.

    Raises:
        As :func:`nca_kernels.linear_token_stats`.

    Source: ``verl.utils.kernel.linear_cross_entropy``.

    Example:
        >>> logprobs, entropy = linear_cross_entropy(torch.zeros(1, 2, 3), torch.ones(4, 3), torch.tensor([[3, 0]]))
        >>> logprobs, entropy
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    checks.one_of("reduction", reduction, ("none", "sum", "mean"))
    scale = 1.0 / checks.positive("temperature", temperature)
    checks.floating("hidden", hidden)
    checks.integer("labels", labels)
    if hidden.ndim < 2 or labels.numel() != hidden.shape[:-1].numel():
        raise ValueError(
            f"labels: got shape {list(labels.shape)} with hidden of {list(hidden.shape)}, wanted hidden [..., D] and a label for "
            "each of its rows"
        )
    stats = linear_token_stats(
        hidden.reshape(labels.numel(), hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        ignore_index=NO_IGNORE_INDEX,
        scale=scale,
        entropy_gradient=True,
        logits_dtype=None if hidden.dtype == torch.float64 else torch.float32,
        tp_group=dist_process_group,
    )
    logprobs = stats.logps if reduction == "none" else stats.logps.sum() if reduction == "sum" else stats.logps.mean()
    return logprobs, stats.entropy


def _check_selection(logits: Tensor, index: Tensor, row_mask: Tensor | None, several: bool) -> None:
    """Check the tensors of TRL's functions; with ``several``, an index may hold K ids a row."""
    checks.floating("logits", logits)
    checks.integer("index", index)
    if logits.ndim < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits: got shape {list(logits.shape)}, wanted [..., V] of 2 or more dimensions with V >= 1")
    rows = tuple(logits.shape[:-1])
    if index.shape[: len(rows)] != rows or index.ndim > len(rows) + several:
        wanted = f"{list(rows)}{f' or {[*rows]} and K ids for each' if several else ''}"
        raise ValueError(f"index: got shape {list(index.shape)}, wanted {wanted} (logits without its last dimension)")
    checks.same_device("index", index, "logits", logits)
    if row_mask is not None:
        if not isinstance(row_mask, Tensor):
            raise TypeError(f"row_mask: got {type(row_mask).__name__}, wanted a tensor")
        checks.shape("row_mask", row_mask, tuple(index.shape), "that of index")
        checks.same_device("row_mask", row_mask, "logits", logits)
    if not torch.compiler.is_compiling() and checks.are_read(index):
        checks.ids("index", index if row_mask is None else index.masked_fill(row_mask == 0, 0), logits.shape[-1])


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    labels = index.to(torch.int64)
    return labels if row_mask is None else labels.masked_fill(row_mask == 0, NO_IGNORE_INDEX)


def _result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.is_cuda and logits.dtype != torch.float64 else logits.dtype


def _tempered(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, float]:
    """Logits, and the ``scale`` by which the kernel multiplies them."""
    if not isinstance(temperature, Tensor):
        return logits, 1.0 / checks.positive("temperature", temperature)
    if temperature.numel() != 1:
        raise ValueError(f"temperature: got shape {list(temperature.shape)}, wanted a number or one element")
    if not torch.compiler.is_compiling() and checks.are_read(temperature):
        checks.positive("temperature", temperature.item())
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(dtype) / temperature.to(logits.device, dtype).reshape(()), 1.0
