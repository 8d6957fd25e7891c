"""Log-probs of labels, log softmax(z)[label] with z = softcap * tanh(scale * logits / softcap), and their gradient.

With ``stats`` of four rows, forward also writes the moment ``sum_v gap_v exp(gap_v)``, ``gap_v = z_v - max z``, from which the
entropy follows. With three rows, and without gradients of the log-sum-exp and the entropy, the compiled code contains neither.

A row is read as 16-byte words, counted from the boundary at or before its first element. So loads are vectorised at any stride,
offset and vocabulary size (a pad token makes many vocabularies odd), and alignment never causes a recompile. Elements of the first
and last word that belong to a neighbouring row are dropped. Reading them is safe, because a word never crosses a page.

In a tile [WORDS, VEC] a word lies in the registers of one thread. A maximum and a sum are kept for each of the WORDS places, and
threads combine theirs once, at the end of the row. The sums are rescaled once a word, which takes 1 + 1/VEC exponentials an
element. Two an element would saturate the H100's special-function units at its memory bandwidth in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The initial maximum. It is finite, so that -inf logits give exp(-inf - max) = 0 and not exp(-inf + inf) = NaN.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

# A gap z - max whose exponential is exactly 0 in float32. Gaps are clamped to it before they are multiplied by their exponential,
# because -inf * 0 is NaN.
_GONE = tl.constexpr(-128.0)

# One compiled kernel serves every shape: the compile key contains no integer's value and no address.
_SCALARS = [
    "T", "V", "stride_n", "stride_t", "dstride_n", "dstride_t", "ignore_index", "vocab_start", "vocab_total", "blocks",
]  # fmt: skip
_POINTERS = ["logits", "labels", "logps", "stats", "dlogps", "dlogits", "dlse", "dentropy"]


@triton.jit
def _exp(x):
    # The instruction of tl.exp, without the three around it that preserve results below 1e-38. Those become 0 here, which changes
    # neither a sum of at least 1 nor a gradient formed from it.
    # The maximum has been subtracted before the product with 1 / log(2), so logits of 1e4 lose nothing.
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _tanh(u):
    # libdevice's tanh does not exist in the interpreter. This is tanh of |u| with the sign of u: for u < 0 the quotient would be
    # near 2, and a GPU's division, which may be off by 2 ulp, would put that error into 1 - tanh^2. Near 0 the difference cancels;
    # there an odd polynomial is used, with a relative error of 1.5e-8 on |u| < 0.5.
    s = u * u
    near_zero = tl.fma(s, 0.017241834, -0.05304564)
    near_zero = tl.fma(s, near_zero, 0.1332588)
    near_zero = tl.fma(s, near_zero, -0.33333144)
    near_zero = tl.fma(u * s, near_zero, u)
    far = 1.0 - 2.0 / (tl.exp2(2.8853900 * tl.abs(u)) + 1.0)  # 2 / log(2)
    return tl.where(s < 0.25, near_zero, tl.where(u < 0.0, -far, far))


@triton.jit
def _scaled(logits, inner, softcap, HAS_SOFTCAP: tl.constexpr):
    """z and dz/dlogits / scale, where inner is scale / softcap, or scale without a softcap."""
    z = logits.to(tl.float32) * inner
    slope = 1.0
    if HAS_SOFTCAP:
        t = _tanh(z)
        z = softcap * t
        slope = 1.0 - t * t
    return z, slope


@triton.jit
def _first_word(row, VEC: tl.constexpr):
    """The 16-byte boundary at or before a row, and the number of elements between them."""
    lead = ((row.to(tl.int64) % 16) * VEC // 16).to(tl.int32)
    return tl.multiple_of(row - lead, 16), lead


@triton.jit
def _online(top, total, moment, z, HAS_MOMENT: tl.constexpr):
    """Update the running maximum, sum of exponentials and moment [WORDS] with z [WORDS, VEC]. The sums keep a NaN."""
    new = tl.maximum(top, tl.max(z, axis=1))
    drop = top - new
    kept = _exp(drop)
    gaps = z - new[:, None]
    odds = _exp(gaps)
    if HAS_MOMENT:
        moment = tl.fma(tl.maximum(drop, _GONE), total, moment)  # of the gaps to the new maximum
        moment = tl.fma(moment, kept, tl.sum(odds * tl.maximum(gaps, _GONE), axis=1))
    return new, tl.fma(total, kept, tl.sum(odds, axis=1)), moment


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_POINTERS)
def _token_logps_fwd_kernel(
    logits,  # [N, T, V]
    labels,  # [N, T]
    logps,  # [N, T]
    stats,  # [3, N, T], or [4, N, T] with the moment
    T,
    V,
    stride_n,
    stride_t,
    ignore_index,
    vocab_start,
    vocab_total,
    inner,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    WORDS: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0)
    n, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    label = tl.load(labels + row)
    ignored = label == ignore_index
    if ignored | (label < 0) | (label >= vocab_total):
        fill = tl.where(ignored, 0.0, float("nan"))
        tl.store(logps + row, fill)
        tl.store(stats + row, fill)
        tl.store(stats + rows + row, fill + 1.0)
        tl.store(stats + 2 * rows + row, fill)
        if HAS_MOMENT:
            tl.store(stats + 3 * rows + row, fill)
        return

    first = logits + n * stride_n + t * stride_t
    column = label - vocab_start
    here = (column >= 0) & (column < V)
    # Used only after the loops: before them, the row would wait for its label, then for this load, then for its first words.
    at_label = tl.load(first + column, mask=here, other=0.0)

    BLOCK: tl.constexpr = WORDS * VEC
    first, lead = _first_word(first, VEC)
    end = lead + V
    last = (tl.cdiv(end, BLOCK) - 1) * BLOCK
    words = tl.arange(0, WORDS)[:, None] * VEC
    lanes = tl.arange(0, VEC)[None, :]
    top = tl.full([WORDS], _LOWEST, tl.float32)
    total = tl.zeros([WORDS], tl.float32)
    moment = tl.zeros([WORDS], tl.float32)
    # The first and the last block, which are the same one in a short row, need masks; the blocks between do not. One unsigned
    # comparison covers both ends: a position before the row becomes a large number.
    for start in range(0, end, tl.maximum(last, BLOCK)):
        at = start + words + lanes
        x = tl.load(first + at, mask=start + words < end, other=0.0)
        z = _scaled(x, inner, softcap, HAS_SOFTCAP)[0]
        z = tl.where((at - lead).to(tl.uint32) < V.to(tl.uint32), z, float("-inf"))
        top, total, moment = _online(top, total, moment, z, HAS_MOMENT)
    for start in range(BLOCK, last, BLOCK):
        z = _scaled(tl.load(first + (start + words + lanes)), inner, softcap, HAS_SOFTCAP)[0]
        top, total, moment = _online(top, total, moment, z, HAS_MOMENT)

    target = tl.where(here, _scaled(at_label, inner, softcap, HAS_SOFTCAP)[0], 0.0)
    row_top = tl.max(top, axis=0)
    drop = top - row_top
    kept = _exp(drop)
    if HAS_MOMENT:
        # The entropy is a difference of both sums: in float32, these few additions would be most of its error.
        moments = tl.fma(tl.maximum(drop, _GONE), total, moment) * kept
        tl.store(stats + 3 * rows + row, tl.sum(moments.to(tl.float64), axis=0).to(tl.float32))
        row_total = tl.sum((total * kept).to(tl.float64), axis=0).to(tl.float32)
    else:
        row_total = tl.sum(total * kept, axis=0)
    row_top = tl.where(row_total == 0.0, float("-inf"), row_top)  # every logit is -inf
    tl.store(logps + row, target - row_top - tl.log(row_total))
    tl.store(stats + row, row_top)
    tl.store(stats + rows + row, row_total)
    tl.store(stats + 2 * rows + row, target)


@triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=_POINTERS)
def _token_logps_bwd_kernel(
    dlogps,  # [N, T]
    logits,  # [N, T, V]
    labels,  # [N, T]
    stats,  # [3, N, T], or [4, N, T] with the moment
    dlogits,  # [N, T, V]
    dlse,  # [N, T] or None
    dentropy,  # [N, T] or None
    T,
    V,
    stride_n,
    stride_t,
    dstride_n,
    dstride_t,
    ignore_index,
    vocab_start,
    vocab_total,
    blocks,
    inner,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ALIKE: tl.constexpr,  # a row of dlogits begins at the same offset in its 16-byte word as the row of logits
    WORDS: tl.constexpr,
    VEC: tl.constexpr,
):
    BLOCK: tl.constexpr = WORDS * VEC
    row = tl.program_id(0) // blocks
    n, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    rows = (tl.num_programs(0) // blocks).to(tl.int64)
    label = tl.load(labels + row)
    dlogp = tl.load(dlogps + row)
    row_top = tl.load(stats + row)
    row_total = tl.load(stats + rows + row)
    target = tl.load(stats + 2 * rows + row)
    dlogp = tl.where((label >= 0) & (label < vocab_total), dlogp, float("nan"))

    first, lead = _first_word(logits + n * stride_n + t * stride_t, VEC)
    dfirst = dlogits + n * dstride_n + t * dstride_t - lead
    if ALIKE:
        dfirst = tl.multiple_of(dfirst, 16)
    end = lead + V
    words = start + tl.arange(0, WORDS)[:, None] * VEC
    at = words + tl.arange(0, VEC)[None, :]

    # dz = dlogp (onehot - p) + dlse p - dentropy p (log p + H), where log p + H = gap - moment / total. So each column is
    # p (per_p + per_gap * gap), and the label's column has dlogp (1 - p) in place of -dlogp p.
    # 1 - p at the label is -expm1(logp) = -2h / (1 - h) with h = tanh(logp / 2), which is accurate where p is near 1.
    half = _tanh(0.5 * (target - row_top - tl.log(row_total)))
    at_label = dlogp * (-2.0 * half / (1.0 - half))
    inverse = 1.0 / row_total
    per_p = 0.0
    per_gap = 0.0
    if dlse is not None:
        per_p += tl.load(dlse + row)
    if dentropy is not None:
        per_gap = -tl.load(dentropy + row)
        per_p -= per_gap * (tl.load(stats + 3 * rows + row) / row_total)
    if (dlse is not None) or (dentropy is not None):
        gap = tl.maximum(target - row_top, _GONE)
        at_label += _exp(gap) * inverse * (per_p + per_gap * gap)
    scale = inner * softcap if HAS_SOFTCAP else inner
    at_label *= scale
    per_p = (per_p - dlogp) * inverse * scale
    per_gap = per_gap * inverse * scale

    grad = tl.zeros([WORDS, VEC], tl.float32)
    if label != ignore_index:
        z, slope = _scaled(tl.load(first + at, mask=words < end, other=0.0), inner, softcap, HAS_SOFTCAP)
        gaps = z - row_top
        factor = per_p
        if dentropy is not None:
            factor = tl.fma(tl.maximum(gaps, _GONE), per_gap, per_p)
        label_at = (label - vocab_start + lead).to(tl.int32)
        grad = tl.where(at == label_at, at_label, _exp(gaps) * factor) * slope

    grad = grad.to(dlogits.dtype.element_ty)
    whole = (words >= lead) & (words + VEC <= end)
    tl.store(dfirst + at, grad, mask=whole)
    if (start < lead) | (start + BLOCK > end):  # words shared with a neighbouring row
        tl.store(dfirst + at, grad, mask=(at >= lead) & (at < end) & (whole == 0))


def _transform(scale: float, softcap: float | None) -> dict[str, float | bool]:
    if softcap is None:
        return {"inner": float(scale), "softcap": 0.0, "HAS_SOFTCAP": False}
    return {"inner": scale / softcap, "softcap": float(softcap), "HAS_SOFTCAP": True}


def _launch(V: int, itemsize: int, words_per_thread: int, trips: int, most_warps: int) -> dict[str, int | bool]:
    """As many warps, a power of two, as read a row in about `trips` blocks with `words_per_thread` words in each thread."""
    bytes_per_warp = 32 * words_per_thread * 16 * trips
    num_warps = min(triton.next_power_of_2(triton.cdiv(V * itemsize, bytes_per_warp)), most_warps)
    # If the compiler fused scale * logits - max, the product would be exact here and rounded in max: at |z| = 1e4,
    # exp(max - max) could then differ from 1 by 5e-4. The kernels call tl.fma where they want fusing.
    return {
        "WORDS": 32 * num_warps * words_per_thread,
        "VEC": 16 // itemsize,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }


def _fwd_launch(V: int, itemsize: int, softcap: float | None, has_moment: bool) -> dict[str, int | bool]:
    """One row for each program: from 1 warp (rows up to 8 KiB) to 16 (more than 64 KiB).

    Four words a thread are four loads in flight: with 1024 threads on a multiprocessor, 64 KiB, about three times what an H100's
    memory latency needs. With 32 warps two programs would no longer fit on a multiprocessor, and the start of a row would wait for
    the end of another.
    """
    # With the moment or a softcap, four words take 64 registers or more, and spill on some GPUs (sm_100, sm_120). Two take 40 to
    # 56. Then 1024 threads with two loads in flight each have 32 KiB, which is still more than the latency needs.
    words = 2 if has_moment or softcap is not None else 4
    launch = _launch(V, itemsize, words_per_thread=words, trips=16 // words, most_warps=16)
    # With maxnreg=64, ptxas issues all four loads first. Without it, ptxas takes 32 to 51 registers (Triton 3.6), issues two or
    # three loads, and the others between the arithmetic. With a softcap, 64 registers are too few on sm_100.
    return launch if softcap is not None else {**launch, "maxnreg": 64}


def _bwd_launch(V: int, itemsize: int) -> dict[str, int | bool]:
    """A block of up to 8 KiB for each program, without a loop: few rows still fill the GPU.

    Two words a thread: four would take 80 registers or more for 16-bit logits, and fewer threads would fit.
    """
    return _launch(V, itemsize, words_per_thread=2, trips=1, most_warps=8)


def _row_strides(logits: torch.Tensor) -> tuple[int, int]:
    """The strides between rows [N, T]; 0 for a dimension of size 1, whose stride no address depends on."""
    stride_n, stride_t = (stride if size > 1 else 0 for size, stride in zip(logits.shape[:2], logits.stride()[:2], strict=True))
    return stride_n, stride_t


def token_logps_fwd(
    logits: torch.Tensor,  # [N, T, V], last stride 1
    labels: torch.Tensor,  # [N, T] int64
    logps: torch.Tensor,  # [N, T] float32, out
    stats: torch.Tensor,  # [3, N, T] float32, or [4, N, T] for the moment as well; out
    *,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    vocab_start: int,
    vocab_total: int,
) -> None:
    """Write the log-probs and the statistics of every row: one read of ``logits``."""
    N, T, V = logits.shape
    has_moment = len(stats) == 4
    if N * T == 0:
        return
    with torch.cuda.device_of(logits):
        _token_logps_fwd_kernel[(N * T,)](
            logits,
            labels,
            logps,
            stats,
            T,
            V,
            *_row_strides(logits),
            ignore_index,
            vocab_start,
            vocab_total,
            HAS_MOMENT=has_moment,
            **_transform(scale, softcap),
            **_fwd_launch(V, logits.element_size(), softcap, has_moment),
        )


def token_logps_bwd(
    dlogps: torch.Tensor,  # [N, T] float32
    logits: torch.Tensor,  # [N, T, V], last stride 1
    labels: torch.Tensor,  # [N, T] int64
    stats: torch.Tensor,  # [3, N, T] float32, or [4, N, T]
    dlogits: torch.Tensor,  # [N, T, V], last stride 1, out; may be logits itself
    *,
    dlse: torch.Tensor | None = None,  # [N, T] float32
    dentropy: torch.Tensor | None = None,  # [N, T] float32; needs the moment
    ignore_index: int,
    scale: float,
    softcap: float | None,
    vocab_start: int,
    vocab_total: int,
) -> None:
    """Write ``dlogits`` from the statistics of forward: one read of ``logits`` and one write."""
    N, T, V = logits.shape
    if N * T == 0:
        return
    itemsize = logits.element_size()
    launch = _bwd_launch(V, itemsize)
    strides, dstrides = _row_strides(logits), _row_strides(dlogits)
    aligned = all(x % 16 == 0 for x in (logits.data_ptr(), *(s * itemsize for s in strides)))
    shifts = [(a - b) * itemsize for a, b in zip(strides, dstrides, strict=True)]
    alike = all(x % 16 == 0 for x in (logits.data_ptr() - dlogits.data_ptr(), *shifts))
    blocks = triton.cdiv(V + (0 if aligned else launch["VEC"] - 1), launch["WORDS"] * launch["VEC"])
    with torch.cuda.device_of(logits):
        _token_logps_bwd_kernel[(N * T * blocks,)](
            dlogps,
            logits,
            labels,
            stats,
            dlogits,
            dlse,
            dentropy,
            T,
            V,
            *strides,
            *dstrides,
            ignore_index,
            vocab_start,
            vocab_total,
            blocks,
            ALIKE=alike,
            **_transform(scale, softcap),
            **launch,
        )
