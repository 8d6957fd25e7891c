"""Checks of the public functions' arguments: each error names the argument, what came and what was wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """``ValueError`` unless ``value`` has exactly the shape ``wanted``, which is that ``of`` something."""
    if value.shape != wanted:
        raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {list(wanted)} ({of})")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: on {value.device}, wanted {other.device}, where {other_name} is")


def positive(name: str, value: object) -> float:
    """The number as a float; ``ValueError`` unless it is finite and above zero."""
    return _number(name, value, lambda number: number > 0, "a finite number > 0")


def non_negative(name: str, value: object) -> float:
    return _number(name, value, lambda number: number >= 0, "a finite number >= 0")


def _number(name, value, accepts, wanted) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}")
    if not (math.isfinite(value) and accepts(value)):
        raise ValueError(f"{name}: got {value}, wanted {wanted}")
    return float(value)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, allowed))}")


def rows(labels: Tensor, leading: tuple[int, ...], of: str, shift: int, cu_seqlens: Tensor | None) -> None:
    """The arguments that the token functions share: labels, shift and segment bounds against ``of``'s leading shape."""
    integer("labels", labels)
    shape("labels", labels, leading, f"{of} without its last dimension")
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift: got {type(shift).__name__}, wanted an int >= 0")
    if shift < 0:
        raise ValueError(f"shift: got {shift}, wanted an int >= 0")
    if cu_seqlens is None:
        if shift and len(leading) < 2:
            raise ValueError(
                f"shift: got {shift} with {of} of one row of tokens; wanted 0, a batch [N, T, ...], or cu_seqlens, since "
                "nothing says where its sequences end"
            )
        return
    integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}, wanted [S + 1]")
    if len(leading) > 1 and math.prod(leading[:-1]) != 1:
        raise ValueError(f"cu_seqlens: {of} has leading shape {list(leading)}, wanted one packed row, [M] or [1, M]")
    same_device("cu_seqlens", cu_seqlens, "labels", labels)


def segment_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """``ValueError`` unless the bounds rise from 0 to ``tokens``. Reads values: syncs on a GPU."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens: got {bounds}, wanted bounds that rise from 0 to {tokens}, the packed row's length")
