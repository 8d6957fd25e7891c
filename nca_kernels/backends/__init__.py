"""The backends, in the order in which ``backend=None`` tries them. A new one has the functions below and a line here.

``cuda`` comes before ``triton``: its backward takes 12 instructions an element and Triton's 26, and a call takes 3 us of Python and
Triton's 11 to 16 (docs/tuning.md). Triton runs where the extension was not built, since it brings its own compiler.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..loss_table import GroupLossArguments
from . import native, pytorch, triton


class Backend(Protocol):
    """A backend: a module or an object with these names."""

    NAME: str

    def unsupported(self, op: str, device: torch.device, dtype: torch.dtype | None, loss: str | None = None) -> list[str]:
        """Every reason why the backend cannot run ``op`` on this device; an empty list if it can."""


class Kernels(Backend, Protocol):
    """A backend with kernels; they write their results into tensors of the caller (docs/architecture.md)."""

    def token_logps_fwd(
        self,
        logits: Tensor,
        labels: Tensor,
        logps: Tensor,
        stats: Tensor,
        *,
        ignore_index: int,
        scale: float,
        softcap: float | None,
        vocab_start: int,
        vocab_total: int,
    ) -> None: ...

    def token_logps_bwd(
        self,
        dlogps: Tensor,
        logits: Tensor,
        labels: Tensor,
        stats: Tensor,
        dlogits: Tensor,
        *,
        dlse: Tensor | None = None,
        dentropy: Tensor | None = None,
        ignore_index: int,
        scale: float,
        softcap: float | None,
        vocab_start: int,
        vocab_total: int,
    ) -> None: ...

    def group_loss_fwd(self, arguments: GroupLossArguments, loss: Tensor, rewards: Tensor, dlogps: Tensor) -> None: ...


_KERNELS: tuple[Kernels, ...] = (native.cuda, triton, native.cpu)
KERNELS: dict[str, Kernels] = {backend.NAME: backend for backend in _KERNELS}
# The last one, ``torch``, has no kernels: the public functions call :mod:`nca_kernels.reference` instead.
BACKENDS: dict[str, Backend] = {**KERNELS, pytorch.NAME: pytorch}
