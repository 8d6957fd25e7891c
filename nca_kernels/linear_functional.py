"""The public functions of hidden states and a head: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, ops, parallel, reference
from .dispatch import resolve
from .functional import TokenStats, check_rows, check_vocabulary, over_sequences
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
    logits_dtype: torch.dtype | None = None,
    save_budget: int = 0,
    skip_mass: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The log-probability of each label from hidden states and the head: :func:`token_logps` of
    ``logits = hidden @ weight.T + bias``, which are never held as ``[N, T, V]``.

    The cost is 1 GEMM without a gradient, 2 if only ``hidden`` needs one (the head is frozen), and 4 if the head is trained, down
    to 3 as ``save_budget`` grows. Ignored positions cost no arithmetic. With ``skip_mass`` it is 1 + 3 f for a trained head and
    1 + 2 f for a frozen one, where f is the share of the logits that backward computes.

    Args:
        hidden: ``[N, T, D]`` or ``[M, D]``, any leading dimensions; float32, bfloat16 or float16 (float64 on
            ``backend="torch"``, which holds the logits). Gets a gradient.
        weight: ``[V, D]``, the dtype of ``hidden``, as ``lm_head.weight``. Gets a gradient, summed over tiles in float32.
        labels, shift, ignore_index, scale, softcap, backend: as in :func:`token_logps`.
        bias: ``[V]``, the dtype of ``hidden``. Gets a gradient.
        logits_dtype: ``torch.float32`` keeps the logits of 16-bit inputs in float32: a log-prob is then accurate to 1e-5 and not
            only to the spacing of its logit. Gradients are still products of 16-bit matrices. ``None``: the dtype of ``hidden``.
        save_budget: bytes of logits that a trained head keeps from forward to backward instead of computing them again; >= 0.
        skip_mass: in [0, 1), the most probability that backward may leave out of a row's gradient. It leaves out slices of the
            vocabulary, the row's least probable ones first and never the label's, and computes no GEMM for them
            (``docs/linear.md`` says when that pays). Values stay exact. 0, backend ``"torch"`` and CUDA graphs leave out nothing.
        tp_group: the process group of a vocabulary-parallel head. ``weight`` and ``bias`` are then this rank's rows, whose number
            may differ between ranks; ``hidden`` and ``labels`` are the same on every rank. For a ``DTensor`` weight sharded on
            dim 0 it is not read: the weight's mesh is the group.

    Under autocast the GEMM runs in the autocast dtype. ``NCA_KERNELS_TILE_BYTES`` overrides the size of a tile; the result
    depends on it by rounding alone.

    Returns:
        Log-probs in nats, float32 (float64 for float64 inputs), in the shape of ``labels``.

    Raises:
        As :func:`token_logps`. ``ValueError`` for a ``DTensor`` weight that is not sharded on dim 0 over a 1-D mesh, and
        for ranks whose labels differ.

    Source: ``docs/math.md``, section 4. The log-probs are the log pi(y|x) of Chen et al. 2024 (arXiv 2402.05369), token by token.

    Example:
        >>> hidden, weight = torch.eye(2).unsqueeze(0), torch.zeros(4, 2)
        >>> linear_token_logps(hidden, weight, torch.tensor([[3, -100]]))
        tensor([[-1.3863,  0.0000]])
    """
    call = _prepare(
        "linear_token_logps", hidden, weight, labels, bias, shift, ignore_index, None, scale, softcap, logits_dtype, save_budget,
        skip_mass, tp_group, backend,
    )  # fmt: skip
    return call.logps()


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
    logits_dtype: torch.dtype | None = None,
    save_budget: int = 0,
    skip_mass: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The log-probability of each sequence from hidden states: the sum, or the average, of :func:`linear_token_logps`.

    :func:`sequence_logps` of ``logits = hidden @ weight.T + bias``, which are never held.

    Args:
        hidden, weight, labels, bias, shift, ignore_index, scale, softcap, logits_dtype, save_budget, skip_mass, tp_group,
            backend: as in :func:`linear_token_logps`. ``hidden``, ``weight`` and ``bias`` get gradients.
        average, cu_seqlens: as in :func:`sequence_logps`.

    Returns:
        Log-probs in nats, float32 (float64 for float64 inputs): ``[N]``, or ``[S]`` with ``cu_seqlens``.

    Raises:
        As :func:`linear_token_logps`.

    Source: ``docs/math.md``, section 4.

    Example:
        >>> linear_sequence_logps(torch.zeros(1, 3, 2), torch.zeros(4, 2), torch.tensor([[3, 1, 2]]), shift=1)
        tensor([-2.7726])
    """
    checks.flag("average", average)
    call = _prepare(
        "linear_token_logps", hidden, weight, labels, bias, shift, ignore_index, cu_seqlens, scale, softcap, logits_dtype,
        save_budget, skip_mass, tp_group, backend,
    )  # fmt: skip
    return over_sequences(call.logps(), call.labels, ignore_index, average, cu_seqlens)


def linear_token_stats(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    shift: int = 0,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
    logits_dtype: torch.dtype | None = None,
    save_budget: int = 0,
    skip_mass: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    r"""Log-prob, entropy, log-sum-exp and top-1 hit of each label from hidden states: :func:`token_stats` of
    ``logits = hidden @ weight.T + bias``, which are never held as ``[N, T, V]``.

    The number of GEMMs is that of :func:`linear_token_logps`, whichever outputs have upstream gradients, and one more if the
    head is frozen and the entropy has a gradient.

    Args:
        hidden, weight, labels, bias, shift, ignore_index, scale, softcap, logits_dtype, save_budget, skip_mass, tp_group,
            backend: as in :func:`linear_token_logps`. ``hidden``, ``weight`` and ``bias`` get gradients from ``logps``, ``lse``
            and, with ``entropy_gradient``, ``entropy``.
        entropy_gradient: if true, ``entropy`` has a gradient, ``dz_v = - p_v (log p_v + entropy)``; if false, it is detached.

    Returns:
        ``TokenStats(logps, entropy, lse, top1)`` as :func:`token_stats` returns it, each in the shape of ``labels``.

    Raises:
        As :func:`linear_token_logps`.

    Source: ``docs/math.md``, sections 2 and 4.

    Example:
        >>> hidden, weight = torch.eye(2).unsqueeze(0), torch.zeros(4, 2)
        >>> linear_token_stats(hidden, weight, torch.tensor([[3, -100]])).entropy
        tensor([[1.3863, 0.0000]])
    """
    checks.flag("entropy_gradient", entropy_gradient)
    call = _prepare(
        "linear_token_stats", hidden, weight, labels, bias, shift, ignore_index, None, scale, softcap, logits_dtype, save_budget,
        skip_mass, tp_group, backend,
    )  # fmt: skip
    if call.settings.backend == "torch":
        return TokenStats(*reference.linear_token_stats(*call.on_torch(), entropy_gradient=entropy_gradient, **call.options()))
    tensors = call.flattened()
    logps, entropy, lse, top1, *_ = ops.linear_token_stats(*tensors, entropy_gradient, *call.settings)
    return TokenStats(*(values.view(call.labels.shape) for values in (logps, entropy, lse, top1)))


class _Call(NamedTuple):
    """The arguments of a linear function after its checks, with shifted labels and this rank's rows of the head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    settings: Settings

    def logps(self) -> Tensor:
        if self.settings.backend == "torch":
            return reference.linear_token_logps(*self.on_torch(), **self.options())
        logps, *_ = ops.linear_token_logps(*self.flattened(), *self.settings)
        return logps.view(self.labels.shape)

    def flattened(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The tensors as the operators take them."""
        rows = self.hidden.reshape(self.labels.numel(), self.hidden.shape[-1])
        return rows, self.weight, self.bias, self.labels.reshape(-1).contiguous()

    def on_torch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors as the reference takes them."""
        check_vocabulary(self.labels, self.settings.ignore_index, len(self.weight))
        return self.hidden, self.weight, self.labels

    def options(self) -> dict[str, Any]:
        return {**self.settings.rows.transformation(), "bias": self.bias, "logits_dtype": self.settings.logits_dtype}


def _prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shift: int,
    ignore_index: int,
    cu_seqlens: Tensor | None,
    scale: float,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    save_budget: int,
    skip_mass: float,
    tp_group: dist.ProcessGroup | None,
    backend: str | None,
) -> _Call:
    weight, bias, group = parallel.local_head(weight, bias, tp_group)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_head(hidden, weight, bias, group)
    checks.integer_between("save_budget", save_budget, 0, checks.INT64.max, "an int >= 0, in bytes")
    check_rows(labels, hidden, "hidden", shift, ignore_index, cu_seqlens)
    scale = checks.positive("scale", scale)
    softcap = None if softcap is None else checks.positive("softcap", softcap)
    logits_dtype = _logits_dtype(logits_dtype, hidden.dtype)
    skip_mass = checks.share("skip_mass", skip_mass)
    name = resolve(op, backend, hidden.device, hidden.dtype)
    if name == "torch" and group:
        raise ValueError("tp_group: backend 'torch' has no vocabulary-parallel head; wanted None or another backend")
    labels = shift_labels(labels.to(torch.int64), shift, ignore_index, cu_seqlens)
    vocab_start, vocab_total = parallel.slice_of(weight.shape[0], labels, group) if group else (0, weight.shape[0])
    settings = Settings(
        ignore_index, scale, softcap, name, logits_dtype, vocab_start, vocab_total, group, _mode(hidden, weight, bias, skip_mass),
        save_budget, skip_mass,
    )  # fmt: skip
    return _Call(hidden, weight, bias, labels, settings)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the active autocast dtype, if any; float64 is not cast, as in autocast's own matrix products."""
    # The device "meta" has no autocast.
    if not isinstance(hidden, Tensor) or hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, group: str) -> None:
    checks.floating("hidden", hidden)
    if hidden.ndim < 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, wanted [N, T, D] or [M, D]")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.tensor(name, value, (hidden.dtype,), f"a tensor of {hidden.dtype}, the dtype of hidden")
            checks.same_device(name, value, "hidden", hidden)
    empty = weight.shape[:1] == (0,) and not group  # a rank without rows is detected where the ranks compare their sizes
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or empty:
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted [V, {hidden.shape[-1]}] with V >= 1")
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],), "the rows of weight")


def _logits_dtype(logits_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if logits_dtype is None or logits_dtype == dtype:
        return dtype
    if logits_dtype != torch.float32 or dtype == torch.float64:
        wanted = "None" if dtype == torch.float64 else "None or torch.float32"
        got = logits_dtype if isinstance(logits_dtype, torch.dtype) else repr(logits_dtype)
        raise ValueError(f"logits_dtype: got {got} with hidden of {dtype}, wanted {wanted}")
    return logits_dtype


def _mode(hidden: Tensor, weight: Tensor, bias: Tensor | None, skip_mass: float) -> str:
    if not torch.is_grad_enabled():
        return "none"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "trained"
    if not hidden.requires_grad:
        return "none"
    # Which slices of the vocabulary stay is known after forward, so u cannot be computed in it.
    return "trained" if skip_mass > 0 else "frozen"
