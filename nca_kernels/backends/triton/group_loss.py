"""The K-way losses: loss, implicit rewards and dloss/dlogps of every prompt in one launch.

A group is small (B = 64, K = 4), so the launch is the cost, not the arithmetic. One program takes all prompts, in tiles
[BLOCK_B, BLOCK_K], and adds up their losses in a fixed order: no second launch, no atomics.

In the names below l = logps - ref_logps, r = beta * l, s = scores (-inf where not valid); every loss gives its values
[BLOCK_B] and its derivatives dr or dl [BLOCK_B, BLOCK_K], 0 where not valid. Entries that are not valid are never
loaded, so they cannot matter. Sources: InfoNCA and NCA, Chen et al. 2024 (arXiv 2402.05369); DPO, Rafailov et al. 2023
(arXiv 2305.18290); IPO, Azar et al. 2023 (arXiv 2310.12036); KTO, Ethayarajh et al. 2024 (arXiv 2402.01306).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...loss_table import GroupLossArguments

_TILE = 512  # four elements for each thread of the program's four warps
_NUM_WARPS = 4

# One compiled kernel serves every shape: no integer's value and no address enters the compile key.
_SCALARS = ["B", "K"]
_POINTERS = [
    "logps", "ref_logps", "scores", "mask", "lengths", "desirable", "baseline", "loss", "rewards", "dlogps",
]  # fmt: skip


@triton.jit
def _log1p(x):
    # log(1 + x) loses what 1 + x rounds away; the factor x / ((1 + x) - 1) gives it back.
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
def _weights(s, best, valid, alpha):
    """w = softmax(s / alpha). The difference comes first (s / alpha may be 1e7); alpha = 0 sends all gaps to -inf."""
    odds = tl.where(valid, tl.exp(tl.where(s == best, 0.0, (s - best) / alpha)), 0.0)
    total = tl.sum(odds, axis=1)[:, None]
    return odds / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _info_nca(r, w, valid):
    top = tl.max(tl.where(valid, r, float("-inf")), axis=1)[:, None]
    gaps = tl.where(valid, r - top, 0.0)
    odds = tl.where(valid, tl.exp(gaps), 0.0)
    total = tl.sum(odds, axis=1)[:, None]
    total = tl.where(total == 0.0, 1.0, total)
    return tl.sum(w * (tl.log(total) - gaps), axis=1), odds / total - w


@triton.jit
def _nca(r, w, valid, count):
    terms = w * _log_sigmoid(r) + _log_sigmoid(-r) / count
    dr = _sigmoid(r) / count - w * _sigmoid(-r)
    return -tl.sum(tl.where(valid, terms, 0.0), axis=1), tl.where(valid, dr, 0.0)


@triton.jit
def _pair_term(margin, beta, LOSS: tl.constexpr):
    """A pair's loss and its derivative."""
    if LOSS == "dpo":
        term = -_log_sigmoid(margin)
        slope = -_sigmoid(-margin)
    else:
        term = (margin - 0.5 / beta) * (margin - 0.5 / beta)
        slope = 2.0 * (margin - 0.5 / beta)
    return term, slope


@triton.jit
def _pairwise(x, s, best, valid, cols, K, beta, LOSS: tl.constexpr, PAIRS: tl.constexpr):
    """The mean over pairs of a loss of x_i - x_j. Against one column j at a time: no [K, K] tile, so K has no bound."""
    value = tl.zeros_like(x)
    dx = tl.zeros_like(x)
    pairs = tl.zeros_like(x)
    for j in range(K):
        x_j = tl.sum(tl.where(cols == j, x, 0.0), axis=1)[:, None]
        s_j = tl.sum(tl.where(cols == j, s, 0.0), axis=1)[:, None]
        # s is -inf where not valid, which is better than nothing; the other side is looked at.
        better = (s > s_j) & (tl.sum(tl.where((cols == j) & valid, 1.0, 0.0), axis=1)[:, None] > 0.0)
        worse = (s < s_j) & valid
        if PAIRS == "best_vs_rest":
            better = better & (s == best)
            worse = worse & (s_j == best)
        term, slope = _pair_term(x - x_j, beta, LOSS)
        _, slope_of_worse = _pair_term(x_j - x, beta, LOSS)
        value += tl.where(better, term, 0.0)
        pairs += tl.where(better, 1.0, 0.0)
        dx += tl.where(better, slope, 0.0) - tl.where(worse, slope_of_worse, 0.0)
    count = tl.maximum(tl.sum(pairs, axis=1), 1.0)
    return tl.sum(value, axis=1) / count, dx / count[:, None]


