"""Log-probs and token statistics from hidden states and the head's weight, without holding the logits of all tokens.

Labelled rows are gathered first, so ignored tokens cost no arithmetic. The rest works on tiles; a tile is a block of rows by a
slice of the vocabulary. PyTorch's GEMM writes the logits of a tile into a buffer that all tiles share, and the backend's row
kernels read them there. :mod:`nca_kernels.slices` merges the slices. ``docs/math.md``, section 4, has the derivations; the
operators that call this module are in :mod:`nca_kernels.ops`.

Shapes: ``hidden [M, D]``, ``weight [V, D]``, ``bias [V]``, ``labels [M]``, ``stats [3 or 4, M]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import memory, parallel
from .linear_head import Head, Settings, Upstream
from .slices import FrozenGradient, merge, merge_ranks
from .tiles import ProductSum, Tiling

# --- labelled rows ---------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Which rows have a label, as tensors of a size known in advance, so that forward can pass them to backward.

    On a GPU, reading their number costs one sync, and it makes ignored rows free. The number stays on the host for the backward.
    """

    indices: Tensor  # int64 [M], the labelled rows first
    number: Tensor  # int64 [1], of labelled rows, on the CPU

    def selected(self) -> Tensor | None:
        """The indices of the labelled rows, ``None`` for all rows."""
        (number,) = self.number.tolist()
        return None if number == len(self.indices) else self.indices[:number]


