"""Detects a loss or weights that are not finite, so that a run stops before it wastes time on them or saves them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor


class LossGuard:
    """Counts, on the device and without a sync, the micro-batches in a row whose loss is NaN or infinite."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._in_a_row = torch.zeros((), device=accelerator.device)

    def watch(self, loss: Tensor) -> None:
        """Count the loss of a micro-batch."""
        loss = loss.detach().to(self._in_a_row.device)
        self._in_a_row = torch.where(loss.isfinite(), torch.zeros_like(self._in_a_row), self._in_a_row + 1)

    def in_a_row(self) -> int:
        """The largest count of all ranks. It takes one collective and one host sync."""
        return int(self._accelerator.gather(self._in_a_row[None]).max())

    def weights_are_finite(self, weights: Iterable[Tensor]) -> bool:
        """Whether all weights are finite; each rank checks its own shards. It takes one collective and one host sync."""
        bad = torch.zeros((), device=self._accelerator.device)
        for tensor in weights:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            bad = bad + (~local.detach().isfinite().all()).to(bad.device)
        return not bool(self._accelerator.gather(bad[None]).max())
