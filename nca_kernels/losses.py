"""The public K-way losses: check the arguments, resolve the backend, call the operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import checks, ops, reference
from .dispatch import resolve
from .loss_table import LOSSES, PAIRS, REDUCTIONS, GroupLossArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *checks.FLOATING)


class GroupLoss(NamedTuple):
    """What :func:`group_loss` and the named losses return."""

    loss: Tensor  # a scalar, or [B] with reduction "none"; has a gradient
    rewards: Tensor  # [B, K], the implicit rewards r, detached; 0 where masked


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`group_loss` and of the named losses."""

    beta: float
    alpha: float | None
    mask: Tensor | None
    pairs: str | None
    lengths: Tensor | None
    desirable: Tensor | None
    baseline: Tensor | float | None
    label_smoothing: float
    nll_weight: float
    reduction: str
    backend: str | None


def group_loss(
    name: str,
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor | None = None,  # [B, K]
    *,
    beta: float = 0.1,
    alpha: float | None = None,
    mask: Tensor | None = None,  # [B, K]
    pairs: str | None = None,
    lengths: Tensor | None = None,  # [B, K]
    desirable: Tensor | None = None,  # [B, K]
    baseline: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> GroupLoss:
    r"""The K-way loss of each prompt from its K responses' log-probs, and the implicit rewards.

    With ``r = beta * (logps - ref_logps)`` and ``w = softmax(scores / alpha)`` over a prompt's K valid responses::

        info_nca       - sum_i w_i log softmax(r)_i
        nca            - sum_i [ w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i) ]
        biased_nca     - sum_i [ w_i log sigmoid(r_i) + (1 - w_i) / (K - 1) log sigmoid(-r_i) ]
        dpo            mean over pairs of  - (1 - e) log sigmoid(r_i - r_j) - e log sigmoid(r_j - r_i),  e = label_smoothing
        ipo            mean over pairs of  (l_i / n_i - l_j / n_j - 1 / (2 beta))^2,  l = logps - ref_logps, n = lengths
        kto            mean over responses of  1 - sigmoid(beta (l - z)) if desirable, 1 - sigmoid(beta (z - l)) if not
        plackett_luce  mean over responses of  - (r_i - logsumexp of r_j over s_j <= s_i)

    ``- nll_weight * sum_i w_i logps_i / n_i`` is added to each. ``plackett_luce`` leaves out a response that has no other scored at
    or below it.

    A prompt that states no preference has loss 0 and gradient 0, apart from that added term: a prompt without a valid response; for
    ``dpo``, ``ipo`` and ``plackett_luce`` one without two different scores; for ``biased_nca`` one with a single response. A NaN
    among a prompt's valid inputs makes its loss and its gradients NaN; the gradients of other prompts do not change.

    Args:
        name: one of the losses above.
        logps: sequence log-probs under the policy, ``[B, K]``, in nats; any floating dtype (computed in float32; float64
            on ``backend="torch"``). The one argument that gets a gradient.
        ref_logps: the same under the reference model; must not require a gradient.
        scores: explicit rewards, ``[B, K]``, of any floating or integer dtype (computed in float32). ``None``: column 0 is the
            chosen response, and a prompt whose column 0 is masked has loss 0.
        beta: > 0, the strength of the implicit reward.
        alpha: for ``info_nca``, ``nca`` and ``biased_nca``, >= 0, the temperature of the scores, in their unit. 0 puts all
            weight on the best-scored responses, as in the losses without ``alpha``. ``None``: 1. It has no effect without
            ``scores``: all weight is then on column 0.
        mask: bool ``[B, K]``, true where there is a response (prompts may have different numbers of them); ``None``: everywhere.
            Where it is false, the values of the other arguments do not matter.
        pairs: for ``dpo`` and ``ipo``. ``"best_vs_rest"``, or ``None``: each best-scored response is paired with each lower-scored
            one. ``"all"``: every two responses with different scores are a pair. Equal scores never are.
        lengths: for ``ipo`` and for ``nll_weight``, the number of labelled tokens of each response, ``[B, K]``, floating or
            integer; 0 counts as 1. ``None``, for ``ipo``: the log-probs are averages over tokens already.
        desirable: for ``kto``, bool ``[B, K]``; ``None``: the best-scored responses.
        baseline: for ``kto``, ``z`` in nats, a number or one-element tensor, detached and clamped to >= 0; ``None``: 0.
        label_smoothing: for ``dpo``, in [0, 0.5), the share of pairs whose order is taken to be wrong.
        nll_weight: >= 0, the weight of the negative log-likelihood per token; above 0 it needs ``lengths``.
        reduction: ``"mean"`` over the B prompts, ``"sum"`` or ``"none"``.
        backend: as in :func:`nca_kernels.token_logps`.

    Returns:
        ``GroupLoss(loss, rewards)``: the loss, a scalar, or ``[B]`` for ``"none"``; and ``r``, ``[B, K]``, detached, 0 where
        masked. Both are float32 (float64 for float64 ``logps``).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; ``K < 1``; an unknown loss; an
            argument that the loss does not take.
        RuntimeError: the named backend cannot run; the message has every reason.
        NotImplementedError: second derivatives, except on ``backend="torch"``.

    Source: Chen et al. 2024 (arXiv 2402.05369) and the sources of the named losses; derived in ``docs/math.md``, section 6.

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
    label_smoothing, nll_weight = check_terms(name, label_smoothing, nll_weight)
    if nll_weight > 0 and lengths is None:
        raise ValueError("lengths: got None, wanted the number of tokens of each response, for nll_weight > 0")
    given = {"alpha": alpha, "pairs": pairs, "lengths": lengths, "desirable": desirable, "baseline": baseline}
    _refuse_unused(name, given, ("lengths",) if nll_weight > 0 else ())
    beta = checks.positive("beta", beta)
    alpha = _alpha(name, alpha, scores)
    pairs = PAIRS[0] if pairs is None else pairs
    checks.one_of("pairs", pairs, PAIRS)
    checks.one_of("reduction", reduction, REDUCTIONS)
    for argument, value, check in (
        ("ref_logps", ref_logps, checks.floating),
        ("scores", scores, _check_numbers),
        ("mask", mask, checks.boolean),
        ("lengths", lengths, _check_numbers),
        ("desirable", desirable, checks.boolean),
    ):
        if value is not None:
            check(argument, value)
            checks.shape(argument, value, logps.shape, "that of logps")
            checks.same_device(argument, value, "logps", logps)

    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    if scores is None:
        scores, mask = _column_zero_is_chosen(logps, mask)
    arguments = GroupLossArguments(
        logps=(logps if logps.dtype == dtype else logps.to(dtype)).contiguous(),
        ref_logps=_constant(ref_logps, dtype),
        scores=_constant(scores, dtype),
        mask=None if mask is None else mask.contiguous(),
        lengths=None if lengths is None else _constant(lengths, dtype),
        desirable=None if desirable is None else desirable.contiguous(),
        baseline=_baseline(baseline, logps.device, dtype),
        name=name,
        beta=beta,
        alpha=alpha,
        pairs=pairs,
        label_smoothing=label_smoothing,
        nll_weight=nll_weight,
        reduction=reduction,
        backend=resolve("group_loss", backend, logps.device, dtype, loss=name),
    )
    if arguments.backend == "torch":
        return _reference_group_loss(arguments)
    loss, rewards, _dlogps = ops.group_loss(*arguments)
    return GroupLoss(loss, rewards)


def check_terms(name: str, label_smoothing: float, nll_weight: float) -> tuple[float, float]:
    """The two numbers as floats; ``ValueError`` or ``TypeError`` for a value that the loss ``name`` cannot use."""
    label_smoothing = checks.non_negative("label_smoothing", label_smoothing)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing}, wanted a number in [0, 0.5)")
    if label_smoothing > 0:
        _refuse_unused(name, {"label_smoothing": label_smoothing})
    return label_smoothing, checks.non_negative("nll_weight", nll_weight)


def _refuse_unused(name: str, given: Mapping[str, object], used: tuple[str, ...] = ()) -> None:
    """``ValueError`` for an argument that neither the loss ``name`` nor another term uses: it would have no effect."""
    for argument, value in given.items():
        if value is not None and argument not in LOSSES[name].takes and argument not in used:
            raise ValueError(f"{argument}: got a value, wanted none: the loss {name!r} does not take it")


def _alpha(name: str, alpha: float | None, scores: Tensor | None) -> float:
    """The temperature of the weights; 0 (uniform over the best-scored) for a loss without one and without scores."""
    alpha = 1.0 if alpha is None else checks.non_negative("alpha", alpha)
    return alpha if scores is not None and "alpha" in LOSSES[name].takes else 0.0


def _constant(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Detached, cast and contiguous; ``.to()`` is skipped where the dtype matches, since the call is measurable at small B."""
    value = value.detach() if value.requires_grad else value
    return (value if value.dtype == dtype else value.to(dtype)).contiguous()


def _check_numbers(name: str, value: object) -> None:
    checks.tensor(name, value, _NUMBERS, "a tensor of integers or floating-point numbers")


def _baseline(baseline: Tensor | float | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if baseline is None:
        return None
    if isinstance(baseline, Tensor):
        if baseline.numel() != 1:
            raise ValueError(f"baseline: got shape {list(baseline.shape)}, wanted one element")
        return baseline.detach().to(device=device, dtype=dtype).reshape(1)
    if isinstance(baseline, bool) or not isinstance(baseline, (int, float)):
        raise TypeError(f"baseline: got {type(baseline).__name__}, wanted a number or a one-element tensor")
    return torch.full((1,), float(baseline), device=device, dtype=dtype)


def _column_zero_is_chosen(logps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores whose best is column 0, and a mask without the prompts whose column 0 is masked."""
    scores = torch.zeros_like(logps, requires_grad=False)
    scores[:, 0] = 1.0
    return scores, None if mask is None else mask & mask[:, :1]


def _reference_group_loss(arguments: GroupLossArguments) -> GroupLoss:
    # PyTorch 2.6 does not trace _asdict().
    options: dict[str, Any] = dict(zip(GroupLossArguments._fields, arguments, strict=True))
    reduction = options.pop("reduction")
    del options["backend"]
    losses, rewards = reference.group_loss(**options)
    if reduction == "none":
        return GroupLoss(losses, rewards)
    total = losses.sum()
    # The mean over no prompt is 0, not 0 / 0.
    return GroupLoss(total / max(len(losses), 1) if reduction == "mean" else total, rewards)


def info_nca_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""InfoNCA, the cross-entropy between the explicit rewards' distribution and that of the implicit rewards:

    ``- sum_i w_i log softmax(r)_i``, with ``r = beta * (logps - ref_logps)`` and ``w = softmax(scores / alpha)``.

    Args, returns, raises: as :func:`group_loss` with ``name="info_nca"``, whose options are ``beta``, ``alpha``, ``mask``,
    ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets a gradient, ``beta * (softmax(r) - w)``. At
    K = 2 and ``alpha=0`` it is :func:`dpo_loss`.

    Source: Chen et al. 2024 (arXiv 2402.05369), InfoNCA.

    Example:
        >>> info_nca_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).loss
        tensor(0.6931)
    """
    return group_loss("info_nca", logps, ref_logps, scores, **options)


def nca_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""NCA, which classifies each response against noise independently, so that the best one's likelihood need not fall:

    ``- sum_i [w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i)]``, with ``r = beta * (logps - ref_logps)``,
    ``w = softmax(scores / alpha)`` and K the prompt's own number of valid responses.

    Args, returns, raises: as :func:`group_loss` with ``name="nca"``, whose options are ``beta``, ``alpha``, ``mask``,
    ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets a gradient,
    ``beta * (sigmoid(r_i) / K - w_i sigmoid(-r_i))``.

    Source: Chen et al. 2024 (arXiv 2402.05369), NCA.

    Example:
        >>> nca_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).loss
        tensor(1.3863)
    """
    return group_loss("nca", logps, ref_logps, scores, **options)


def dpo_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""DPO: the mean over pairs (i, j), i scored above j, of ``- log sigmoid(r_i - r_j)``, ``r = beta * (logps - ref_logps)``.

    With ``label_smoothing`` e this is conservative DPO: ``- (1 - e) log sigmoid(r_i - r_j) - e log sigmoid(r_j - r_i)``.

    Args, returns, raises: as :func:`group_loss` with ``name="dpo"``, whose options are ``beta``, ``mask``, ``pairs``,
    ``label_smoothing``, ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets
    a gradient. Without ``scores`` column 0 is the chosen response.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); K > 2 as the baselines of Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> dpo_loss(torch.zeros(1, 2), torch.zeros(1, 2)).loss
        tensor(0.6931)
    """
    return group_loss("dpo", logps, ref_logps, scores, **options)


def ipo_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""IPO: the mean over pairs (i, j), i scored above j, of ``(l_i / n_i - l_j / n_j - 1 / (2 beta))^2``.

    ``l = logps - ref_logps`` and ``n = lengths``, in tokens (``None``: 1, for log-probs that are averages already).

    Args, returns, raises: as :func:`group_loss` with ``name="ipo"``, whose options are ``beta``, ``mask``, ``pairs``,
    ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets a gradient.

    Source: Azar et al. 2023 (arXiv 2310.12036), token-averaged as in Chen et al. 2024 (arXiv 2402.05369).

    Example:
        >>> ipo_loss(torch.zeros(1, 2), torch.zeros(1, 2), beta=0.5).loss
        tensor(1.)
    """
    return group_loss("ipo", logps, ref_logps, scores, **options)


def kto_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""KTO: the mean over responses of ``1 - sigmoid(beta (l - z))`` if desirable, ``1 - sigmoid(beta (z - l))`` if not.

    ``l = logps - ref_logps`` and ``z = max(baseline, 0)``, in nats, detached.

    Args, returns, raises: as :func:`group_loss` with ``name="kto"``, whose options are ``beta``, ``mask``, ``desirable``,
    ``baseline``, ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets a gradient.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), both lambdas 1.

    Example:
        >>> kto_loss(torch.zeros(1, 2), torch.zeros(1, 2)).loss
        tensor(0.5000)
    """
    return group_loss("kto", logps, ref_logps, scores, **options)


def plackett_luce_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""Plackett-Luce, the likelihood of the whole ranking: the mean of ``- (r_i - logsumexp of r_j over s_j <= s_i)``.

    ``r = beta * (logps - ref_logps)``; the mean is over the responses that have another one scored at or below them. Tied responses
    are in each other's sum (Breslow); a prompt whose scores are all equal has loss 0. At K = 2 it is :func:`dpo_loss`.

    Args, returns, raises: as :func:`group_loss` with ``name="plackett_luce"``, whose options are ``beta``, ``mask``,
    ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets a gradient. Without ``scores`` column 0 is
    the chosen response, and the others are tied.

    Source: Plackett 1975; Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.

    Example:
        >>> plackett_luce_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[2, 1, 0]])).loss  # (log 3 + log 2) / 2
        tensor(0.8959)
    """
    return group_loss("plackett_luce", logps, ref_logps, scores, **options)


def biased_nca_loss(logps: Tensor, ref_logps: Tensor, scores: Tensor | None = None, **options: Unpack[Options]) -> GroupLoss:
    r"""NCA whose noise term weighs each response by what its weight leaves:

    ``- sum_i [w_i log sigmoid(r_i) + (1 - w_i) / (K - 1) log sigmoid(-r_i)]``, with ``r = beta * (logps - ref_logps)``,
    ``w = softmax(scores / alpha)`` and K the prompt's own number of valid responses. A prompt with one response has loss 0.

    Args, returns, raises: as :func:`group_loss` with ``name="biased_nca"``, whose options are ``beta``, ``alpha``, ``mask``,
    ``lengths``, ``nll_weight``, ``reduction`` and ``backend``. ``logps`` alone gets a gradient,
    ``beta * ((1 - w_i) / (K - 1) sigmoid(r_i) - w_i sigmoid(-r_i))``.

    Source: "biasedNCA" in the code of Chen et al. 2024 (arXiv 2402.05369), which is K = 2 at ``alpha=0``.

    Example:
        >>> biased_nca_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).loss
        tensor(1.3863)
    """
    return group_loss("biased_nca", logps, ref_logps, scores, **options)
