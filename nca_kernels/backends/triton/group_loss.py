"""The K-way losses: loss, implicit rewards and dloss/dlogps of every prompt in one launch.

A batch is small (B = 64, K = 4), so the launch is the cost, not the arithmetic. One program takes all prompts, in tiles
[BLOCK_B, BLOCK_K], and adds up their losses in a fixed order: no second launch, no atomics. Larger batches take several
programs, whose losses a second launch adds up (:meth:`~nca_kernels.loss_table.GroupLossArguments.wants_several_blocks`).

Losses that compare responses use tiles [BLOCK_B, BLOCK_K, BLOCK_J]: all responses against BLOCK_J of them, which are loaded once
more in that shape. The pairs then lie side by side in the threads, and K has no bound.

Names: l = logps - ref_logps, r = beta * l, s = scores (-inf where not valid). Every loss returns its values [BLOCK_B] and its
derivatives dr or dl [BLOCK_B, BLOCK_K]. Entries that are not valid are never loaded, so their values do not matter.

Sources: InfoNCA, NCA and biased NCA, Chen et al. 2024 (arXiv 2402.05369); DPO, Rafailov et al. 2023 (arXiv 2305.18290); IPO,
Azar et al. 2023 (arXiv 2310.12036); KTO, Ethayarajh et al. 2024 (arXiv 2402.01306); Plackett-Luce, docs/math.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...loss_table import GroupLossArguments

_TILE = 512  # elements of a tile [BLOCK_B, BLOCK_K]: four for each thread of the program's four warps
_CUBE = 512  # of a tile [BLOCK_B, BLOCK_K, BLOCK_J]; with 1024 Plackett-Luce spills registers on some GPUs
_NUM_WARPS = 4
_COMPARING = ("dpo", "ipo", "plackett_luce")  # the losses that use tiles [BLOCK_B, BLOCK_K, BLOCK_J]

# One compiled kernel serves every shape: the compile key contains no integer's value and no address.
_SCALARS = ["B", "K"]
_POINTERS = [
    "logps", "ref_logps", "scores", "mask", "lengths", "desirable", "baseline", "loss", "rewards", "dlogps", "losses",
]  # fmt: skip


@triton.jit
def _log1p(x):
    # log(1 + x) loses what 1 + x rounds away; the factor x / ((1 + x) - 1) restores it.
    rounded = 1.0 + x
    kept = rounded - 1.0
    return tl.where(kept == 0.0, x, tl.log(rounded) * (x / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _responses(logps, ref_logps, scores, mask, lengths, rows, cols, B, K):
    """Which responses are valid, their log-probs, log-ratios, scores (-inf where not valid) and lengths (at least 1)."""
    at = rows.to(tl.int64) * K + cols
    valid = (rows < B) & (cols < K)
    if mask is not None:
        valid = valid & (tl.load(mask + at, mask=valid, other=0) != 0)
    logp = tl.load(logps + at, mask=valid, other=0.0)
    l = logp - tl.load(ref_logps + at, mask=valid, other=0.0)  # noqa: E741
    s = tl.load(scores + at, mask=valid, other=float("-inf"))
    n = tl.where(valid, 1.0, 1.0)
    if lengths is not None:
        n = tl.load(lengths + at, mask=valid, other=1.0)
        n = tl.where(n < 1.0, 1.0, n)  # not tl.maximum, which drops a NaN
    return valid, logp, l, s, n


@triton.jit
def _weights(s, best, valid, alpha):
    """w = softmax(s / alpha). The difference comes first (s / alpha may be 1e7); alpha = 0 sends all gaps to -inf."""
    odds = tl.where(valid, tl.exp(tl.where(s == best, 0.0, (s - best) / alpha)), 0.0)
    total = tl.sum(odds, axis=1)[:, None]
    return odds / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _weighted(w, term):
    """w * term; 0 where w is 0: a response without weight may have log-prob -inf, and 0 * inf is NaN."""
    return tl.where(w > 0.0, w * term, 0.0)


@triton.jit
def _info_nca(r, w, valid):
    top = tl.max(tl.where(valid, r, float("-inf")), axis=1)[:, None]
    gaps = tl.where(valid, r - top, 0.0)
    odds = tl.where(valid, tl.exp(gaps), 0.0)
    total = tl.sum(odds, axis=1)[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    return tl.sum(_weighted(w, tl.log(total) - gaps), axis=1), odds / total - w


@triton.jit
def _nca(r, w, noise):
    """``noise``: the weights of log sigmoid(-r)."""
    terms = _weighted(w, _log_sigmoid(r)) + _weighted(noise, _log_sigmoid(-r))
    return -tl.sum(terms, axis=1), noise * _sigmoid(r) - w * _sigmoid(-r)


@triton.jit
def _pair_term(margin, beta, label_smoothing, LOSS: tl.constexpr):
    """A pair's loss and its derivative."""
    if LOSS == "dpo":
        flipped = tl.where(label_smoothing > 0.0, label_smoothing * _log_sigmoid(-margin), 0.0)  # avoids 0 * inf
        term = -(1.0 - label_smoothing) * _log_sigmoid(margin) - flipped
        slope = label_smoothing * _sigmoid(margin) - (1.0 - label_smoothing) * _sigmoid(-margin)
    else:
        term = (margin - 0.5 / beta) * (margin - 0.5 / beta)
        slope = 2.0 * (margin - 0.5 / beta)
    return term, slope


