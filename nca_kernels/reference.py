"""The formulas in plain PyTorch, with the papers' symbols: backend ``torch``, and what every kernel is tested against.

Float32 and float64, twice differentiable, no host sync. A masked or ignored entry may hold NaN or inf. It is replaced *before* the
arithmetic, because a multiplication by 0 afterwards leaves 0 * NaN = NaN in the value and in the gradient. The derivations are in
``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss_table import LOSSES
from .scores import best_scored, score_pairs

# --- log-probabilities -----------------------------------------------------------------------------------------------


def token_logps(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [...]
    r"""``log p(label) = z[label] - log sum_v exp(z[v])``, ``z = scale * logits``, then ``softcap * tanh(z / softcap)``.

    Float64 for float64 logits, else float32. Ignored rows have value 0 and gradient 0. A label that is neither in
    ``[0, V)`` nor ``ignore_index`` makes its own row NaN, gradient included. A logit of -inf has probability 0 (without
    a softcap: with one it is capped to ``-softcap`` like any other number).
    """
    ignored = labels == ignore_index
    legal = (labels >= 0) & (labels < logits.shape[-1])
    logps = _of_labels(_transformed(logits, ignored, scale, softcap).log_softmax(-1), labels, legal)
    return logps.masked_fill(ignored, 0.0)


def token_stats(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [...] each
    r"""Log-probs (:func:`token_logps`), entropy ``- sum_v p_v log p_v`` in nats, ``log sum_v exp(z_v)``, and top-1 hits.

    A row is a top-1 hit if ``z[label]`` is its maximum.

    Ignored rows have 0, 0, 0 and False. The entropy is detached unless ``entropy_gradient``. Where the log-prob is NaN,
    entropy and log-sum-exp are NaN, too, and the top-1 hit is False.
    """
    ignored = labels == ignore_index
    legal = (labels >= 0) & (labels < logits.shape[-1])
    z = _transformed(logits, ignored, scale, softcap)
    log_p = z.log_softmax(-1)
    logps = _of_labels(log_p, labels, legal)
    # The log-sum-exp is taken from the row's maximum: near 1e4, in float32, it is too coarse for the probabilities of its gradient.
    top = z.detach().argmax(-1, keepdim=True)
    poison = torch.where(logps.detach().isnan(), torch.nan, 1.0).to(logps.dtype)
    lse = (z.gather(-1, top) - log_p.gather(-1, top)).squeeze(-1) * poison
    if not entropy_gradient:
        log_p = log_p.detach()
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1) * poison
    at_label = _of_labels(z.detach(), labels, legal)
    top1 = (at_label == z.detach().amax(-1)) & ~logps.isnan() & ~ignored
    return logps.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0), top1


def _transformed(logits: Tensor, ignored: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``z``, 0 in ignored rows; float64 for float64 logits, else float32."""
    z = logits.masked_fill(ignored.unsqueeze(-1), 0.0)
    z = scale * z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _of_labels(values: Tensor, labels: Tensor, legal: Tensor) -> Tensor:
    """The value at each row's label, NaN at an illegal one."""
    chosen = values.gather(-1, torch.where(legal, labels, 0).unsqueeze(-1)).squeeze(-1)
    # A factor, not a fill: NaN must reach the gradient as well.
    return chosen * torch.where(legal, 1.0, torch.nan).to(values.dtype)


