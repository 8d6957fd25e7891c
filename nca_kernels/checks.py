"""Checks of the public functions' arguments. Each error names the argument, what was passed and what was wanted."""

from __future__ import annotations

import math
import os
from collections.abc import Collection

import torch
from torch import Tensor

from . import _compat

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT32 = torch.finfo(torch.float32)
INT64 = torch.iinfo(torch.int64)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], wanted: str) -> None:
    """``TypeError`` unless ``value`` is a tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got a tensor of {value.dtype}, wanted {wanted}")


def floating(name: str, value: object) -> None:
    tensor(name, value, FLOATING, "a tensor of float32, bfloat16, float16 or float64")


def integer(name: str, value: object) -> None:
    tensor(name, value, (torch.int64, torch.int32), "a tensor of int64 or int32")


def boolean(name: str, value: object) -> None:
    tensor(name, value, (torch.bool,), "a tensor of bool")


def shape(name: str, value: Tensor, wanted: tuple[int, ...], of: str) -> None:
    """``ValueError`` unless ``value`` has the shape ``wanted``; ``of`` says in the message whose shape that is."""
    if value.shape != wanted:
        raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {list(wanted)} ({of})")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: on {value.device}, wanted {other.device}, where {other_name} is")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a bool")


def integer_between(name: str, value: object, low: int, high: int, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, wanted {wanted}")


def positive(name: str, value: object) -> float:
    """The number as a float; ``ValueError`` unless it is finite and above zero, in float32 too."""
    return _number(name, value, FLOAT32.tiny, "a finite number > 0")


def non_negative(name: str, value: object) -> float:
    return _number(name, value, 0, "a finite number >= 0")


def share(name: str, value: object) -> float:
    """The number as a float; ``ValueError`` unless it is in [0, 1)."""
    wanted = "a number >= 0 and < 1"
    number = _number(name, value, 0, wanted)
    if not number < 1:
        raise ValueError(f"{name}: got {value}, wanted {wanted}")
    return number


def _number(name: str, value: object, least: float, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    # Comparisons only, because torch.compile does not know math.isfinite of a symbolic number. NaN fails them.
    if not least <= value <= FLOAT32.max:
        raise ValueError(f"{name}: got {value}, wanted {wanted}, in float32")
    return float(value)


def one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """``ValueError`` unless ``value`` is one of these strings; ``TypeError`` unless it is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted one of {', '.join(map(repr, allowed))}")
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, allowed))}")


def rows(labels: Tensor, leading: tuple[int, ...], of: str, shift: int, cu_seqlens: Tensor | None) -> None:
    """Check labels, shift and segment bounds against ``leading``, the shape of ``of`` without its last dimension."""
    integer("labels", labels)
    shape("labels", labels, leading, f"{of} without its last dimension")
    integer_between("shift", shift, 0, INT64.max, "an int >= 0")
    if cu_seqlens is None:
        if shift and len(leading) < 2:
            raise ValueError(
                f"shift: got {shift} with {of} of one row of tokens; wanted 0, a batch [N, T, ...], or cu_seqlens, since "
                "nothing says where its sequences end"
            )
        return
    integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}, wanted [S + 1]")
    if len(leading) > 1 and math.prod(leading[:-1]) != 1:
        raise ValueError(f"cu_seqlens: {of} has leading shape {list(leading)}, wanted one packed row, [M] or [1, M]")
    same_device("cu_seqlens", cu_seqlens, "labels", labels)


def are_read(values: Tensor) -> bool:
    """Whether values may be read: always on a CPU; on a GPU, where that costs a sync, only under ``NCA_KERNELS_CHECK=1``.

    Never if the tensor has no values of its own: in a graph that is being traced, and under ``vmap``.
    """
    wanted = values.device.type == "cpu" or os.environ.get("NCA_KERNELS_CHECK") == "1"
    if not wanted or _compat.is_fake(values):
        return False
    return torch.compiler.is_compiling() or not _compat.is_batched(values)


def vocabulary(labels: Tensor, ignore_index: int, vocab_total: int) -> None:
    """``IndexError`` for a label that is neither in ``[0, vocab_total)`` nor ``ignore_index``. Syncs on a GPU."""
    bad = ((labels < 0) | (labels >= vocab_total)) & (labels != ignore_index)
    if bad.any():
        raise illegal_label(labels, int(bad.flatten().nonzero()[0]), ignore_index, vocab_total)


def ids(name: str, value: Tensor, V: int) -> None:
    """``IndexError`` for an id that is not in ``[0, V)``. Syncs on a GPU."""
    bad = (value < 0) | (value >= V)
    if bad.any():
        position = int(bad.flatten().nonzero()[0])
        raise IndexError(f"{name}: the id {int(value.flatten()[position])} at flat position {position} is not in [0, {V})")


def illegal_label(labels: Tensor, position: int, ignore_index: int, vocab_total: int) -> IndexError:
    return IndexError(
        f"labels: the label {int(labels.flatten()[position])} of the logits at flat position {position} is neither in "
        f"[0, {vocab_total}) nor ignore_index ({ignore_index})"
    )


def segment_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """``ValueError`` unless the bounds rise from 0 to ``tokens``; ``RuntimeError`` in a compiled graph. Syncs on a GPU."""
    if torch.compiler.is_compiling():
        rising = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        _compat.assert_in_graph(rising, "cu_seqlens: wanted bounds that rise from 0 to the packed row's length")
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens: got {bounds}, wanted bounds that rise from 0 to {tokens}, the packed row's length")
