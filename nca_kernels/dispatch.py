"""Which backend runs a call: the first that can, or the one named, with every reason where none or it cannot."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from .backends import BACKENDS

OPS = ("token_logps", "linear_token_logps", "group_loss")


def resolve(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    loss: str | None = None,
    obstacle: str | None = None,
) -> str:
    """The name of the backend that runs ``op``.

    ``obstacle`` is a reason of the call's own why no kernel can serve it (a layout, say): only ``torch`` then can.
    Raises ``ValueError`` for an unknown backend and ``RuntimeError``, with every reason, for one that cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(map(repr, BACKENDS))}")
    for name in BACKENDS if backend is None else [backend]:
        reasons = _reasons(name, op, device, dtype, loss, obstacle)
        if not reasons:
            if backend is None and name == "torch" and dtype != torch.float64:
                _warn_slow(op, device.type, dtype, loss, obstacle)
            return name
    raise RuntimeError(f"backend {backend!r} cannot run {op}: {'; '.join(reasons)}")


# What torch.compiler.assume_constant_result sets: the traced graph takes the answer, not the questions. Set here by hand
# because that decorator imports the compiler, and with it Triton, seconds before anybody asked for them.
resolve._dynamo_marked_constant = True


def _reasons(name, op, device, dtype, loss, obstacle) -> list[str]:
    reasons = BACKENDS[name].unsupported(op, device, dtype, loss)
    return reasons + [obstacle] if obstacle and name != "torch" else reasons


@cache
def _warn_slow(op, device_type, dtype, loss, obstacle) -> None:
    """Say once for each kind of call that no kernel serves it."""
    device = torch.device(device_type)
    reasons = (f"{name}: {'; '.join(_reasons(name, op, device, dtype, loss, obstacle))}" for name in BACKENDS)
    warnings.warn(
        f"nca_kernels: {op} on {device_type} runs on plain PyTorch, slowly. " + ". ".join(list(reasons)[:-1]),
        stacklevel=4,
    )


def explain(tensor_or_device: Tensor | torch.device | str, op: str | None = None) -> str:
    """Which backend would run each operation here, and why each other would not.

    Args:
        tensor_or_device: a tensor (its device and dtype count) or a device, or a device's name (float32 is assumed).
        op: ``"token_logps"``, ``"linear_token_logps"`` or ``"group_loss"``; all of them where ``None``.

    Returns:
        A table as text: a line for each operation and backend.

    Raises:
        ValueError: an unknown ``op``.

    Example:
        >>> print(explain("cpu", "group_loss"))  # doctest: +ELLIPSIS
        group_loss on cpu, torch.float32
        ...
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op: got {op!r}, wanted None or one of {', '.join(map(repr, OPS))}")
    if isinstance(tensor_or_device, Tensor):
        device, dtype = tensor_or_device.device, tensor_or_device.dtype
    else:
        device, dtype = torch.device(tensor_or_device), torch.float32
    lines = []
    for each in OPS if op is None else [op]:
        lines.append(f"{each} on {device}, {dtype}")
        chosen = False
        for name, backend in BACKENDS.items():
            reasons = backend.unsupported(each, device, dtype)
            verdict = "; ".join(reasons) or ("would run too" if chosen else "runs")
            chosen = chosen or not reasons
            lines.append(f"  {name:<7} {verdict}")
    return "\n".join(lines)