def linear_token_logps(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:  # [...]
    """:func:`token_logps` of ``logits = hidden @ weight.T + bias`` in ``logits_dtype`` (``None``: the dtype of ``hidden``)."""
    logits = _linear_logits(hidden, weight, bias, labels == ignore_index, logits_dtype)
    return token_logps(logits, labels, ignore_index=ignore_index, scale=scale, softcap=softcap)


def linear_token_stats(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [...] each
    """:func:`token_stats` of the logits of :func:`linear_token_logps`."""
    logits = _linear_logits(hidden, weight, bias, labels == ignore_index, logits_dtype)
    return token_stats(logits, labels, ignore_index=ignore_index, scale=scale, softcap=softcap, entropy_gradient=entropy_gradient)


def _linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ignored: Tensor, logits_dtype: torch.dtype | None
) -> Tensor:
    # The gradient of weight multiplies hidden by the zeros of the ignored rows, and 0 * NaN is NaN.
    hidden = hidden.masked_fill(ignored.unsqueeze(-1), 0.0)
    dtype = logits_dtype or hidden.dtype
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# --- the weights of a prompt's responses -------------------------------------------------------------------------------


def response_weights(scores: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
    r"""``w = softmax(s / alpha)`` over the valid responses, ``[B, K]``; a constant, since scores are data.

    ``alpha = 0`` is the limit, uniform over the best-scored. Zero where masked.
    Chen et al. 2024 (arXiv 2402.05369), section 3.
    """
    mask = _all_valid(scores) if mask is None else mask
    scores = scores.detach().masked_fill(~mask, -torch.inf)
    best = scores.amax(-1, keepdim=True)
    # The difference comes first: s / alpha near 1e7 would round to whole numbers in float32. The best have the gap 0 without the
    # division, so alpha = 0 needs no branch: every other gap becomes -inf.
    gaps = torch.where(scores == best, 0.0, (scores - best) / alpha)
    odds = gaps.exp().masked_fill(~mask, 0.0)
    return odds / odds.sum(-1, keepdim=True).clamp(min=1.0)  # the sum is at least 1, unless there is no response


# --- the losses ------------------------------------------------------------------------------------------------------
# Each maps log_ratios [B, K] = log pi(y) - log pi_ref(y), 0 where masked, to losses [B]. Its keyword arguments are beta and
# those that the table of losses lists for it.

FUNCTIONS: dict[str, Callable[..., Tensor]] = {}


def _loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    FUNCTIONS[function.__name__] = function
    return function


@_loss
def info_nca(log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float, alpha: float) -> Tensor:
    r"""``- sum_i w_i log softmax(r)_i``, ``r = beta * log_ratios``.

    Chen et al. 2024 (arXiv 2402.05369), section 3.
    """
    # A prompt without a valid response keeps its zeros: all its w are 0, and a row of -inf would give NaN.
    absent = ~mask & mask.any(-1, keepdim=True)
    log_softmax = (beta * log_ratios).masked_fill(absent, -torch.inf).log_softmax(-1).masked_fill(absent, 0.0)
    w = response_weights(scores, alpha, mask)
    return -_weighted(w, log_softmax).sum(-1)


@_loss
def nca(log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float, alpha: float) -> Tensor:
    r"""``- sum_i [w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i)]``, ``r = beta * log_ratios``, K the prompt's own count.

    Chen et al. 2024 (arXiv 2402.05369), section 4.
    """
    r = beta * log_ratios
    w = response_weights(scores, alpha, mask)
    return -_weighted(w, F.logsigmoid(r)).sum(-1) - _mean(F.logsigmoid(-r), mask, -1)


@_loss
def dpo(log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float, pairs: str, label_smoothing: float) -> Tensor:
    r"""The mean over pairs of ``- (1 - e) log sigmoid(d) - e log sigmoid(-d)``, ``d = r_i - r_j``, ``r = beta * log_ratios``.

    ``e`` is ``label_smoothing``, the share of pairs whose order is taken to be wrong. Rafailov et al. 2023 (arXiv 2305.18290);
    e > 0 is their conservative DPO; with K > 2 as the baselines of Chen et al. 2024 (arXiv 2402.05369).
    """
    better = score_pairs(scores, mask, pairs)
    margins = _margins(beta * log_ratios, better)
    terms = -F.logsigmoid(margins)
    if label_smoothing > 0:  # avoids 0 * inf where the worse response has probability 0
        terms = (1 - label_smoothing) * terms - label_smoothing * F.logsigmoid(-margins)
    return _mean(terms, better, (1, 2))


@_loss
def ipo(log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float, pairs: str, lengths: Tensor | None) -> Tensor:
    r"""The mean over pairs of ``(l_i / n_i - l_j / n_j - 1 / (2 beta))^2``, ``l = log_ratios``, ``n = lengths``.

    Azar et al. 2023 (arXiv 2310.12036), whose tau is ``beta``, on averages over tokens (``lengths=None``: they are averages
    already).
    """
    better = score_pairs(scores, mask, pairs)
    if lengths is not None:
        log_ratios = log_ratios / lengths.masked_fill(~mask, 1).clamp(min=1)
    return _mean((_margins(log_ratios, better) - 1 / (2 * beta)).square(), better, (1, 2))


@_loss
def kto(
    log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float, desirable: Tensor | None, baseline: Tensor | None
) -> Tensor:
    r"""The mean over responses of ``1 - sigmoid(beta (l - z))`` if desirable, ``1 - sigmoid(beta (z - l))`` if not.

    ``l = log_ratios``, ``z = max(baseline, 0)`` detached. Ethayarajh et al. 2024 (arXiv 2402.01306), both lambdas 1.
    """
    z = 0.0 if baseline is None else baseline.detach().clamp(min=0.0)
    desirable = best_scored(scores, mask) if desirable is None else desirable
    gain = beta * torch.where(desirable, log_ratios - z, z - log_ratios)
    return _mean(torch.sigmoid(-gain), mask, -1)  # 1 - sigmoid(x) = sigmoid(-x), which does not cancel


@_loss
def plackett_luce(log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    r"""The mean of ``log sum_j exp(r_j - r_i)`` over the responses i that have another scored at or below them.

    j runs over the responses with ``s_j <= s_i``, i and its ties included (Breslow 1974); ``r = beta * log_ratios``. A prompt whose
    scores are all equal states no preference and has loss 0. Plackett 1975, Luce 1959; for language models Rafailov et al. 2023
    (arXiv 2305.18290), appendix A.3.
    """
    r = beta * log_ratios
    # Every response is in its own sum, so that no sum is empty, also for masked responses.
    own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    others = (scores.unsqueeze(1) <= scores.unsqueeze(2)) & mask.unsqueeze(1) & mask.unsqueeze(2) & ~own
    gaps = (r.unsqueeze(1) - r.unsqueeze(2)).masked_fill(~others, 0.0).masked_fill(~(others | own), -torch.inf)
    preference = score_pairs(scores, mask, "all").any((1, 2)).unsqueeze(1)
    return _mean(gaps.logsumexp(-1), others.any(-1) & preference, -1)


@_loss
def biased_nca(log_ratios: Tensor, scores: Tensor, mask: Tensor, *, beta: float, alpha: float) -> Tensor:
    r"""``- sum_i [w_i log sigmoid(r_i) + (1 - w_i) / (K - 1) log sigmoid(-r_i)]``, ``r = beta * log_ratios``; 0 for K = 1.

    The "biasedNCA" in the code of Chen et al. 2024 (arXiv 2402.05369), which has K = 2 and ``alpha = 0``.
    """
    r = beta * log_ratios
    w = response_weights(scores, alpha, mask)
    count = mask.sum(-1, keepdim=True)
    terms = _weighted(w, F.logsigmoid(r)) + (1 - w) / (count - 1).clamp(min=1) * F.logsigmoid(-r)
    return -terms.masked_fill(~mask | (count < 2), 0.0).sum(-1)


def nll(logps: Tensor, scores: Tensor, mask: Tensor, *, alpha: float, lengths: Tensor) -> Tensor:
    r"""``- sum_i w_i logps_i / lengths_i``: supervised fine-tuning on the responses, weighted by ``w``, per token."""
    w = response_weights(scores, alpha, mask)
    return -_weighted(w, logps / lengths.masked_fill(~mask, 1).clamp(min=1)).sum(-1)


def group_loss(
    name: str,
    logps: Tensor,  # [B, K]
    ref_logps: Tensor,  # [B, K]
    scores: Tensor,  # [B, K]
    *,
    beta: float,
    alpha: float = 1.0,
    mask: Tensor | None = None,  # bool [B, K]
    pairs: str = "best_vs_rest",
    lengths: Tensor | None = None,  # [B, K]
    desirable: Tensor | None = None,  # bool [B, K]
    baseline: Tensor | None = None,  # one element
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [B], [B, K]
    r"""Each prompt's loss, and the implicit rewards ``r = beta * (logps - ref_logps)``, detached, 0 where masked.

    ``nll_weight`` times :func:`nll` is added. Chen et al. 2024 (arXiv 2402.05369). A prompt with no valid response, or
    with no pair in a loss over pairs, has loss 0 and gradient 0. A NaN among a prompt's valid inputs makes its loss and the
    gradients of its valid responses NaN, and no others. Arguments that the loss does not take are not read.
    """
    mask = _all_valid(logps) if mask is None else mask
    log_ratios = (logps - ref_logps).masked_fill(~mask, 0.0)
    takes = LOSSES[name].takes
    given = {
        "alpha": alpha,
        "pairs": pairs,
        "lengths": lengths,
        "desirable": desirable,
        "baseline": baseline,
        "label_smoothing": label_smoothing,
    }
    own: dict[str, Any] = {argument: given[argument] for argument in takes}
    losses = FUNCTIONS[name](log_ratios, scores, mask, beta=beta, **own)
    bad = log_ratios.isnan() | scores.isnan()
    if nll_weight > 0:
        assert lengths is not None, "the public functions refuse nll_weight without lengths"
        alpha, own["lengths"] = alpha if "alpha" in takes else 0.0, lengths
        losses = losses + nll_weight * nll(logps.masked_fill(~mask, 0.0), scores, mask, alpha=alpha, lengths=lengths)
    for read in (own.get("lengths"), own.get("baseline")):
        bad = bad if read is None else bad | read.isnan()
    return losses + _nan_where((bad & mask).any(-1, keepdim=True), log_ratios).sum(-1), beta * log_ratios.detach()


def _nan_where(bad: Tensor, log_ratios: Tensor) -> Tensor:
    """0; where ``bad``, NaN with a NaN gradient. A loss's comparisons and masks may keep a NaN from the gradient."""
    return torch.where(bad, log_ratios, 0.0) * torch.where(bad, torch.nan, 0.0).to(log_ratios.dtype)


def _all_valid(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool)


def _weighted(w: Tensor, terms: Tensor) -> Tensor:
    """``w * terms``, 0 where w is 0: a response without weight may have log-prob -inf, and 0 * inf is NaN."""
    return w * terms.masked_fill(w == 0, 0.0)


def _margins(x: Tensor, better: Tensor) -> Tensor:
    """``x_i - x_j`` ``[B, K, K]``; 0 where there is no pair, so that no gradient comes from there."""
    return (x.unsqueeze(2) - x.unsqueeze(1)).masked_fill(~better, 0.0)


def _mean(terms: Tensor, where: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """The mean of the terms at which ``where`` is true, 0 if there is none."""
    return terms.masked_fill(~where, 0.0).sum(dim) / where.sum(dim).clamp(min=1)
