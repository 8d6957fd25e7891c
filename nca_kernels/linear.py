"""Family (b): log-probs from hidden states and the head's weight, without ever holding the logits of all tokens.

Scored rows are gathered first, so ignored tokens cost no arithmetic. Then tiles, a block of rows by a slice of the
vocabulary: PyTorch's GEMM into one reused buffer, and the backend's row kernels on it. The statistics of a slice are
those of a smaller softmax; :func:`merge` puts them together, be they slices of one head or the ranks' of a
vocabulary-parallel one. ``docs/math.md`` derives it; the operators around this file are in :mod:`nca_kernels.ops`.

Shapes: ``hidden [M, D]``, ``weight [V, D]``, ``bias [V]``, ``labels [M]``, ``stats [3, M]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import parallel
from .tiles import ALIGNED, ProductSum, product, split, tile_shape


@dataclass
class Head:
    """The columns from ``vocab_start`` of a vocabulary of ``vocab_total``, and what makes statistics and gradients of a tile."""

    weight: Tensor
    bias: Tensor | None
    kernels: Any  # the backend
    ignore_index: int
    scale: float
    softcap: float | None
    vocab_start: int
    vocab_total: int

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> None:
        weight = self.weight[columns].t()
        if self.bias is None:
            torch.mm(hidden, weight, out=out)
        else:
            torch.addmm(self.bias[columns], hidden, weight, out=out)

    def stats(self, logits: Tensor, labels: Tensor, columns: slice, out: Tensor) -> None:
        logps = torch.empty_like(labels, dtype=torch.float32)  # under the slice's own softmax: of no use
        self.kernels.token_logps_fwd(logits[None], labels[None], logps[None], out[:, None], **self._settings(columns))

    def dlogits(self, dlogps: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, columns: slice, out: Tensor) -> None:
        self.kernels.token_logps_bwd(dlogps[None], logits[None], labels[None], stats[:, None], out[None], **self._settings(columns))

    def _settings(self, columns: slice) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "scale": self.scale,
            "softcap": self.softcap,
            "vocab_start": self.vocab_start + columns.start,
            "vocab_total": self.vocab_total,
        }

    def holds(self, labels: Tensor, columns: slice) -> Tensor:
        """Is the label's column among these?"""
        column = labels - self.vocab_start
        return (column >= columns.start) & (column < columns.stop)

    def dtarget(self, labels: Tensor, target: Tensor) -> Tensor:
        """``d target / d hidden [M, D]`` in float32; meaningless where another rank holds the label's column."""
        column = (labels - self.vocab_start).clamp(0, len(self.weight) - 1)
        dtarget = self.weight.index_select(0, column).float().mul_(self.scale)
        return dtarget if self.softcap is None else dtarget.mul_((1 - (target / self.softcap).square())[:, None])


# --- slices of a vocabulary ------------------------------------------------------------------------------------------


def merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    """From the statistics of P slices, ``parts [P, 3, M]``: the whole's ``[3, M]``, and each slice's probability ``[P, M]``.

    A slice of nothing but -inf has the maximum -inf, the sum 0 and the probability 0. NaN stays NaN.
    """
    maxima, sums, targets = parts.unbind(1)
    top = maxima.amax(0)
    # Equal maxima take no exponential: -inf - (-inf) is NaN.
    sums = torch.where(maxima == top, sums, sums * (maxima - top).exp())
    total = sums.sum(0)
    return torch.stack((top, total, targets.sum(0))), sums / total.masked_fill(total == 0, 1.0)


def missing_target(shares: Tensor, holds: Tensor) -> Tensor:
    """What lacks of the label's onehot once each slice's ``onehot - p`` is weighted by its share; both are ``[P, M]``.

    The other slices' shares, as a sum: ``1 - share`` would cancel where the label is likely.
    """
    return shares.masked_fill(holds, 0.0).sum(0) * holds.any(0)


class SlicedGradient:
    """``u = dlogp/dhidden`` of a block of rows in one pass over the slices, each taken by its own statistics.

    ``u`` so far belongs to the softmax over the columns so far; with a slice more, both shrink to their shares.
    """

    def __init__(self, head: Head, labels: Tensor, D: int):
        self.head, self.labels = head, labels
        self.ones = torch.ones_like(labels, dtype=torch.float32)
        self.stats = torch.stack((self.ones * -torch.inf, self.ones * 0.0, self.ones * 0.0))
        self.u = self.ones.new_zeros((len(labels), D))
        self.missing = torch.zeros_like(self.ones)
        self.seen = torch.zeros_like(labels, dtype=torch.bool)

    def add(self, logits: Tensor, part: Tensor, columns: slice) -> None:
        """One slice, given its statistics; overwrites ``logits``."""
        here = self.head.holds(self.labels, columns)
        self.stats, shares = merge(torch.stack((self.stats, part)))
        self.missing.mul_(shares[0]).add_(missing_target(shares, torch.stack((self.seen, here))))
        self.seen |= here
        # Columns of nothing but -inf: with the maximum 0 and the sum 1 their p is 0, not NaN.
        empty = (part[0] == -torch.inf) & (part[1] == 0)
        part = torch.stack((part[0].masked_fill(empty, 0.0), part[1].masked_fill(empty, 1.0), part[2]))
        self.head.dlogits(self.ones, logits, self.labels, part, columns, out=logits)
        term = torch.empty_like(self.u)
        product(logits, self.head.weight[columns], out=term)
        self.u.mul_(shares[0, :, None]).addcmul_(term, shares[1, :, None])

    def result(self) -> Tensor:
        return self.u.addcmul_(self.head.dtarget(self.labels, self.stats[2]), self.missing[:, None])


