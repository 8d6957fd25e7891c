"""A head whose gradients leave out, for each row, slices of the vocabulary with next to no probability (``skip_mass``).

The columns of the vocabulary are sorted by their mean logit over the batch and cut into :data:`SLICES` slices, so that few slices
hold most of the probability. Forward computes every statistic exactly, and with them each row's probability of each slice.
Backward gathers, for each slice, the rows in which it stays, so its GEMMs are dense and have fewer rows. ``docs/math.md``, section
4, bounds the error; ``docs/tuning.md`` has what was measured.

Shapes: ``hidden [M, D]``, ``weight [V, D]``, ``labels [M]``, ``stats [3 or 4, M]``, ``order [V]``, ``stays [S, M]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear, memory, parallel
from .linear import Rows, gather, scatter
from .linear_head import Head, Settings, Upstream
from .slices import merge, merge_ranks
from .tiles import ProductSum, Tiling, aligned, product, split

# More slices leave out more of the logits and take more gathers (docs/tuning.md).
SLICES = 32

# The label of ignored rows. The other labels are replaced by their columns' places in the order, which may be any number from 0 on,
# and a label that is no column stays as it is, so that the row kernels find it.
_IGNORED = -(1 << 62)


def slice_width(V: int) -> int:
    """The columns of a slice; the last slice may have fewer."""
    return aligned(-(-V // SLICES))


def is_used(settings: Settings) -> bool:
    """Whether backward leaves out slices, so that forward must say which."""
    return settings.skip_mass > 0 and settings.mode == "trained"


def stays_shape(M: int, V: int) -> tuple[int, int]:
    """The shape of ``stays``: a row for each slice."""
    return -(-V // slice_width(V)), M


class Forward(NamedTuple):
    """The results of :func:`forward`."""

    stats: Tensor  # [3 or 4, M]; (0, 1, 0, 0) where ignored
    order: Tensor  # int64 [V], the columns in the order of their mean logit, sorted within a slice
    stays: Tensor  # bool [S, M], whether backward computes a slice for a labelled row; these rows come first


def forward(head: Head, hidden: Tensor, labels: Tensor, rows: Rows, kept: Tensor, stat_rows: int) -> Forward:
    """``stat_rows`` statistics of every labelled row, and the slices that backward computes for it.

    ``kept`` is a flat buffer; the logits of as many slices as fit are kept there for :func:`backward`.
    """
    settings = head.settings
    selected = rows.selected()
    x, y = gather(hidden, selected), gather(labels, selected)
    ordered = _OrderedHead(head, _order(head, x))
    places = ordered.places_of(y)
    tiling = _tiling(head, x, kept)
    parts = x.new_empty((len(tiling.slices), stat_rows, len(x)), dtype=torch.float32)
    for part, columns in zip(parts, tiling.slices, strict=True):
        piece, whole = ordered.piece(columns)
        for block in tiling.blocks:
            logits, _ = tiling.logits(block, columns)
            piece.logits(x[block], whole, out=logits)
            of_block = torch.empty_like(part[:, block], memory_format=torch.contiguous_format)
            piece.stats(logits, places[block], whole, out=of_block)
            part[:, block] = of_block
    stats, shares = merge(parts)
    mass = settings.skip_mass
    if settings.group and len(x):
        ranks = parallel.size(settings.group)
        shares *= merge_ranks(head, y, stats, stats.new_empty(0), stats.new_empty(0), tiling.blocks)
        mass /= ranks
    stays = torch.zeros(stays_shape(len(labels), len(head.weight)), dtype=torch.bool, device=x.device)
    stays[:, : len(x)] = _stay(shares, mass) | _holds(places, head) | (stats[1] == 0)
    stats = scatter(stats, selected, len(labels), dim=1)
    stats[1].masked_fill_(labels == settings.ignore_index, 1.0)
    return Forward(stats, ordered.order, stays)


def backward(
    head: Head,
    upstream: Upstream,
    hidden: Tensor,
    labels: Tensor,
    stats: Tensor,
    rows: Rows,
    kept: Tensor,
    order: Tensor,
    stays: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """``dhidden``, ``dweight`` and ``dbias``, each empty unless it is in ``needs``, without the slices that do not stay."""
    selected = rows.selected()
    x, y, stats = gather(hidden, selected), gather(labels, selected), gather(stats, selected, dim=1)
    upstream = upstream.map(lambda gradient: gather(gradient, selected))
    ordered = _OrderedHead(head, order)
    places = ordered.places_of(y)
    tiling = _tiling(head, x, kept)
    dx = x.new_zeros(x.shape if needs[0] else (0,), dtype=torch.float32)
    dweight = memory.empty(head.weight.shape if needs[1] else (0,), x.dtype, x.device)
    dbias = x.new_empty(len(head.weight) if needs[2] else 0)
    ones = x.new_ones((1, len(x)))
    # One buffer each for all slices and blocks: malloc may hold on to freed ones.
    most, D = min(len(x), tiling.rows), x.shape[1]
    gathered = x.new_empty((most, D))
    addends = dx.new_empty((most, D) if needs[0] else (0,))
    dpieces = x.new_empty((min(len(head.weight), slice_width(len(head.weight))), D) if needs[1] else (0,))
    for columns, staying in zip(tiling.slices, _staying(stays[:, : len(x)]), strict=True):
        piece, whole = ordered.piece(columns)
        parts = split(len(staying), tiling.rows)
        dpiece = dpieces[: whole.stop].zero_()
        dpiece_bias = x.new_zeros((1, whole.stop) if needs[2] else (0,))
        weight_sum, bias_sum = ProductSum(dpiece, len(parts)), ProductSum(dpiece_bias, len(parts))
        for part in parts:
            some = staying[part]
            of_some = torch.index_select(x, 0, some, out=gathered[: len(some)])
            logits = tiling.tile(slice(0, len(some)), columns)
            if tiling.keeps(columns):
                torch.index_select(tiling.store[:, columns], 0, some, out=logits)
            else:
                piece.logits(of_some, whole, out=logits)
            gradient = upstream.map(partial(torch.index_select, dim=0, index=some))
            piece.dlogits(gradient, logits, places.index_select(0, some), stats.index_select(1, some), whole, out=logits)
            dlogits = tiling.operand(logits)
            if needs[0]:
                addend = addends[: len(some)]
                product(dlogits, piece.weight, out=addend)
                dx.index_add_(0, some, addend)
            if needs[1]:
                weight_sum.add(dlogits.t(), of_some)
            if needs[2]:
                bias_sum.add(ones[:, : len(some)], dlogits)
        if needs[1]:
            dweight.index_copy_(0, order[columns], dpiece)
        if needs[2]:
            dbias.index_copy_(0, order[columns], dpiece_bias[0])
    if needs[0]:
        if head.settings.group and len(x):
            parallel.all_reduce(dx, head.settings.group)
        dx = scatter(dx.to(x.dtype), selected, len(labels))
    return dx, dweight, dbias


def _tiling(head: Head, x: Tensor, kept: Tensor) -> Tiling:
    V = len(head.weight)
    return Tiling(len(x), V, kept, x.dtype, frozen=False, width=slice_width(V))


# --- the order of the columns ----------------------------------------------------------------------------------------


def _order(head: Head, x: Tensor) -> Tensor:
    """The columns by descending mean logit, cut into slices; within a slice they ascend, for the sake of the gathers."""
    mean = x.mean(0, dtype=torch.float32).to(x.dtype)
    logits = torch.mv(head.weight, mean)
    if head.bias is not None:
        logits = logits + head.bias
    rank = _inverse(logits.argsort(descending=True, stable=True))
    return rank.div(slice_width(len(rank)), rounding_mode="floor").argsort(stable=True)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@dataclass
class _OrderedHead:
    """A head with its columns in another order. Slices of it are gathered into one buffer."""

    head: Head
    order: Tensor

    def __post_init__(self) -> None:
        V, D = self.head.weight.shape
        self._buffer = self.head.weight.new_empty((min(V, slice_width(V)), D))

    def piece(self, columns: slice) -> tuple[Head, slice]:
        """The head of these places of the order, which the next call overwrites, and the slice of all its columns."""
        of_slice = self.order[columns]
        weight = torch.index_select(self.head.weight, 0, of_slice, out=self._buffer[: len(of_slice)])
        bias = None if self.head.bias is None else self.head.bias.index_select(0, of_slice)
        start = self.head.settings.vocab_start + columns.start
        settings = self.head.settings._replace(vocab_start=start, ignore_index=_IGNORED)
        return Head(weight, bias, settings), slice(0, len(of_slice))

    def places_of(self, labels: Tensor) -> Tensor:
        """The labels in the order: a column's place in the place of its number. Labels of other ranks stay as they are."""
        settings = self.head.settings
        column, held = self.head.column_of(labels, slice(0, len(self.order)))
        places = torch.where(held, settings.vocab_start + _inverse(self.order)[column], labels)
        return places.masked_fill(labels == settings.ignore_index, _IGNORED)


