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
from .tiles import ProductSum, product, split, tile_shape


@dataclass
class Head:
    """A head's columns from ``vocab_start`` of ``vocab_total``, and what makes of a tile statistics and gradients."""

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
        logps = torch.empty_like(labels, dtype=torch.float32)  # of the slice's own softmax: not needed
        self.kernels.token_logps_fwd(logits[None], labels[None], logps[None], out[:, None], **self._settings(columns))

    def dlogits(
        self, dlogps: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, columns: slice, out: Tensor
    ) -> None:
        self.kernels.token_logps_bwd(
            dlogps[None], logits[None], labels[None], stats[:, None], out[None], **self._settings(columns)
        )

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
        """``d target / d hidden [M, D]`` in float32; of some other column where another rank holds the label's."""
        column = (labels - self.vocab_start).clamp(0, len(self.weight) - 1)
        dtarget = self.weight.index_select(0, column).float().mul_(self.scale)
        return dtarget if self.softcap is None else dtarget.mul_((1 - (target / self.softcap).square())[:, None])


# --- slices of a vocabulary ------------------------------------------------------------------------------------------


def merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``parts [P, 3, M]``, the statistics of P slices: those of the whole ``[3, M]``, and each's probability ``[P, M]``.

    A slice of nothing but -inf has the maximum -inf, the sum 0 and the probability 0. NaN stays NaN.
    """
    maxima, sums, targets = parts.unbind(1)
    top = maxima.amax(0)
    # Equal maxima take no exponential: -inf - (-inf) is NaN.
    sums = torch.where(maxima == top, sums, sums * (maxima - top).exp())
    total = sums.sum(0)
    return torch.stack((top, total, targets.sum(0))), sums / total.masked_fill(total == 0, 1.0)


def missing_target(shares: Tensor, holds: Tensor) -> Tensor:
    """What lacks of the label's onehot when each slice's ``onehot - p`` is weighted by its share; both are ``[P, M]``.

    The other slices' shares. As a sum: ``1 - share`` would cancel where the label is likely.
    """
    return shares.masked_fill(holds, 0.0).sum(0) * holds.any(0)


class FrozenBlock:
    """``u = dlogps/dhidden`` of a block of rows in one pass over the slices, each by its own statistics.

    ``u`` so far belongs to the softmax over the columns so far. With a slice more, both shrink to their share of it.
    """

    def __init__(self, head: Head, labels: Tensor, D: int):
        self.head, self.labels = head, labels
        self.stats = torch.tensor([-torch.inf, 0.0, 0.0], device=labels.device)[:, None].repeat(1, len(labels))
        self.u = self.stats.new_zeros((len(labels), D))
        self.missing = self.stats.new_zeros(len(labels))
        self.seen = torch.zeros_like(labels, dtype=torch.bool)

    def add(self, dlogits: Tensor, part: Tensor, columns: slice) -> None:
        here = self.head.holds(self.labels, columns)
        self.stats, shares = merge(torch.stack((self.stats, part)))
        self.missing.mul_(shares[0]).add_(missing_target(shares, torch.stack((self.seen, here))))
        self.seen |= here
        self.u.mul_(shares[0, :, None])
        term = torch.empty_like(self.u) 
        product(dlogits, self.head.weight[columns], term)
        self.u.addcmul_(shares[1, :, None], term)

    def finish(self, out: Tensor) -> None:
        dtarget = self.head.dtarget(self.labels, self.stats[2])
        out.copy_(self.u.addcmul_(self.missing[:, None], dtarget))
