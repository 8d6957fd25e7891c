"""The backends, in the order in which ``backend=None`` tries them. A new one is an object with the functions below and a line here.

``cuda`` comes before ``triton``: its backward takes 12 instructions an element against 26, and a call 3 us of Python against 11
to 16 (docs/tuning.md). Where the extension was not built, Triton needs no compiler but its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..loss_table import GroupLossArguments
from . import native, pytorch, triton


class Backend(Protocol):
    """What every backend has; a module serves as well as an object."""

    NAME: str

    def unsupported(self, op: str, device: torch.device, dtype: torch.dtype | None, loss: str | None = None) -> list[str]:
        """Every reason why the backend cannot run ``op`` there; none if it can."""


class Kernels(Backend, Protocol):
    """A backend with kernels of its own, which write into tensors that they are given (docs/architecture.md)."""

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
# The last, ``torch``, has no kernels: the public functions call :mod:`nca_kernels.reference` for it.
BACKENDS: dict[str, Backend] = {**KERNELS, pytorch.NAME: pytorch}