# --- which slices stay -----------------------------------------------------------------------------------------------


def _stay(shares: Tensor, mass: float) -> Tensor:
    """All but a row's smallest ``shares [S, M]``, as many as sum to at most ``mass``; all of them if they are NaN."""
    ascending, slices = shares.t().sort(dim=1, stable=True)
    left_out = torch.empty_like(slices, dtype=torch.bool).scatter_(1, slices, ascending.cumsum(1) <= mass)
    return ~left_out.t()


def _holds(places: Tensor, head: Head) -> Tensor:
    """Whether a slice holds a row's label, ``[S, M]``."""
    V = len(head.weight)
    holder = (places - head.settings.vocab_start).div(slice_width(V), rounding_mode="floor")
    return holder == torch.arange(stays_shape(0, V)[0], device=places.device)[:, None]


def _staying(stays: Tensor) -> list[Tensor]:
    """The rows in which each slice stays, in ascending order.

    On a GPU, reading their numbers costs one sync. A CUDA graph cannot wait for numbers, so there every slice has all rows.
    """
    if linear.is_captured(stays):
        return [torch.arange(stays.shape[1], device=stays.device)] * len(stays)
    rows = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return [of_slice[:number] for of_slice, number in zip(rows, stays.sum(1).tolist(), strict=True)]
