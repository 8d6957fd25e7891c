"""The `triton` backend: CUDA tensors, and CPU tensors under Triton's interpreter. Importing it does not load Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from ...loss_table import LOSSES

NAME = "triton"

_OPS = ("token_logps", "token_stats", "group_loss", "linear_token_logps", "linear_token_stats")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)  # Triton's own: https://github.com/triton-lang/triton#compatibility


def unsupported(op: str, device: torch.device, dtype: torch.dtype | None, loss: str | None = None) -> list[str]:
    """Every reason why this backend cannot run `op` on this device; an empty list if it can."""
    reasons = [*_without_triton(), *_wrong_device(device)]
    if op not in _OPS:
        reasons.append(f"it has no {op!r}, only {', '.join(_OPS)}")
    if dtype is not None and dtype not in _DTYPES:
        reasons.append(f"{dtype} is not among {', '.join(map(str, _DTYPES))}")
    if loss is not None and not LOSSES[loss].has_kernels:
        reasons.append(f"it has no kernel for the loss {loss!r}")
    return reasons


@functools.cache  # called for every choice of a backend, and find_spec is slow
def _without_triton() -> tuple[str, ...]:
    return () if importlib.util.find_spec("triton") else ("Triton is not installed (pip install triton)",)


def _wrong_device(device: torch.device) -> list[str]:
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return [] if interpreted else ["CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"]
    if device.type != "cuda":
        return [f"it runs on CUDA tensors, not on {device.type!r}"]
    if torch.version.hip:  # on ROCm, too, the device type is "cuda"
        return ["its settings are made for NVIDIA GPUs, and this PyTorch is built for ROCm"]
    if not torch.cuda.is_available():
        return ["PyTorch sees no CUDA device"]
    capability = torch.cuda.get_device_capability(device)
    if capability >= _MIN_CAPABILITY:
        return []
    have, want = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
    return [f"Triton needs compute capability {want}, {device} has {have}"]


def token_logps_fwd(*args: Any, **kwargs: Any) -> None:
    from . import token_logps

    token_logps.token_logps_fwd(*args, **kwargs)


def token_logps_bwd(*args: Any, **kwargs: Any) -> None:
    from . import token_logps

    token_logps.token_logps_bwd(*args, **kwargs)


def group_loss_fwd(*args: Any, **kwargs: Any) -> None:
    from . import group_loss

    group_loss.group_loss_fwd(*args, **kwargs)
