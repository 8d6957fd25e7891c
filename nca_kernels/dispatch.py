"""Chooses the backend of a call: the first that can run it, or the named one; an error gives every reason why it cannot."""

from __future__ import annotations

import inspect
import os
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import _compat, checks
from .backends import BACKENDS

OPS = ("token_logps", "token_stats", "linear_token_logps", "linear_token_stats", "group_loss")


@_compat.constant_in_graphs
def resolve(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    loss: str | None = None,
    obstacle: str | None = None,
) -> str:
    """The name of the backend that runs ``op``.

    ``obstacle`` is a reason why no kernel can run this call (its layout, for example); only ``torch`` can then. Raises
    ``ValueError`` for an unknown backend and ``RuntimeError``, with every reason, for a named one that cannot run.
    """
    if not isinstance(backend, (str, type(None))):
        raise TypeError(f"backend: got {type(backend).__name__}, wanted None or a name")
    # TRITON_INTERPRET is the only state that can change the answer for the same arguments.
    choice = _choose(op, backend, device, dtype, loss, obstacle, os.environ.get("TRITON_INTERPRET"))
    if choice.warning and choice not in _WARNED:
        _WARNED.add(choice)
        warnings.warn(choice.warning, stacklevel=_level_of_the_user())
    return choice.name


class _Choice(NamedTuple):
    name: str
    warning: str = ""


_WARNED: set[_Choice] = set()  # each warning is given once


@lru_cache(maxsize=256)  # asking every backend takes longer than a small loss
def _choose(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    loss: str | None,
    obstacle: str | None,
    interpreter: str | None,
) -> _Choice:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted None or one of {', '.join(map(repr, BACKENDS))}")
    obstacles = {
        name: BACKENDS[name].unsupported(op, device, dtype, loss) + ([obstacle] if obstacle and name != "torch" else [])
        for name in (BACKENDS if backend is None else [backend])
    }
    for name, reasons in obstacles.items():
        if not reasons:
            if backend is None and name == "torch" and dtype != torch.float64:
                why = ". ".join(f"{other}: {'; '.join(obstacles[other])}" for other in obstacles if other != "torch")
                return _Choice(name, f"nca_kernels: {op} on {device} runs on plain PyTorch, slowly. {why}")
            return _Choice(name)
    (reasons,) = obstacles.values()  # of the named backend; without a name, torch runs every call
    raise RuntimeError(f"backend {backend!r} cannot run {op}: {'; '.join(reasons)}")


def _level_of_the_user() -> int:
    """The ``stacklevel``, for a warning of the caller of this function, of the nearest line outside the package."""
    frame, level = inspect.currentframe(), 0
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    return level


def layout_obstacle(logits: Tensor) -> str | None:
    """Why no kernel can read these logits, ``None`` if they can."""
    if logits.ndim and logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return "the kernels read rows of stride 1 along the vocabulary, the last dimension of logits, and these have another"
    return None


def explain(tensor_or_device: Tensor | torch.device | str, op: str | None = None) -> str:
    """Which backend would run each operation here, and why each other backend would not.

    Args:
        tensor_or_device: a tensor, a device, or the name of a device. A tensor stands for the logits of the call: its device, dtype
            and strides count. For a device, the dtype is float32.
        op: ``"token_logps"``, ``"token_stats"``, ``"linear_token_logps"``, ``"linear_token_stats"`` or ``"group_loss"``; ``None``:
            all of them.

    Returns:
        A table as text, with a line for each operation and each backend.

    Raises:
        ValueError: an unknown ``op``, or a name that is not a device.
        TypeError: an argument that is neither a tensor nor a device, or a tensor of another dtype than a floating one.

    Example:
        >>> print(explain("cpu", "group_loss"))  # doctest: +ELLIPSIS
        group_loss on cpu, torch.float32
        ...
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op: got {op!r}, wanted None or one of {', '.join(map(repr, OPS))}")
    obstacle = None
    if isinstance(tensor_or_device, Tensor):
        checks.floating("tensor_or_device", tensor_or_device)
        device, dtype, obstacle = tensor_or_device.device, tensor_or_device.dtype, layout_obstacle(tensor_or_device)
    elif isinstance(tensor_or_device, (str, torch.device)):
        device, dtype = _device(tensor_or_device), torch.float32
    else:
        raise TypeError(f"tensor_or_device: got {type(tensor_or_device).__name__}, wanted a tensor, a device or its name")
    lines = []
    for each in OPS if op is None else [op]:
        lines.append(f"{each} on {device}, {dtype}")
        chosen = False
        for name, backend in BACKENDS.items():
            reasons = backend.unsupported(each, device, dtype)
            if obstacle and each in ("token_logps", "token_stats") and name != "torch":
                reasons.append(obstacle)
            verdict = "; ".join(reasons) or ("would run too" if chosen else "runs")
            chosen = chosen or not reasons
            lines.append(f"  {name:<7} {verdict}")
    return "\n".join(lines)


def _device(name: torch.device | str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"tensor_or_device: got {name!r}, wanted a tensor, a device or its name, such as 'cpu' or 'cuda:0'"
        ) from None
