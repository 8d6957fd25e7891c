"""Merges slices of a vocabulary: their statistics and, for a frozen head, the derivatives that forward computes.

The statistics of a slice belong to a softmax over its columns alone, ``[3, R]`` or ``[4, R]``: maximum, sum of exponentials,
the label's z, and ``A = sum (z - max) exp(z - max)``. They merge in the same way for tiles of one
head and for the ranks' shares of a vocabulary-parallel head. ``docs/math.md``, sections 3 and 4, has the derivations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import parallel
from .linear_head import Head, Upstream
from .tiles import Tiling, product

# In float16 the entries of a row of the tile sum to about 2 to this power: small entries stay normal numbers, and products with
# weights up to 128 stay finite.
_FLOAT16_SUM = 8

_LEAST_REST = 2.0**-24  # below this, 1 - p is 0 in float32


def merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of the union of P slices, from ``parts [P, 3 or 4, M]``, and each slice's probability ``[P, M]``.

    A slice of -inf alone has the maximum -inf, the sum 0 and the probability 0. NaN stays NaN.
    """
    maxima, sums, targets = parts[:, :3].unbind(1)
    top = maxima.amax(0)
    # Equal maxima take no exponential: -inf - (-inf) is NaN.
    gaps = torch.where(maxima == top, 0.0, maxima - top)
    scaled = sums * gaps.exp()
    total = scaled.sum(0)
    whole = [top, total, targets.sum(0)]
    if parts.shape[1] == 4:
        whole.append(((parts[:, 3] + gaps * sums) * gaps.exp()).masked_fill(sums == 0, 0.0).sum(0))
    return torch.stack(whole), scaled / total.masked_fill(total == 0, 1.0)


def logps_of(stats: Tensor) -> Tensor:
    """The label's log-probability, ``[M]``."""
    return (stats[2] - stats[0]) - stats[1].log()


def entropy_of(stats: Tensor) -> Tensor:
    """The entropy in nats, ``[M]``, from statistics of four rows."""
    return stats[1].log() - stats[3] / stats[1]


def _without_empty(stats: Tensor) -> Tensor:
    """The statistics with maximum 0 and sum 1 where every column is -inf, so that p is 0 there, not NaN."""
    empty = (stats[0] == -torch.inf) & (stats[1] == 0)
    return torch.stack((stats[0].masked_fill(empty, 0.0), stats[1].masked_fill(empty, 1.0), *stats[2:]))


def _entropy_shift(share: Tensor, entropy: Tensor, part_entropy: Tensor) -> Tensor:
    """``log p - log p_slice + H - H_slice``, the same for all columns of a slice; 0 for a slice without probability."""
    return (share.log() + entropy - part_entropy).masked_fill(share == 0, 0.0)


class _Entropy(NamedTuple):
    """What the derivative of the entropy needs in addition to a :class:`_Part`."""

    entropy: Tensor  # [R]
    mean: Tensor  # [R, D], sum of p_v dz_v/dhidden
    w: Tensor  # [R, D], dentropy/dhidden


class _Part(NamedTuple):
    """A set of columns, under a softmax over these columns alone."""

    stats: Tensor  # [3 or 4, R]
    rest: Tensor  # [R], sum of p_v without the label's
    n: Tensor  # [R, D], sum of p_v dz_v/dhidden without the label's
    entropy: _Entropy | None


