"""Backend ``torch``: the mathematics of :mod:`nca_kernels.reference`, on every device and floating dtype."""

from __future__ import annotations

import torch

NAME = "torch"


def unsupported(op: str, device: torch.device, dtype: torch.dtype | None = None, loss: str | None = None) -> list[str]:
    return []
