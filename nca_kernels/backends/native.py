"""Backends ``cpu`` and ``cuda``: the compiled extension, called with addresses, sizes and strides.

The two extension modules have the same functions (``csrc/nca.h``), so one class serves both. Nothing is loaded before the
first question: ``import nca_kernels`` stays light.
"""

from __future__ import annotations

import importlib
from functools import cached_property

import torch
from torch import Tensor

from .. import checks

# The numbering of csrc/nca.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOSSES = {"info_nca": 0, "nca": 1, "dpo": 2, "ipo": 3, "kto": 4}
PAIRS = {"best_vs_rest": 0, "all": 1}
REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeBackend:
    """One of the two extension modules, as a backend."""

    def __init__(self, name: str):
        self.NAME = name

    @cached_property
    def _module(self):
        return importlib.import_module(f"nca_kernels._{self.NAME}")

    @cached_property  # a failed import is searched for anew at every try
    def _import_error(self) -> str:
        try:
            _ = self._module
        except ImportError as error:
            return str(error)
        return ""

    def unsupported(self, op: str, device: torch.device, dtype: torch.dtype | None = None, loss: str | None = None) -> list[str]:
        reasons = []
        if device.type != self.NAME:
            reasons.append(f"runs on {self.NAME} tensors, not on {device.type}")
        if self._import_error:
            reasons.append(f"the extension nca_kernels._{self.NAME} was not built or does not load ({self._import_error})")
        elif device.type == self.NAME and (why := self._module.unusable()):
            reasons.append(f"the extension nca_kernels._{self.NAME} cannot run here ({why})")
        if dtype is not None and dtype not in DTYPES:
            reasons.append(f"has no {dtype} kernel (it has {', '.join(map(str, DTYPES))})")
        if loss is not None and loss not in LOSSES:
            reasons.append(f"has no kernel for the loss {loss!r}")
        return reasons

    def description(self) -> str:
        """Which machine code it is, or why it does not load, for the user to read."""
        return self._import_error or f"built for {self._module.instruction_set()}"

    @staticmethod
    def _launch(tensor: Tensor) -> tuple[int, int, int]:
        """CPU threads; device and stream of a GPU."""
        if tensor.is_cuda:
            return 1, tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
        return torch.get_num_threads(), 0, 0

    def _token_logps(
        self,
        kernel,
        logits,
        labels,
        logps,
        stats,
        dlogps,
        dlogits,
        ignore_index,
        scale,
        softcap,
        vocab_start,
        vocab_total,
    ) -> None:
        N, T, V = logits.shape
        out = logits if dlogits is None else dlogits
        bad_row = kernel(
            logits.data_ptr(), DTYPES[logits.dtype], N, T, V, *logits.stride()[:2], labels.data_ptr(), ignore_index,
            scale, softcap or 0.0, vocab_start, vocab_total, _address(logps), stats.data_ptr(), _address(dlogps),
            _address(dlogits), *out.stride()[:2], *self._launch(logits),
        )  # fmt: skip
        if bad_row >= 0:
            raise checks.illegal_label(labels, bad_row, ignore_index, vocab_total)

    def token_logps_fwd(self, logits, labels, logps, stats, *, ignore_index, scale, softcap, vocab_start, vocab_total) -> None:
        self._token_logps(
            self._module.token_logps_fwd, logits, labels, logps, stats, None, None,
            ignore_index, scale, softcap, vocab_start, vocab_total,
        )  # fmt: skip

    def token_logps_bwd(
        self, dlogps, logits, labels, stats, dlogits, *, ignore_index, scale, softcap, vocab_start, vocab_total
    ) -> None:
        self._token_logps(
            self._module.token_logps_bwd, logits, labels, None, stats, dlogps, dlogits,
            ignore_index, scale, softcap, vocab_start, vocab_total,
        )  # fmt: skip

    def group_loss_fwd(
        self, name, logps, ref_logps, scores, mask, lengths, desirable, baseline, loss, rewards, dlogps, *,
        beta, alpha, pairs, reduction,
    ) -> None:  # fmt: skip
        self._module.group_loss_fwd(
            LOSSES[name], PAIRS[pairs], REDUCTIONS[reduction], *logps.shape, logps.data_ptr(), ref_logps.data_ptr(),
            scores.data_ptr(), _address(mask), _address(lengths), _address(desirable), _address(baseline), beta, alpha,
            loss.data_ptr(), rewards.data_ptr(), dlogps.data_ptr(), *self._launch(logps),
        )  # fmt: skip


cuda = NativeBackend("cuda")
cpu = NativeBackend("cpu")