def merge_ranks(head: Head, labels: Tensor, stats: Tensor, u: Tensor, blocks: list[slice], group: str) -> None:
    """In place: this rank's statistics become the whole vocabulary's, and its ``u``, if any, an addend to the whole's."""
    rank, parts = parallel.all_gather(stats, group)
    merged, shares = merge(parts)
    stats.copy_(merged)
    holds = torch.zeros_like(shares, dtype=torch.bool)
    holds[rank] = head.holds(labels, slice(0, len(head.weight)))
    missing = missing_target(shares, holds)
    for block in blocks if len(u) else []:
        dtarget = head.dtarget(labels[block], stats[2, block])
        u[block].mul_(shares[rank, block, None]).addcmul_(dtarget, missing[block, None])


# --- rows and tiles --------------------------------------------------------------------------------------------------


def is_captured(values: Tensor) -> bool:
    """Is a CUDA graph recording what is done to these? It cannot wait for a number of theirs."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def scored_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """The indices of the rows with a label, ``None`` for all.

    On a GPU their number is worth one sync: it is what makes ignored rows free. A CUDA graph keeps all rows; the row
    kernels leave the ignored ones out.
    """
    if is_captured(labels):
        return None
    rows = (labels != ignore_index).nonzero().squeeze(1)
    return None if len(rows) == len(labels) else rows


def room_to_keep(kept: Tensor) -> Tensor:
    """The part of ``kept`` for logits; its last element says whether they are there.

    A graph keeps none: it has all rows where a forward or backward outside of it has the scored ones, so the one would find
    the other's logits in the wrong place.
    """
    if kept.numel() == 0:
        return kept
    fills = not is_captured(kept)
    kept[-1].fill_(float(fills))
    return kept[:-1] if fills else kept[:0]


def kept_logits(kept: Tensor) -> Tensor:
    """The logits that forward has kept."""
    there = kept.numel() > 0 and not is_captured(kept) and bool(kept[-1])
    return kept[:-1] if there else kept[:0]


def gather(values: Tensor, rows: Tensor | None, dim: int = 0) -> Tensor:
    return values if rows is None else values.index_select(dim, rows)


def scatter(values: Tensor, rows: Tensor | None, M: int, dim: int = 0) -> Tensor:
    """The inverse of :func:`gather`, zeros elsewhere."""
    if rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = M
    return values.new_zeros(shape).index_copy_(dim, rows, values)


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


class Tiling:
    """The rows in blocks, the columns in slices, a buffer for one tile, and room for the logits that are kept."""

    def __init__(self, head: Head, hidden: Tensor, kept: Tensor, frozen: bool):
        M, V = len(hidden), len(head.weight)
        rows, columns = tile_shape(M, V, hidden.dtype, hidden.device, frozen)
        stored = min(V, kept.numel() // max(M, 1))
        stored = stored if stored == V else stored // ALIGNED * ALIGNED
        self.store = kept[: M * stored].view(M, stored)
        self.blocks = split(M, rows)
        self.slices = split(stored, columns, ALIGNED)
        self.slices += [slice(stored + s.start, stored + s.stop) for s in split(V - stored, columns, ALIGNED)]
        self.buffer = hidden.new_empty(rows * _aligned(columns))

    def tile(self, block: slice, columns: slice) -> Tensor:
        """Its rows start at multiples of ``ALIGNED``, also where V is odd: for the GEMMs that write and read it."""
        rows, width = block.stop - block.start, columns.stop - columns.start
        return self.buffer[: rows * _aligned(width)].view(rows, -1)[:, :width]

    def logits(self, block: slice, columns: slice) -> tuple[Tensor, bool]:
        """Where a tile's logits belong, and whether they are kept there."""
        kept = columns.stop <= self.store.shape[1]
        return self.store[block, columns] if kept else self.tile(block, columns), kept


# --- the passes ------------------------------------------------------------------------------------------------------


