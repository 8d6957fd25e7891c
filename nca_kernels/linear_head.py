"""The language model's head: its weight and bias, its settings, and the computation on one tile of logits.

Shapes, for a tile of R rows and C columns: ``hidden [R, D]``, ``logits [R, C]``, ``labels [R]``, ``stats [3 or 4, R]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import RowOptions
from .tiles import exact_product


class Settings(NamedTuple):
    """How ``z`` is computed, which columns the head has and what is kept: the last arguments of every linear operator."""

    ignore_index: int
    scale: float
    softcap: float | None
    backend: str
    logits_dtype: torch.dtype
    vocab_start: int  # the first column of this head
    vocab_total: int  # the columns of all ranks
    group: str  # the process group of a vocabulary-parallel head, "" for none
    mode: str  # "none": no gradient; "frozen": hidden's alone, computed in forward; "trained": any, computed in backward
    save_budget: int  # bytes of logits kept from forward to backward
    skip_mass: float  # the probability that backward may leave out of a row

    @property
    def rows(self) -> RowOptions:
        return RowOptions(self.ignore_index, self.scale, self.softcap, self.backend)


class Upstream(NamedTuple):
    """Upstream gradients ``[R]`` in float32; ``None`` for an output without one."""

    dlogps: Tensor
    dlse: Tensor | None = None
    dentropy: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Upstream:
        return Upstream(function(self.dlogps), *(None if gradient is None else function(gradient) for gradient in self[1:]))

    def rows(self, rows: slice) -> Upstream:
        return self.map(lambda gradient: gradient[rows])


@dataclass
class Head:
    """``weight [V, D]`` and ``bias [V]``: the columns of the vocabulary from ``settings.vocab_start`` on."""

    weight: Tensor
    bias: Tensor | None
    settings: Settings

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> None:
        weight = self.weight[columns]
        if out.dtype != hidden.dtype:
            exact_product(hidden, weight, out)
            if self.bias is not None:
                out.add_(self.bias[columns])
        elif self.bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(self.bias[columns], hidden, weight.t(), out=out)

    def stats(self, logits: Tensor, labels: Tensor, columns: slice, out: Tensor) -> None:
        """Write the statistics of these columns to ``out``: 3 of each row, or 4."""
        logps = torch.empty_like(labels, dtype=torch.float32)  # under the softmax of these columns; not used
        self.settings.rows.forward(logits[None], labels[None], logps[None], out[:, None], **self._slice(columns))

    def dlogits(self, upstream: Upstream, logits: Tensor, labels: Tensor, stats: Tensor, columns: slice, out: Tensor) -> None:
        """Write the gradient of the tile to ``out``, which may be ``logits``."""
        dlse, dentropy = (None if gradient is None else gradient[None] for gradient in upstream[1:])
        self.settings.rows.backward(
            upstream.dlogps[None],
            logits[None],
            labels[None],
            stats[:, None],
            out[None],
            dlse=dlse,
            dentropy=dentropy,
            **self._slice(columns),
        )

    def _slice(self, columns: slice) -> dict[str, int]:
        return {"vocab_start": self.settings.vocab_start + columns.start, "vocab_total": self.settings.vocab_total}

    def column_of(self, labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """The label's column within ``columns``, and whether the label is in ``columns``; if not, the column is arbitrary."""
        column = labels - (self.settings.vocab_start + columns.start)
        width = columns.stop - columns.start
        return column.clamp(0, width - 1), (column >= 0) & (column < width)

    def dtarget(self, labels: Tensor, target: Tensor) -> Tensor:
        """``d target / d hidden [R, D]`` in float32; meaningless where another rank holds the label's column."""
        column, _ = self.column_of(labels, slice(0, len(self.weight)))
        dtarget = self.weight.index_select(0, column).float().mul_(self.settings.scale)
        softcap = self.settings.softcap
        return dtarget if softcap is None else dtarget.mul_((1 - (target / softcap).square())[:, None])