@triton.jit
def _compared(l, n, beta, LOSS: tl.constexpr):  # noqa: E741
    """The values that the pairwise losses compare."""
    return l / n if LOSS == "ipo" else beta * l


@triton.jit
def _pairwise(
    l, s, n, best, valid, logps, ref_logps, scores, mask, lengths, rows, cols, B, K, beta, label_smoothing,  # noqa: E741
    LOSS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The mean over pairs of a loss of x_i - x_j; each response sums its derivative over all pairs that it is in."""
    x = _compared(l, n, beta, LOSS)
    value = tl.zeros_like(x)
    dx = tl.zeros_like(x)
    pairs = tl.zeros_like(x)
    for start in range(0, K, BLOCK_J):
        cols_j = start + tl.arange(0, BLOCK_J)[None, :]
        valid_j, _, l_j, s_j, n_j = _responses(logps, ref_logps, scores, mask, lengths, rows, cols_j, B, K)
        s_i, s_j = s[:, :, None], s_j[:, None, :]
        both = valid[:, :, None] & valid_j[:, None, :]
        better = both & (s_i > s_j)
        worse = both & (s_i < s_j)
        if PAIRS == "best_vs_rest":
            better = better & (s_i == best[:, :, None])
            worse = worse & (s_j == best[:, :, None])
        margin = x[:, :, None] - _compared(l_j, n_j, beta, LOSS)[:, None, :]
        term, slope = _pair_term(tl.where(better, margin, -margin), beta, label_smoothing, LOSS)
        value += tl.sum(tl.where(better, term, 0.0), axis=2)
        pairs += tl.sum(tl.where(better, 1.0, 0.0), axis=2)
        dx += tl.sum(tl.where(better, slope, 0.0) - tl.where(worse, slope, 0.0), axis=2)
    count = tl.maximum(tl.sum(pairs, axis=1), 1.0)
    dx = dx / count[:, None]
    return tl.sum(value, axis=1) / count, dx / n if LOSS == "ipo" else beta * dx


@triton.jit
def _gaps(r, s, valid, logps, ref_logps, scores, mask, rows, cols, cols_j, B, K, beta):
    """``r_j - r_i`` and whether j is another response scored at or below i."""
    valid_j, _, l_j, s_j, _ = _responses(logps, ref_logps, scores, mask, None, rows, cols_j, B, K)
    others = valid[:, :, None] & valid_j[:, None, :] & (s_j[:, None, :] <= s[:, :, None])
    others = others & (cols[:, :, None] != cols_j[:, None, :])
    return tl.where(others, beta * l_j[:, None, :] - r[:, :, None], 0.0), others


@triton.jit
def _plackett_luce(r, s, best, valid, logps, ref_logps, scores, mask, rows, cols, B, K, beta, BLOCK_J: tl.constexpr):
    """With D_i = log sum_j exp(r_j - r_i), the mean of D; dr_k = (sum of exp(r_k - r_i - D_i) over s_i >= s_k, less 1) / n.

    A response with no other one at or below it has D = 0 and adds nothing to either, so it only needs to be left out of n.
    """
    top = tl.zeros_like(r)  # r_i itself is one of the r_j
    rest = tl.zeros_like(r)
    count = tl.zeros_like(r)
    for start in range(0, K, BLOCK_J):
        cols_j = start + tl.arange(0, BLOCK_J)[None, :]
        gaps, others = _gaps(r, s, valid, logps, ref_logps, scores, mask, rows, cols, cols_j, B, K, beta)
        top = tl.maximum(top, tl.max(gaps, axis=2))
        count += tl.sum(tl.where(others, 1.0, 0.0), axis=2)
    for start in range(0, K, BLOCK_J):
        cols_j = start + tl.arange(0, BLOCK_J)[None, :]
        gaps, others = _gaps(r, s, valid, logps, ref_logps, scores, mask, rows, cols, cols_j, B, K, beta)
        rest += tl.sum(tl.where(others, tl.exp(gaps - top[:, :, None]), 0.0), axis=2)
    D = tl.where(top > 0.0, top + tl.log(rest + tl.exp(-top)), _log1p(rest))
    dr = tl.exp(-D) - 1.0
    for start in range(0, K, BLOCK_J):
        cols_j = start + tl.arange(0, BLOCK_J)[None, :]
        gaps, others = _gaps(r, s, valid, logps, ref_logps, scores, mask, rows, cols, cols_j, B, K, beta)
        dr_j = tl.sum(tl.where(others, tl.exp(gaps - D[:, :, None]), 0.0), axis=1)
        dr += tl.sum(tl.where(cols[:, :, None] == cols_j[:, None, :], dr_j[:, None, :], 0.0), axis=2)
    n = tl.maximum(tl.sum(tl.where(count > 0.0, 1.0, 0.0), axis=1), 1.0)
    differ = tl.sum(tl.where(valid & (s < best), 1.0, 0.0), axis=1) > 0.0  # equal scores state no preference
    learns = tl.where(differ, 1.0 / n, 0.0)
    return tl.sum(tl.where(valid, D, 0.0), axis=1) * learns, dr * learns[:, None]


@triton.jit
def _kto(l, z, desirable, valid, beta, count):  # noqa: E741
    sign = tl.where(desirable, beta, -beta)
    gain = sign * (l - z)
    unlikely = _sigmoid(-gain)  # 1 - sigmoid(gain), without the cancellation
    return tl.sum(tl.where(valid, unlikely / count, 0.0), axis=1), -sign * _sigmoid(gain) * unlikely / count


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_POINTERS)
def _group_loss_fwd_kernel(
    logps,  # [B, K]
    ref_logps,  # [B, K]
    scores,  # [B, K]
    mask,  # [B, K] or None
    lengths,  # [B, K] or None
    desirable,  # [B, K] or None
    baseline,  # [1] or None
    loss,  # [1], or [B], each prompt's own, unless TOTAL
    rewards,  # [B, K]
    dlogps,  # [B, K]
    B,
    K,
    beta,
    alpha,
    label_smoothing,
    nll_weight,
    factor,  # the reduction's
    LOSS: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_NLL: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_B], tl.float32)
    z = 0.0
    if baseline is not None:
        z = tl.load(baseline)
    for start in range(tl.program_id(0) * BLOCK_B, B, tl.num_programs(0) * BLOCK_B):
        rows = (start + tl.arange(0, BLOCK_B))[:, None]
        valid, logp, l, s, n = _responses(logps, ref_logps, scores, mask, lengths, rows, cols, B, K)  # noqa: E741
        r = beta * l
        best = tl.max(s, axis=1)[:, None]
        count = tl.maximum(tl.sum(tl.where(valid, 1.0, 0.0), axis=1), 1.0)[:, None]

        if LOSS == "info_nca":
            value, dr = _info_nca(r, _weights(s, best, valid, alpha), valid)
            dl = beta * dr
        elif LOSS == "nca":
            value, dr = _nca(r, _weights(s, best, valid, alpha), tl.where(valid, 1.0 / count, 0.0))
            dl = beta * dr
        elif LOSS == "biased_nca":
            w = tl.where(count > 1.0, _weights(s, best, valid, alpha), 0.0)  # a single response states no preference
            noise = tl.where(valid & (count > 1.0), (1.0 - w) / tl.maximum(count - 1.0, 1.0), 0.0)
            value, dr = _nca(r, w, noise)
            dl = beta * dr
        elif LOSS == "plackett_luce":
            value, dr = _plackett_luce(
                r, s, best, valid, logps, ref_logps, scores, mask, rows, cols, B, K, beta, BLOCK_J
            )  # fmt: skip
            dl = beta * dr
        elif LOSS == "kto":
            good = s == best
            if desirable is not None:
                good = tl.load(desirable + rows.to(tl.int64) * K + cols, mask=valid, other=0) != 0
            value, dl = _kto(l, tl.where(z < 0.0, 0.0, z), good, valid, beta, count)
        else:
            tl.static_assert(LOSS == "dpo" or LOSS == "ipo", "a loss without a branch here")
            value, dl = _pairwise(
                l, s, n, best, valid, logps, ref_logps, scores, mask, lengths, rows, cols, B, K, beta, label_smoothing,
                LOSS, PAIRS, BLOCK_J,
            )  # fmt: skip

        if HAS_NLL:
            w = _weights(s, best, valid, alpha)
            value -= nll_weight * tl.sum(_weighted(w, logp / n), axis=1)
            dl -= nll_weight * w / n
        # A NaN among the valid inputs: comparisons may keep it from the results, so it is written into them.
        unknown = valid & ((l != l) | (s != s) | (n != n))
        if baseline is not None:
            baselines = tl.where(valid, z, 0.0)
            unknown = unknown | (baselines != baselines)
        unknown = tl.max(tl.where(unknown, 1, 0), axis=1) > 0
        value = tl.where(unknown, float("nan"), value)
        dl = tl.where(valid, tl.where(unknown[:, None], float("nan"), dl), 0.0)

        inside = (rows < B) & (cols < K)
        at = rows.to(tl.int64) * K + cols
        tl.store(rewards + at, r, mask=inside)
        tl.store(dlogps + at, dl * factor, mask=inside)
        if TOTAL:
            total += value
        else:
            each = start + tl.arange(0, BLOCK_B)
            tl.store(loss + each, value, mask=each < B)
    if TOTAL:
        tl.store(loss, tl.sum(total, axis=0) * factor)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["losses", "loss"])
def _group_loss_sum_kernel(losses, loss, B, factor, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(losses + at, mask=at < B, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) * factor)


def _launch(name: str, K: int) -> dict[str, int | bool]:
    block_k = triton.next_power_of_2(K)
    block_j = min(block_k, max(_CUBE // block_k, 1), 32) if name in _COMPARING else 1
    # No fusing: beta * l - max must be 0 for the largest one, whatever its size.
    return {
        "BLOCK_B": max(min(_TILE // block_k, _CUBE // (block_k * block_j)), 1),
        "BLOCK_K": block_k,
        "BLOCK_J": block_j,
        "num_warps": _NUM_WARPS,
        "enable_fp_fusion": False,
    }


def group_loss_fwd(arguments: GroupLossArguments, loss: torch.Tensor, rewards: torch.Tensor, dlogps: torch.Tensor) -> None:
    """Write ``loss``, one float32 or [B] for reduction "none", ``rewards`` and ``dlogps``, both float32 [B, K]."""
    (B, K), q = arguments.logps.shape, arguments
    factor = 1.0 / max(B, 1) if q.reduction == "mean" else 1.0
    total = q.reduction != "none" and not q.wants_several_blocks()
    losses = loss if total or q.reduction == "none" else q.logps.new_empty(B)
    launch = _launch(q.name, K)
    programs = 1 if total else triton.cdiv(B, launch["BLOCK_B"])
    with torch.cuda.device_of(q.logps):
        _group_loss_fwd_kernel[(programs,)](
            q.logps,
            q.ref_logps,
            q.scores,
            q.mask,
            q.lengths,
            q.desirable,
            q.baseline,
            losses,
            rewards,
            dlogps,
            B,
            K,
            float(q.beta),
            float(q.alpha),
            float(q.label_smoothing),
            float(q.nll_weight),
            factor,
            LOSS=q.name,
            PAIRS=q.pairs,
            HAS_NLL=q.nll_weight > 0,
            TOTAL=total,
            **launch,
        )
        if losses is not loss:
            _group_loss_sum_kernel[(1,)](losses, loss, B, factor, BLOCK=1024, num_warps=_NUM_WARPS)
