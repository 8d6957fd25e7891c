"""The public K-way losses: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, ops, reference
from .dispatch import resolve

LOSSES = tuple(reference.LOSSES)


class GroupLoss(NamedTuple):
    """What :func:`group_loss` returns."""

    loss: Tensor
    rewards: Tensor


def group_loss(
    name: str,
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    mask: Tensor | None = None,  # [B, K]
    pairs: str = "best_vs_rest",
    lengths: Tensor | None = None,  # [B, K]
    desirable: Tensor | None = None,  # [B, K]
    baseline: Tensor | float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""The K-way loss of each prompt from its K responses' log-probs, and the implicit rewards.

    With ``r = beta * (logps - ref_logps)`` and ``w = softmax(scores / alpha)`` over a prompt's K valid responses::

        info_nca  - sum_i w_i log softmax(r)_i
        nca       - sum_i [ w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i) ]
        dpo       mean over pairs of  - log sigmoid(r_i - r_j)
        ipo       mean over pairs of  (l_i / n_i - l_j / n_j - 1 / (2 beta))^2,  l = logps - ref_logps, n = lengths
        kto       mean over responses of  1 - sigmoid(beta (l - z)) if desirable, 1 - sigmoid(beta (z - l)) if not

    A prompt with nothing to learn from (no valid response; for ``dpo`` and ``ipo`` no pair) gives loss 0 and gradient 0.

    Args:
        name: ``"info_nca"``, ``"nca"``, ``"dpo"``, ``"ipo"`` or ``"kto"``.
        logps: sequence log-probs under the policy, ``[B, K]``, in nats; any floating dtype (computed in float32; float64
            on ``backend="torch"``). The one argument that gets a gradient.
        ref_logps: the same under the reference model; must not require a gradient.
        scores: explicit rewards, ``[B, K]``, any floating dtype. ``None``: column 0 is the chosen response, and a prompt
            whose column 0 is masked has nothing to learn from.
        beta: > 0, the strength of the implicit reward.
        alpha: >= 0, the temperature of the scores, in their unit; 0: all weight on the best-scored responses.
        mask: bool ``[B, K]``, true where there is a response (ragged K); ``None``: everywhere. What the other arguments
            hold elsewhere does not matter.
        pairs: ``"best_vs_rest"``: each best-scored response against each lower-scored one; ``"all"``: every pair of
            different scores. Equal scores are no pair. Only ``dpo`` and ``ipo`` read it.
        lengths: scored tokens of each response, ``[B, K]``, for ``ipo``; ``None``: log-probs are averages already.
        desirable: bool ``[B, K]`` for ``kto``; ``None``: the best-scored responses.
        baseline: ``z`` of ``kto`` in nats, a number or one-element tensor, detached and clamped to >= 0; ``None``: 0.
        reduction: ``"mean"`` over the B prompts, ``"sum"`` or ``"none"``.
        backend: as in :func:`nca_kernels.token_logps`.

    Returns:
        ``GroupLoss(loss, rewards)``: a scalar, or ``[B]`` for ``"none"``; and ``r``, ``[B, K]``, detached, 0 where masked.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; ``K < 1``; an unknown loss.
        RuntimeError: the named backend cannot run, with every reason.
        NotImplementedError: second derivatives, except on ``backend="torch"``.

    Source: Chen et al. 2024 (arXiv 2402.05369), its baselines included; see ``docs/math.md``.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> loss, rewards = group_loss("dpo", logps, torch.tensor([[-1.5, -1.5]]), beta=1.0)
        >>> round(loss.item(), 4), rewards
        (0.3133, tensor([[ 0.5000, -0.5000]]))
    """
    checks.one_of("name", name, LOSSES)
    checks.floating("logps", logps)
    checks.floating("ref_logps", ref_logps)
    if logps.ndim != 2 or logps.shape[1] < 1:
        raise ValueError(f"logps: got shape {list(logps.shape)}, wanted [B, K] with K >= 1")
    if ref_logps.requires_grad:
        raise ValueError("ref_logps: requires a gradient, wanted a constant (compute it under torch.no_grad())")
    beta = checks.positive("beta", beta)
    alpha = checks.non_negative("alpha", alpha)
    checks.one_of("pairs", pairs, ("best_vs_rest", "all"))
    checks.one_of("reduction", reduction, ("mean", "sum", "none"))
    for argument, value, check in (
        ("ref_logps", ref_logps, checks.floating),
        ("scores", scores, checks.floating),
        ("mask", mask, checks.boolean),
        ("lengths", lengths, _check_lengths),
        ("desirable", desirable, checks.boolean),
    ):
        if value is not None:
            check(argument, value)
            checks.shape(argument, value, logps.shape, "that of logps")
            checks.same_device(argument, value, "logps", logps)

    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    name_of_backend = resolve("group_loss", backend, logps.device, dtype, loss=name)
    baseline = _baseline(baseline, logps.device, dtype)
    if scores is None:
        scores, alpha, mask = _column_zero_is_chosen(logps, mask)
    logps = (logps if logps.dtype == dtype else logps.to(dtype)).contiguous()
    ref_logps, scores, lengths = _constant(ref_logps, dtype), _constant(scores, dtype), _constant(lengths, dtype)
    mask, desirable = _constant(mask, torch.bool), _constant(desirable, torch.bool)
    if name_of_backend == "torch":
        return _reference_group_loss(
            name, logps, ref_logps, scores, lengths, mask, desirable, baseline,
            beta=beta, alpha=alpha, pairs=pairs, reduction=reduction,
        )  # fmt: skip
    loss, rewards, _dlogps = ops.group_loss(
        logps, ref_logps, scores, mask, lengths, desirable, baseline, name, beta, alpha, pairs, reduction,
        name_of_backend,
    )  # fmt: skip
    return GroupLoss(loss, rewards)


