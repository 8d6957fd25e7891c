"""Measures the peak extra memory of a call, and fills the memory that it is given with garbage."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

MIB = 2**20
Result = TypeVar("Result")


def peak_extra(function: Callable[[], Result], device: str) -> tuple[Result, float | None]:
    """The result of ``function``, and the MiB at its peak beyond what was held before.

    On a GPU, PyTorch's allocator counts them (every kernel here allocates through it). On a CPU they are the high-water mark of
    the resident set, which ``/proc/self/clear_refs`` resets, so memory that no allocator hook sees (that of a C++ extension, or
    oneDNN's scratch) counts too. Memory that malloc has kept would hide new use, so it is returned to the system first. Call a
    warm function: code pages and thread stacks count as well. The number is exact to about 1 MiB. It is None where it is not
    available.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):  # without Linux and glibc, no number is better than a wrong one
        return function(), None
    before = _status("VmRSS")
    result = function()
    return result, max(0, _status("VmHWM") - before) / 1024


def release(device: str) -> None:
    """Free what a failure or another problem left in reference cycles and in PyTorch's cache."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Fill the memory handed out inside with garbage, so that an output that a kernel leaves unwritten shows."""
    if device == "cuda":
        # Half of the free memory is filled with NaN; the caching allocator then takes its blocks from these two pools.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        blocks = [torch.full((free // 8,), torch.nan, device="cuda")]
        blocks += [torch.full((2**16,), torch.nan, device="cuda") for _ in range(64)]
        del blocks
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    M_PERTURB = -6  # glibc fills what it hands out with the complement of this byte: 0x7f7f7f7f is 3.4e38
    mallopt(M_PERTURB, 0x80)
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
