"""Changes to Triton's interpreter: it rounds bfloat16 as a GPU does, and does no repeated work."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even and return the bits that the interpreter stores. Its own conversion drops the last 16 bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(values.shape)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


def round_bfloat16() -> None:
    """Round bfloat16 as a GPU does, from now on in this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    other_casts = InterpreterBuilder.cast_impl
    ours = {(tl.float32, tl.bfloat16): _to_bfloat16, (tl.bfloat16, tl.float32): _to_float32}

    def cast(self: Any, value: Any, dtype: Any) -> Any:
        convert = next((f for (a, b), f in ours.items() if (value.dtype.scalar, dtype.scalar) == (a, b)), None)
        return other_casts(self, value, dtype) if convert is None else TensorHandle(convert(value.data), dtype.scalar)

    InterpreterBuilder.cast_impl = cast


def leave_out_repeated_work() -> None:
    """Skip repeated work from now on in this process. It takes half of the interpreter's time and changes no result."""
    from triton.runtime import interpreter

    # The interpreter computes whether each integer sum, difference and product overflows, and reads it only under `debug`.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    # A launch replaces the functions of triton.language by interpreted ones. So does every call of a jitted function inside the
    # kernel, which finds them replaced.
    replace, launch, replaced = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @functools.cache
    def languages(function: Any) -> frozenset[str]:
        modules = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        return frozenset(modules & {"triton.language", "triton.language.core"})

    def replace_once(function: Any) -> Any:
        if languages(function) <= replaced:
            return None  # no caller inside a launch reads the result
        replaced.update(languages(function))
        return replace(function)

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, start