def is_captured(values: Tensor) -> bool:
    """Whether a CUDA graph is recording the work on ``values``. It cannot wait for a number read from them."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def labelled_rows(labels: Tensor, ignore_index: int) -> Rows:
    """The rows with a label. In a CUDA graph it is all rows, and the row kernels skip the ignored ones."""
    indices = torch.zeros_like(labels)
    if is_captured(labels):
        return Rows(indices, torch.tensor([len(labels)]))
    found = (labels != ignore_index).nonzero().squeeze(1)
    indices[: len(found)] = found
    return Rows(indices, torch.tensor([len(found)]))


def gather(values: Tensor, rows: Tensor | None, dim: int = 0) -> Tensor:
    """The labelled rows of ``values``; ``rows`` is ``None`` for all rows."""
    return values if rows is None else values.index_select(dim, rows)


def scatter(values: Tensor, rows: Tensor | None, M: int, dim: int = 0) -> Tensor:
    """The inverse of :func:`gather`, zeros elsewhere."""
    if rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = M
    return values.new_zeros(shape).index_copy_(dim, rows, values)


# --- the passes ------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """The results of :func:`forward`."""

    stats: Tensor  # [3 or 4, M]; (0, 1, 0, 0) where ignored
    u: Tensor  # dlogp/dhidden [M, D] in float32 for a frozen head, 0 where ignored; empty otherwise
    w: Tensor  # dentropy/dhidden [M, D], likewise, if with_entropy; empty otherwise


def forward(head: Head, hidden: Tensor, labels: Tensor, rows: Rows, kept: Tensor, stat_rows: int, with_entropy: bool) -> Forward:
    """``stat_rows`` statistics of every labelled row and, for a frozen head, the derivatives that backward scales.

    ``kept`` is a flat buffer; the logits of as many columns as fit are kept there for :func:`backward`. With a process group, ``u``
    and ``w`` are this rank's terms of the sum over ranks.
    """
    settings = head.settings
    frozen = settings.mode == "frozen"
    selected = rows.selected()
    x, y = gather(hidden, selected), gather(labels, selected)
    M, D = x.shape
    tiling = Tiling(M, len(head.weight), kept, x.dtype, frozen)
    stats = x.new_empty((stat_rows, M), dtype=torch.float32)
    u = x.new_empty((M if frozen else 0, D), dtype=torch.float32)
    w = x.new_empty((M if frozen and with_entropy else 0, D), dtype=torch.float32)
    for block in tiling.blocks:
        parts = stats.new_empty((len(tiling.slices), stat_rows, block.stop - block.start))
        gradient = FrozenGradient(head, y[block], tiling, block, with_entropy) if frozen else None
        for part, columns in zip(parts, tiling.slices, strict=True):
            logits, _ = tiling.logits(block, columns)
            head.logits(x[block], columns, out=logits)
            head.stats(logits, y[block], columns, out=part)
            if gradient is not None:
                gradient.add(logits, part, columns)
        stats[:, block] = merge(parts)[0] if len(parts) > 1 else parts[0]
        if gradient is not None:
            u[block], dentropy = gradient.result()
            if dentropy is not None:
                w[block] = dentropy
    if settings.group and M:
        merge_ranks(head, y, stats, u, w, tiling.blocks)
    everywhere = len(labels)
    u = scatter(u, selected, everywhere) if frozen else u
    w = scatter(w, selected, everywhere) if frozen and with_entropy else w
    stats = scatter(stats, selected, everywhere, dim=1)
    stats[1].masked_fill_(labels == settings.ignore_index, 1.0)
    return Forward(stats, u, w)


def frozen_backward(
    weight: Tensor | None,
    settings: Settings,
    upstream: Upstream,
    labels: Tensor,
    stats: Tensor,
    u: Tensor,
    w: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """``dhidden = dlogps u + dlse (dtarget - u) + dentropy w``, since lse = target - logp; only dlse needs ``weight``."""
    ignored = labels == settings.ignore_index
    dlogps, dlse, dentropy = upstream.map(lambda gradient: gradient.masked_fill(ignored, 0.0)[:, None])
    dhidden = u.new_empty(u.shape, dtype=u.dtype if settings.group else dtype)
    if dlse is None and dentropy is None:
        torch.mul(u, dlogps, out=dhidden)
    else:
        total = u * (dlogps if dlse is None else dlogps - dlse)
        if dlse is not None:
            assert weight is not None
            head = Head(weight, None, settings)
            _, held = head.column_of(labels, slice(0, len(weight)))
            # For ignored rows dtarget is an arbitrary row of the head, which may hold inf.
            total.addcmul_(head.dtarget(labels, stats[2]).masked_fill_(~held[:, None], 0.0), dlse)
        if dentropy is not None:
            total.addcmul_(w, dentropy)
        dhidden.copy_(total)
    return parallel.all_reduce(dhidden, settings.group).to(dtype) if settings.group else dhidden


def backward(
    head: Head, upstream: Upstream, hidden: Tensor, labels: Tensor, stats: Tensor, rows: Rows, kept: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """``dhidden``, ``dweight`` and ``dbias``, each empty unless it is in ``needs``, from kept logits or logits computed again.

    The outer loop runs over slices, the inner one over blocks. A slice of dweight is then complete before the next one begins, and
    no float32 copy of all of dweight is needed.
    """
    selected = rows.selected()
    x, y, stats = gather(hidden, selected), gather(labels, selected), gather(stats, selected, dim=1)
    upstream = upstream.map(lambda gradient: gather(gradient, selected))
    tiling = Tiling(len(x), len(head.weight), kept, x.dtype, frozen=False)
    group = head.settings.group
    sums = _Sums(head, x, tiling, needs)
    for columns in tiling.slices:
        sums.begin(columns)
        for i, block in enumerate(tiling.blocks):
            logits, is_kept = tiling.logits(block, columns)
            if not is_kept:
                head.logits(x[block], columns, out=logits)
            dlogits = tiling.tile(block, columns)  # kept logits are not overwritten, for a second backward
            head.dlogits(upstream.rows(block), logits, y[block], stats[:, block].contiguous(), columns, out=dlogits)
            sums.add(i, tiling.operand(dlogits))
    dx, dweight, dbias = sums.dx, sums.dweight, sums.dbias
    if needs[0]:
        if group and len(x):
            parallel.all_reduce(dx, group)
        dx = scatter(dx.to(x.dtype), selected, len(labels))
    return dx, dweight, dbias


class _Sums:
    """The gradients of a trained head as sums over tiles; the outer loop runs over slices, the inner one over blocks."""

    def __init__(self, head: Head, x: Tensor, tiling: Tiling, needs: list[bool]) -> None:
        self.head, self.x, self.tiling, self.needs = head, x, tiling, needs
        self.dx = torch.empty_like(x, dtype=torch.float32 if head.settings.group else x.dtype) if needs[0] else x.new_empty(0)
        self.dweight = memory.empty(head.weight.shape if needs[1] else (0,), x.dtype, x.device)
        self.dbias = x.new_empty(len(head.weight) if needs[2] else 0)
        if not tiling.blocks:  # no labelled row, so no product writes them
            self.dweight.zero_()
            self.dbias.zero_()
        self.ones = x.new_ones((1, len(x)))
        self.dx_sums = [ProductSum(self.dx[block], len(tiling.slices)) for block in tiling.blocks] if needs[0] else []

    def begin(self, columns: slice) -> None:
        terms = len(self.tiling.blocks)
        self.columns = columns
        self.dweight_sum = ProductSum(self.dweight[columns], terms) if self.needs[1] else None
        self.dbias_sum = ProductSum(self.dbias[None, columns], terms) if self.needs[2] else None

    def add(self, i: int, dlogits: Tensor) -> None:
        """Add the tile of block ``i`` and of the columns given to :meth:`begin`."""
        block = self.tiling.blocks[i]
        if self.needs[0]:
            self.dx_sums[i].add(dlogits, self.head.weight[self.columns])
        if self.dweight_sum is not None:
            self.dweight_sum.add(dlogits.t(), self.x[block])
        if self.dbias_sum is not None:
            self.dbias_sum.add(self.ones[:, block], dlogits)
