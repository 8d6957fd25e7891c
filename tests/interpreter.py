"""Triton's interpreter, made to round bfloat16 as a GPU does. Its own conversion drops the last 16 bits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as the bits that the interpreter stores."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(values.shape)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


@functools.cache
def round_bfloat16() -> None:
    """From now on, in this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    other_casts = InterpreterBuilder.cast_impl
    ours = {(tl.float32, tl.bfloat16): _to_bfloat16, (tl.bfloat16, tl.float32): _to_float32}

    def cast(self: Any, value: Any, dtype: Any) -> Any:
        convert = next((f for (a, b), f in ours.items() if (value.dtype.scalar, dtype.scalar) == (a, b)), None)
        return other_casts(self, value, dtype) if convert is None else TensorHandle(convert(value.data), dtype.scalar)

    InterpreterBuilder.cast_impl = cast