def _constant(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As the kernels read it; ``to`` is not asked where there is nothing to do, since the answer costs as much as 10 prompts."""
    if value is None:
        return None
    value = value.detach() if value.requires_grad else value
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()


def _check_lengths(name: str, value: object) -> None:
    checks.tensor(name, value, (torch.int64, torch.int32, *checks.FLOATING), "a tensor of token counts, integer or floating")


def _baseline(baseline, device, dtype) -> Tensor | None:
    if baseline is None:
        return None
    if isinstance(baseline, Tensor):
        if baseline.numel() != 1:
            raise ValueError(f"baseline: got shape {list(baseline.shape)}, wanted one element")
        return baseline.detach().to(device=device, dtype=dtype).reshape(1)
    if isinstance(baseline, bool) or not isinstance(baseline, (int, float)):
        raise TypeError(f"baseline: got {type(baseline).__name__}, wanted a number or a one-element tensor")
    return torch.full((1,), float(baseline), device=device, dtype=dtype)


def _column_zero_is_chosen(logps, mask) -> tuple[Tensor, float, Tensor | None]:
    """Scores, alpha and mask that say so: all the weight on column 0, and no response where it is masked."""
    scores = torch.zeros_like(logps, requires_grad=False)
    scores[:, 0] = 1.0
    return scores, 0.0, None if mask is None else mask & mask[:, :1]


def _reference_group_loss(
    name, logps, ref_logps, scores, lengths, mask, desirable, baseline, *, beta, alpha, pairs, reduction
) -> GroupLoss:
    losses, rewards = reference.group_loss(
        name, logps, ref_logps, scores,
        beta=beta, alpha=alpha, mask=mask, pairs=pairs, lengths=lengths, desirable=desirable, baseline=baseline,
    )  # fmt: skip
    if reduction == "none":
        return GroupLoss(losses, rewards)
    total = losses.sum()
    # No prompt at all has nothing to learn from either: 0, not 0 / 0.
    return GroupLoss(total / max(len(losses), 1) if reduction == "mean" else total, rewards)


def info_nca_loss(
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    mask: Tensor | None = None,  # [B, K]
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""InfoNCA, the cross-entropy of the implicit rewards against the explicit ones:

    ``- sum_i w_i log softmax(r)_i``, with ``r = beta * (logps - ref_logps)`` and ``w = softmax(scores / alpha)``.

    Args, returns, raises: as :func:`group_loss` with ``name="info_nca"``; ``logps`` alone gets a gradient,
    ``beta * (softmax(r) - w)``. At K = 2 and ``alpha=0`` it is :func:`dpo_loss`.

    Source: Chen et al. 2024 (arXiv 2402.05369), InfoNCA.

    Example:
        >>> info_nca_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).loss
        tensor(0.6931)
    """
    return group_loss("info_nca", logps, ref_logps, scores, beta=beta, alpha=alpha, mask=mask, reduction=reduction, backend=backend)


def nca_loss(
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    mask: Tensor | None = None,  # [B, K]
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""NCA, which tells each response from noise by itself, so that the best one's likelihood need not fall:

    ``- sum_i [w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i)]``, with ``r = beta * (logps - ref_logps)``,
    ``w = softmax(scores / alpha)`` and K the prompt's own number of valid responses.

    Args, returns, raises: as :func:`group_loss` with ``name="nca"``; ``logps`` alone gets a gradient,
    ``beta * (sigmoid(r_i) / K - w_i sigmoid(-r_i))``.

    Source: Chen et al. 2024 (arXiv 2402.05369), NCA.

    Example:
        >>> nca_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).loss
        tensor(1.3863)
    """
    return group_loss("nca", logps, ref_logps, scores, beta=beta, alpha=alpha, mask=mask, reduction=reduction, backend=backend)


def dpo_loss(
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    mask: Tensor | None = None,  # [B, K]
    pairs: str = "best_vs_rest",
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""DPO: the mean over pairs (i scored above j) of ``- log sigmoid(r_i - r_j)``, ``r = beta * (logps - ref_logps)``.

    Args, returns, raises: as :func:`group_loss` with ``name="dpo"``; ``logps`` alone gets a gradient. Without ``scores``
    column 0 is the chosen response.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); K > 2 as the baselines of Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> dpo_loss(torch.zeros(1, 2), torch.zeros(1, 2)).loss
        tensor(0.6931)
    """
    return group_loss("dpo", logps, ref_logps, scores, beta=beta, mask=mask, pairs=pairs, reduction=reduction, backend=backend)