class FrozenGradient:
    """``u = dlogp/dhidden`` of a block of rows in one pass over the slices, and ``w = dentropy/dhidden`` if ``with_entropy``.

    ``u = rest dtarget - n`` (see :class:`_Part`), and rest, n and w merge by the slices' probabilities. The label's own column is
    left out of the GEMM for n, because ``1 - p`` needs the precision of float32.
    """

    def __init__(self, head: Head, labels: Tensor, tiling: Tiling, block: slice, with_entropy: bool) -> None:
        self.head, self.labels, self.tiling, self.block, self.with_entropy = head, labels, tiling, block, with_entropy
        self.row = torch.arange(len(labels), device=labels.device)
        self.whole: _Part | None = None

    def add(self, logits: Tensor, stats: Tensor, columns: slice) -> None:
        """Add one slice, given its statistics; overwrites ``logits``."""
        part = self._part(logits, stats, columns)
        self.whole = part if self.whole is None else _merged(self.whole, part)

    def result(self) -> tuple[Tensor, Tensor | None]:
        """``u`` and ``w``, ``[R, D]`` in float32."""
        assert self.whole is not None, "add comes first"
        stats, rest, n, entropy = self.whole
        _, held = self.head.column_of(self.labels, slice(0, len(self.head.weight)))
        rest = rest.masked_fill(stats[1] == 0, torch.nan).masked_fill(~held, 0.0)
        return n.neg_().addcmul_(self.head.dtarget(self.labels, stats[2]), rest[:, None]), entropy and entropy.w

    def _part(self, logits: Tensor, stats: Tensor, columns: slice) -> _Part:
        column, here = self.head.column_of(self.labels, columns)
        safe = _without_empty(stats)
        rest = torch.where(here & (stats[2] != -torch.inf), -torch.expm1(logps_of(safe)), 1.0)
        raised = self._raised(rest)
        if self.with_entropy:
            upstream = Upstream(torch.zeros_like(raised), dentropy=raised)
            tile = self.tiling.spare_tile(self.block, columns)
            self.head.dlogits(upstream, logits, self.labels, safe, columns, out=tile)
            w = self._product(tile, columns, raised)
        self.head.dlogits(Upstream(-raised), logits, self.labels, safe, columns, out=logits)
        # index_put_ and not scatter_, which would copy the tile.
        at_label = (self.row, column)
        logits.index_put_(at_label, logits[at_label].masked_fill_(here, 0.0))
        n = self._product(logits, columns, raised)
        if not self.with_entropy:
            return _Part(stats, rest, n, None)
        mean = torch.addcmul(n, self.head.dtarget(self.labels, stats[2]), ((1 - rest) * here)[:, None])
        return _Part(stats, rest, n, _Entropy(entropy_of(safe), mean, w))

    def _raised(self, rest: Tensor) -> Tensor:
        """The upstream gradients of a tile: 1, or in float16 a power of two that keeps small entries from underflow."""
        if self.tiling.operand_dtype != torch.float16:
            return torch.ones_like(rest)
        mass = (rest * self.head.settings.scale).nan_to_num(1.0).clamp(min=_LEAST_REST)
        _, exponent = torch.frexp(mass)
        return torch.ldexp(torch.ones_like(rest), _FLOAT16_SUM - exponent)

    def _product(self, tile: Tensor, columns: slice, raised: Tensor) -> Tensor:
        total = tile.new_empty((len(tile), self.head.weight.shape[1]), dtype=torch.float32)
        product(self.tiling.operand(tile), self.head.weight[columns], out=total)
        return total if self.tiling.operand_dtype != torch.float16 else total.div_(raised[:, None])


def _merged(a: _Part, b: _Part) -> _Part:
    """The union of two disjoint sets of columns; overwrites the tensors of both."""
    stats, shares = merge(torch.stack((a.stats, b.stats)))
    rest = shares[0] * a.rest + shares[1] * b.rest
    n = _weighted(shares, a.n, b.n)
    if a.entropy is None or b.entropy is None:
        return _Part(stats, rest, n, None)
    entropy = entropy_of(_without_empty(stats))
    for part, share in ((a.entropy, shares[0]), (b.entropy, shares[1])):
        part.w.addcmul_(part.mean, -_entropy_shift(share, entropy, part.entropy)[:, None])
    mean, w = _weighted(shares, a.entropy.mean, b.entropy.mean), _weighted(shares, a.entropy.w, b.entropy.w)
    return _Part(stats, rest, n, _Entropy(entropy, mean, w))


def _weighted(shares: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.mul_(shares[0, :, None]).addcmul_(b, shares[1, :, None])


def merge_ranks(head: Head, labels: Tensor, stats: Tensor, u: Tensor, w: Tensor, blocks: list[slice]) -> Tensor:
    """In place: this rank's statistics become the whole vocabulary's, its ``u`` and ``w``, if any, terms of the sum over ranks.

    Returns the probability of this rank's columns, ``[M]``.
    """
    rank, parts = parallel.all_gather(stats, head.settings.group)
    mine = parts[rank]
    merged, shares = merge(parts)
    stats.copy_(merged)
    share = shares[rank]
    _, held = head.column_of(labels, slice(0, len(head.weight)))
    # The part of 1 - p that the label's rank lacks is the other ranks' share. It is a sum, because 1 - share cancels near 1.
    missing = torch.cat((shares[:rank], shares[rank + 1 :])).sum(0) * held
    for block in blocks if len(u) else []:
        dtarget = head.dtarget(labels[block], stats[2, block])
        if len(w):
            entropy, own = (entropy_of(_without_empty(part[:, block])) for part in (merged, mine))
            mean = dtarget * held[block, None] - u[block]
            shift = _entropy_shift(share[block], entropy, own)
            w[block].addcmul_(mean, -shift[:, None]).mul_(share[block, None])
        u[block].mul_(share[block, None]).addcmul_(dtarget, missing[block, None])
    return share