def forward(head: Head, hidden: Tensor, labels: Tensor, kept: Tensor, frozen: bool, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """``logps [M]``, ``stats [3, M]`` and, for a ``frozen`` head, ``u = dlogp/dhidden [M, D]``, else an empty tensor.

    ``kept`` is flat room for logits, where as many columns as fit stay for :func:`backward` (:func:`room_to_keep`). With a
    ``group``, ``u`` is this rank's addend to the sum over ranks, in float32.
    """
    rows = scored_rows(labels, head.ignore_index)
    x, y = gather(hidden, rows), gather(labels, rows)
    M, D = x.shape
    tiling = Tiling(head, x, room_to_keep(kept), frozen)
    stats = x.new_empty((3, M), dtype=torch.float32)
    u = x.new_empty((M if frozen else 0, D), dtype=torch.float32 if group else x.dtype)
    one_slice = len(tiling.slices) == 1 and not group
    for block in tiling.blocks:
        parts = stats.new_empty((len(tiling.slices), 3, len(y[block])))
        sliced = SlicedGradient(head, y[block], D) if frozen and not one_slice else None
        for part, columns in zip(parts, tiling.slices, strict=True):
            logits, _ = tiling.logits(block, columns)
            head.logits(x[block], columns, out=logits)
            head.stats(logits, y[block], columns, out=part)
            if sliced:
                sliced.add(logits, part, columns)
            elif frozen:
                head.dlogits(torch.ones_like(part[0]), logits, y[block], part, columns, out=logits)
                torch.mm(logits, head.weight, out=u[block])
        stats[:, block] = merge(parts)[0]
        if sliced:
            u[block] = sliced.result()
    if group and M:
        merge_ranks(head, y, stats, u, tiling.blocks, group)
    logps = ((stats[2] - stats[0]) - stats[1].log()).masked_fill_(y == head.ignore_index, 0.0)
    everywhere = len(labels)
    u = scatter(u, rows, everywhere) if frozen else u
    return scatter(logps, rows, everywhere), scatter(stats, rows, everywhere, dim=1), u


def frozen_backward(dlogps: Tensor, labels: Tensor, u: Tensor, ignore_index: int, dtype: torch.dtype, group: str) -> Tensor:
    """``dhidden`` where the head is frozen: ``u``, each row scaled."""
    dhidden = u * dlogps.masked_fill(labels == ignore_index, 0.0)[:, None]
    return (parallel.all_reduce(dhidden, group) if group else dhidden).to(dtype)


def backward(
    head: Head,
    dlogps: Tensor,
    hidden: Tensor,
    labels: Tensor,
    stats: Tensor,
    kept: Tensor,
    needs: list[bool],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dhidden``, ``dweight`` and ``dbias``, each empty unless ``needs`` says so, from logits kept or made again.

    Slices outside, blocks inside: a slice of dweight is then whole before the next, with no float32 copy of all of it.
    """
    rows = scored_rows(labels, head.ignore_index)
    x, y, dy = gather(hidden, rows), gather(labels, rows), gather(dlogps, rows)
    stats = gather(stats, rows, dim=1)
    tiling = Tiling(head, x, kept_logits(kept), frozen=False)
    blocks = tiling.blocks
    dx = torch.empty_like(x, dtype=torch.float32 if group else x.dtype) if needs[0] else x.new_empty(0)
    dweight = x.new_empty(head.weight.shape if needs[1] else 0)
    dbias = x.new_empty(len(head.weight) if needs[2] else 0)
    if not blocks:  # no scored row, so no product to write them
        dweight.zero_()
        dbias.zero_()
    dx_sums = [ProductSum(dx[block], len(tiling.slices)) for block in blocks] if needs[0] else []
    ones = x.new_ones((1, len(x)))
    for columns in tiling.slices:
        dweight_sum = ProductSum(dweight[columns], len(blocks)) if needs[1] else None
        dbias_sum = ProductSum(dbias[None, columns], len(blocks)) if needs[2] else None
        for i, block in enumerate(blocks):
            logits, kept_there = tiling.logits(block, columns)
            if not kept_there:
                head.logits(x[block], columns, out=logits)
            dlogits = tiling.tile(block, columns)  # kept logits stay, for a second backward
            head.dlogits(dy[block], logits, y[block], stats[:, block].contiguous(), columns, out=dlogits)
            if needs[0]:
                dx_sums[i].add(dlogits, head.weight[columns])
            if needs[1]:
                dweight_sum.add(dlogits.t(), x[block])
            if needs[2]:
                dbias_sum.add(ones[:, block], dlogits)
    if needs[0] and group and len(x):
        parallel.all_reduce(dx, group)
    dhidden = scatter(dx.to(x.dtype), rows, len(labels)) if needs[0] else dx
    return dhidden, dweight, dbias