@triton.jit
def _kto(l, z, desirable, valid, beta, count):  # noqa: E741
    sign = tl.where(desirable, beta, -beta)
    gain = sign * (l - z)
    unlikely = _sigmoid(-gain)  # 1 - sigmoid(gain), without the cancellation
    dl = -sign * _sigmoid(gain) * unlikely / count
    return tl.sum(tl.where(valid, unlikely / count, 0.0), axis=1), tl.where(valid, dl, 0.0)


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_POINTERS)
def _group_loss_fwd_kernel(
    logps,  # [B, K]
    ref_logps,  # [B, K]
    scores,  # [B, K]
    mask,  # [B, K] or None
    lengths,  # [B, K] or None
    desirable,  # [B, K] or None
    baseline,  # [1] or None
    loss,  # [1], or [B] for reduction "none"
    rewards,  # [B, K]
    dlogps,  # [B, K]
    B,
    K,
    beta,
    alpha,
    factor,  # the reduction's
    LOSS: tl.constexpr,
    PAIRS: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        at = rows.to(tl.int64)[:, None] * K + cols
        inside = (rows[:, None] < B) & (cols < K)
        valid = inside
        if mask is not None:
            valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        l = tl.load(logps + at, mask=valid, other=0.0) - tl.load(ref_logps + at, mask=valid, other=0.0)  # noqa: E741
        s = tl.load(scores + at, mask=valid, other=float("-inf"))
        r = beta * l
        best = tl.max(s, axis=1)[:, None]
        count = tl.maximum(tl.sum(tl.where(valid, 1.0, 0.0), axis=1), 1.0)[:, None]

        if LOSS == "info_nca":
            value, dr = _info_nca(r, _weights(s, best, valid, alpha), valid)
            dl = beta * dr
        elif LOSS == "nca":
            value, dr = _nca(r, _weights(s, best, valid, alpha), valid, count)
            dl = beta * dr
        elif LOSS == "dpo":
            value, dr = _pairwise(r, s, best, valid, cols, K, beta, LOSS, PAIRS)
            dl = beta * dr
        elif LOSS == "ipo":
            per_token = tl.full([BLOCK_B, BLOCK_K], 1.0, tl.float32)
            if lengths is not None:
                # Here and below not tl.maximum, which would hide NaN.
                n = tl.load(lengths + at, mask=valid, other=1.0)
                per_token = 1.0 / tl.where(n < 1.0, 1.0, n)
            value, dx = _pairwise(l * per_token, s, best, valid, cols, K, beta, LOSS, PAIRS)
            dl = dx * per_token
        else:
            z = 0.0
            if baseline is not None:
                z = tl.load(baseline)
                z = tl.where(z < 0.0, 0.0, z)
            good = s == best
            if desirable is not None:
                good = tl.load(desirable + at, mask=valid, other=0) != 0
            value, dl = _kto(l, z, good, valid, beta, count)

        tl.store(rewards + at, r, mask=inside)
        tl.store(dlogps + at, dl * factor, mask=inside)
        if REDUCED:
            total += value
        else:
            tl.store(loss + rows, value, mask=rows < B)
    if REDUCED:
        tl.store(loss, tl.sum(total, axis=0) * factor)


def _launch(K: int) -> dict[str, int | bool]:
    block_k = triton.next_power_of_2(K)
    # No fusing: beta * l - max must be 0 for the largest, however large it is.
    return {
        "BLOCK_B": max(_TILE // block_k, 1),
        "BLOCK_K": block_k,
        "num_warps": _NUM_WARPS,
        "enable_fp_fusion": False,
    }


def group_loss_fwd(arguments: GroupLossArguments, loss: torch.Tensor, rewards: torch.Tensor, dlogps: torch.Tensor) -> None:
    """Write ``loss``, one float32 or [B] for reduction "none", ``rewards`` and ``dlogps``, both float32 [B, K]."""
    (B, K), q = arguments.logps.shape, arguments
    with torch.cuda.device_of(q.logps):
        _group_loss_fwd_kernel[(1,)](
            q.logps,
            q.ref_logps,
            q.scores,
            q.mask,
            q.lengths,
            q.desirable,
            q.baseline,
            loss,
            rewards,
            dlogps,
            B,
            K,
            float(q.beta),
            float(q.alpha),
            1.0 / max(B, 1) if q.reduction == "mean" else 1.0,
            LOSS=q.name,
            PAIRS=q.pairs,
            REDUCED=q.reduction != "none",
            **_launch(K),
        )
