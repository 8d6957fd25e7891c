"""The options of the row kernels in one tuple, from the public function to the backend, and the calls of a backend."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import KERNELS


class RowOptions(NamedTuple):
    """How ``z`` is computed, which rows are ignored, and which backend runs: the last arguments of every token operator."""

    ignore_index: int
    scale: float
    softcap: float | None
    backend: str

    def forward(
        self,
        logits: Tensor,  # [N, T, V]
        labels: Tensor,  # [N, T], int64, contiguous
        logps: Tensor,  # [N, T], out
        stats: Tensor,  # [3, N, T], or [4, N, T] with the entropy's sum; out
        vocab_start: int = 0,
        vocab_total: int | None = None,
    ) -> None:
        """Write log-probs and statistics of the rows. Their columns start at ``vocab_start`` of a vocabulary of ``vocab_total``."""
        KERNELS[self.backend].token_logps_fwd(logits, labels, logps, stats, **self._arguments(logits, vocab_start, vocab_total))

    def backward(
        self,
        dlogps: Tensor,  # [N, T], contiguous, as the next two
        logits: Tensor,
        labels: Tensor,
        stats: Tensor,
        dlogits: Tensor,  # [N, T, V], out; may be logits
        *,
        dlse: Tensor | None = None,
        dentropy: Tensor | None = None,
        vocab_start: int = 0,
        vocab_total: int | None = None,
    ) -> None:
        """Write the gradient of the logits, from the upstream gradients of the rows' log-prob, log-sum-exp and entropy."""
        arguments = self._arguments(logits, vocab_start, vocab_total)
        KERNELS[self.backend].token_logps_bwd(dlogps, logits, labels, stats, dlogits, dlse=dlse, dentropy=dentropy, **arguments)

    def transformation(self) -> dict[str, Any]:
        """The fields that the functions of :mod:`nca_kernels.reference` take."""
        return {"ignore_index": self.ignore_index, "scale": self.scale, "softcap": self.softcap}

    def _arguments(self, logits: Tensor, vocab_start: int, vocab_total: int | None) -> dict[str, Any]:
        vocab_total = logits.shape[-1] if vocab_total is None else vocab_total
        return {**self.transformation(), "vocab_start": vocab_start, "vocab_total": vocab_total}


def three_dimensional(logits: Tensor) -> Tensor:
    """A view of ``logits`` as ``[N, T, V]``. The kernels take any two row strides, so only 4 and more dimensions can fail."""
    if logits.ndim == 2:
        return logits.unsqueeze(0)
    try:
        return logits.view(math.prod(logits.shape[:-2]), *logits.shape[-2:]) if logits.ndim > 3 else logits
    except RuntimeError:
        raise ValueError(
            f"logits: shape {list(logits.shape)} with strides {list(logits.stride())} is not a view of [N, T, V]; wanted "
            "leading dimensions that collapse without a copy"
        ) from None


def from_stats(logps: Tensor, stats: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, log-sum-exp and top-1 hit from the statistics ``[4, ...]`` of rows; NaN, NaN and false where ``logps`` is NaN.

    Both terms of the entropy are at least 0, so nothing cancels. An ignored row has the statistics (0, 1, 0, 0), whose entropy
    and log-sum-exp are 0.
    """
    top, total, target, weighted = stats
    log_total = total.log()
    invalid = logps.isnan()
    entropy = (log_total - weighted / total).masked_fill(invalid, torch.nan)
    lse = (top + log_total).masked_fill(invalid, torch.nan)
    return entropy, lse, (target == top) & ~(invalid | ignored)