def ipo_loss(
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    mask: Tensor | None = None,  # [B, K]
    pairs: str = "best_vs_rest",
    lengths: Tensor | None = None,  # [B, K]
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""IPO: the mean over pairs (i scored above j) of ``(l_i / n_i - l_j / n_j - 1 / (2 beta))^2``.

    ``l = logps - ref_logps`` and ``n = lengths``, in tokens (``None``: 1, for log-probs that are averages already).

    Args, returns, raises: as :func:`group_loss` with ``name="ipo"``; ``logps`` alone gets a gradient.

    Source: Azar et al. 2023 (arXiv 2310.12036), token-averaged as in Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> ipo_loss(torch.zeros(1, 2), torch.zeros(1, 2), beta=0.5).loss
        tensor(1.)
    """
    return group_loss(
        "ipo", logps, ref_logps, scores,
        beta=beta, mask=mask, pairs=pairs, lengths=lengths, reduction=reduction, backend=backend,
    )  # fmt: skip


def kto_loss(
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    mask: Tensor | None = None,  # [B, K]
    desirable: Tensor | None = None,  # [B, K]
    baseline: Tensor | float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""KTO: the mean over responses of ``1 - sigmoid(beta (l - z))`` if desirable, ``1 - sigmoid(beta (z - l))`` if not.

    ``l = logps - ref_logps`` and ``z = max(baseline, 0)``, in nats, detached.

    Args, returns, raises: as :func:`group_loss` with ``name="kto"``; ``logps`` alone gets a gradient.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), both lambdas 1.

    Example:
        >>> kto_loss(torch.zeros(1, 2), torch.zeros(1, 2)).loss
        tensor(0.5000)
    """
    return group_loss(
        "kto", logps, ref_logps, scores,
        beta=beta, mask=mask, desirable=desirable, baseline=baseline, reduction=reduction, backend=backend,
    )  # fmt: skip
