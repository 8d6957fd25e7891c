"""Family (b): log-probs from hidden states and the head's weight, never holding the logits of all rows and columns.

Scored rows are gathered first, so ignored tokens cost no arithmetic. Then tiles, a block of rows by a slice of the
vocabulary: PyTorch's GEMM into one reused buffer, and the backend's row kernels on it. A slice's statistics are those of
a smaller softmax; :func:`merge` puts slices together, be they of one head or the ranks' of a vocabulary-parallel one.
``docs/linear.md`` derives it. The operators around this file are in :mod:`nca_kernels.ops`.

Shapes: ``hidden [M, D]``, ``weight [V, D]``, ``bias [V]``, ``labels [M]``, ``stats [3, M]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import parallel
from .tiles import slices, tile_shape


@dataclass
class Head:
    """A head's columns ``[vocab_start, vocab_start + V)`` and what turns its tiles into statistics and gradients."""

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
        logps = torch.empty_like(labels, dtype=torch.float32)  # a slice's own: of no use before the merge
        self.kernels.token_logps_fwd(
            logits[None], labels[None], logps[None], out[:, None], **self._settings(columns)
        )

    def dlogits(self, dlogps: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, columns: slice, out: Tensor) -> None:
        self.kernels.token_logps_bwd(
            dlogps[None], logits[None], labels[None], stats[:, None], out[None], **self._settings(columns)
        )

    def _settings(self, columns: slice) -> dict:
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
        """The derivative by ``hidden`` of the label's own z, ``[M, D]`` float32, whatever where another rank holds it."""
        column = (labels - self.vocab_start).clamp(0, len(self.weight) - 1)
        slope = self.scale if self.softcap is None else self.scale * (1 - (target / self.softcap).square())[:, None]
        return self.weight.index_select(0, column).float().mul_(slope)


def merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics ``[3, M]`` of rows whose columns were split in P ``parts [P, 3, M]``, and each part's probability.

    A part of nothing but -inf has the maximum -inf and the sum 0, and probability 0. NaN stays NaN.
    """
    maxima, sums, targets = parts.unbind(1)
    top = maxima.amax(0)
    # Equal maxima take no exponential: -inf - (-inf) is NaN.
    sums = torch.where(maxima == top, sums, sums * (maxima - top).exp())
    total = sums.sum(0)
    return torch.stack((top, total, targets.sum(0))), sums / torch.where(total == 0, 1.0, total)


def missing_target(shares: Tensor, holds: Tensor) -> Tensor:
    """How much of the label's onehot is missing where each part's gradient was scaled by its share, both ``[P, M]``.

    A part gives ``share * (onehot - p)``, p its own softmax. What is missing of onehot is the other parts' shares: their
    sum, since ``1 - share`` would cancel where share is nearly 1.
    """
    return shares.masked_fill(holds, 0.0).sum(0) * holds.any(0)


def forward(
    head: Head, hidden: Tensor, labels: Tensor, frozen: bool, kept: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``logps [M]``, ``stats [3, M]`` and, for a ``frozen`` head, ``u = dlogps/dhidden [M, D]`` (else empty).

    ``kept`` is flat room for logits; as many columns as fit in are left there for :func:`backward`. With a ``group``, u
    is this rank's addend, in float32.
    """
    rows = _scored_rows(labels, head.ignore_index)
    hidden, labels = _gather(hidden, rows), _gather(labels, rows)
    M, D = hidden.shape
    stats = hidden.new_empty((3, M), dtype=torch.float32)
    u = hidden.new_empty((M if frozen else 0, D), dtype=torch.float32 if group else hidden.dtype)
    store = _columns_kept(kept, M, len(head.weight))
    blocks, columns, buffer = _tiling(head, hidden, store, frozen)
    for block in blocks:
        x, y = hidden[block], labels[block]
        parts = stats.new_empty((len(columns), 3, len(y)))
        partial = Frozen(head, y) if frozen else None
        for part, cols in zip(parts, columns, strict=True):
            tile = _tile(buffer, store, block, cols)
            head.logits(x, cols, tile)
            head.stats(tile, y, cols, part)
            if partial:
                partial.add(tile, part, cols)
        stats[:, block] = merge(parts)[0]
        if partial:
            partial.finish(u[block])
    if group and M:
        _merge_ranks(head, labels, stats, u, blocks, group)
    logps = ((stats[2] - stats[0]) - stats[1].log()).masked_fill_(labels == head.ignore_index, 0.0)
    return _scatter(logps, rows, 0), _scatter(stats, rows, 1), _scatter(u, rows, 0) if frozen else u
