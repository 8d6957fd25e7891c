"""Backends ``cpu`` and ``cuda``: the compiled extension, called with addresses, sizes and strides.

The two extension modules have the same functions (``csrc/nca.h``), so one class serves both. An extension is loaded at its
first use, not by ``import nca_kernels``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from .. import checks
from ..loss_table import GroupLossArguments

# The numbers of csrc/nca.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _numbers(names: tuple[str, ...]) -> dict[str, int]:
    """The number of each enumerator of csrc/nca.h, by its name in the extension."""
    return {name: number for number, name in enumerate(names)}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeBackend:
    """One of the two extension modules, as a backend."""

    def __init__(self, name: str) -> None:
        self.NAME = name

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"nca_kernels._{self.NAME}")

    @cached_property  # cached, since Python searches for a missing module at every import
    def _import_error(self) -> str:
        try:
            _ = self._module
        except ImportError as error:
            return str(error)
        return "" if hasattr(self._module, "LOSSES") else "it was built from older sources, build it again"

    @cached_property
    def _losses(self) -> dict[str, int]:
        return _numbers(self._module.LOSSES)

    @cached_property
    def _pairs(self) -> dict[str, int]:
        return _numbers(self._module.PAIRS)

    @cached_property
    def _reductions(self) -> dict[str, int]:
        return _numbers(self._module.REDUCTIONS)

    def unsupported(self, op: str, device: torch.device, dtype: torch.dtype | None = None, loss: str | None = None) -> list[str]:
        reasons: list[str] = []
        if device.type != self.NAME:
            reasons.append(f"runs on {self.NAME} tensors, not on {device.type}")
        if self._import_error:
            reasons.append(f"the extension nca_kernels._{self.NAME} was not built or does not load ({self._import_error})")
        elif device.type == self.NAME and (why := self._unusable(device)):
            reasons.append(f"the extension nca_kernels._{self.NAME} cannot run here ({why})")
        if dtype is not None and dtype not in DTYPES:
            reasons.append(f"has no {dtype} kernel (it has {', '.join(map(str, DTYPES))})")
        if loss is not None and not self._import_error and loss not in self._losses:
            reasons.append(f"has no kernel for the loss {loss!r}")
        return reasons

    def _unusable(self, device: torch.device) -> str:
        """Why the extension's code cannot run on this device; empty if it can."""
        if device.type == "cuda" and torch.version.hip:  # on ROCm, too, the device type is "cuda"
            return "this PyTorch is built for ROCm, and the extension holds code for NVIDIA GPUs"
        return self._module.unusable(-1 if device.index is None else device.index)

    def description(self) -> str:
        """Which machine code runs, or why none does, as text for the user."""
        if self._import_error:
            return self._import_error
        try:
            return f"built for {self._module.instruction_set()}"
        except ValueError as error:  # NCA_KERNELS_ISA
            return str(error)

    @staticmethod
    def _launch(tensor: Tensor) -> tuple[int, int, int]:
        """The number of CPU threads; the device and the stream of a GPU."""
        if tensor.is_cuda:
            return 1, tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
        return torch.get_num_threads(), 0, 0

    def _token_logps(
        self,
        kernel: Callable[..., int],
        logits: Tensor,
        labels: Tensor,
        stats: Tensor,
        *,
        logps: Tensor | None = None,
        dlogps: Tensor | None = None,
        dlse: Tensor | None = None,
        dentropy: Tensor | None = None,
        dlogits: Tensor | None = None,
        ignore_index: int,
        scale: float,
        softcap: float | None,
        vocab_start: int,
        vocab_total: int,
    ) -> None:
        N, T, V = logits.shape
        stride_n, stride_t, _ = logits.stride()
        dstride_n, dstride_t, _ = (0, 0, 1) if dlogits is None else dlogits.stride()
        threads, device, stream = self._launch(logits)
        bad_row = kernel(
            logits=logits.data_ptr(),
            dtype=DTYPES[logits.dtype],
            N=N,
            T=T,
            V=V,
            stride_n=stride_n,
            stride_t=stride_t,
            labels=labels.data_ptr(),
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap or 0.0,
            vocab_start=vocab_start,
            vocab_total=vocab_total,
            logps=_address(logps),
            stats=stats.data_ptr(),
            stat_rows=stats.shape[0],
            dlogps=_address(dlogps),
            dlse=_address(dlse),
            dentropy=_address(dentropy),
            dlogits=_address(dlogits),
            dstride_n=dstride_n,
            dstride_t=dstride_t,
            threads=threads,
            device=device,
            stream=stream,
        )
        if bad_row >= 0:
            raise checks.illegal_label(labels, bad_row, ignore_index, vocab_total)

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
    ) -> None:
        """Write ``logps`` and ``stats`` (see docs/architecture.md)."""
        self._token_logps(
            self._module.token_logps_fwd,
            logits,
            labels,
            stats,
            logps=logps,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            vocab_start=vocab_start,
            vocab_total=vocab_total,
        )

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
    ) -> None:
        """Write ``dlogits``, which may be ``logits`` itself (see docs/architecture.md)."""
        self._token_logps(
            self._module.token_logps_bwd,
            logits,
            labels,
            stats,
            dlogps=dlogps,
            dlse=dlse,
            dentropy=dentropy,
            dlogits=dlogits,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
            vocab_start=vocab_start,
            vocab_total=vocab_total,
        )

    def group_loss_fwd(self, arguments: GroupLossArguments, loss: Tensor, rewards: Tensor, dlogps: Tensor) -> None:
        """Write ``loss``, ``rewards`` and ``dlogps`` (see docs/architecture.md)."""
        q = arguments
        B, K = q.logps.shape
        threads, device, stream = self._launch(q.logps)
        losses = loss if q.reduction == "none" else None
        if losses is None and self.NAME == "cuda" and q.wants_several_blocks():
            losses = q.logps.new_empty(B)
        self._module.group_loss_fwd(
            name=self._losses[q.name],
            pairs=self._pairs[q.pairs],
            reduction=self._reductions[q.reduction],
            B=B,
            K=K,
            logps=q.logps.data_ptr(),
            ref_logps=q.ref_logps.data_ptr(),
            scores=q.scores.data_ptr(),
            mask=_address(q.mask),
            lengths=_address(q.lengths),
            desirable=_address(q.desirable),
            baseline=_address(q.baseline),
            beta=q.beta,
            alpha=q.alpha,
            label_smoothing=q.label_smoothing,
            nll_weight=q.nll_weight,
            loss=loss.data_ptr(),
            losses=_address(losses),
            rewards=rewards.data_ptr(),
            dlogps=dlogps.data_ptr(),
            threads=threads,
            device=device,
            stream=stream,
        )


cuda = NativeBackend("cuda")
cpu = NativeBackend("cpu")
