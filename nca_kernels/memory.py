"""Memory for a gradient as large as the logits: fresh memory, or the storage of the logits."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor, nn

from . import _compat

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; on Linux, a large tensor on the CPU asks for huge pages.

    The allocator gets large blocks from the system at every call, and the first touch of each page faults. With pages of 4 KiB a
    backward from logits takes 3.5 times as long.
    """
    fresh = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and fresh.nbytes >= 2 * _HUGE_PAGE and sys.platform == "linux":
        first = -(-fresh.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (fresh.data_ptr() + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # This is a hint. If the system refuses it, only time is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return fresh


def may_be_overwritten(logits: Tensor, node: object) -> bool:
    """Whether the backward of an autograd node may write its gradient over the logits that it has saved.

    It may not in three cases: in a graph that is being traced, where the compiler plans the memory; where rows overlap; and where
    saved-tensor hooks may keep the logits for another operator, because PyTorch compares no versions there.
    """
    if type(logits) not in (Tensor, nn.Parameter) or rows_overlap(logits) or _compat.shares_storage(logits):
        return False
    base = _compat.view_base(logits)
    makers = (logits.grad_fn, None if base is None else base.grad_fn)
    return not any(_compat.saved_under_hooks(n) for n in (node, *makers))


def rows_overlap(logits: Tensor) -> bool:
    """Whether two rows ``[..., V]`` share an element; false for rows of another stride than 1, which no kernel reads."""
    V = logits.shape[-1]
    if logits.is_contiguous() or (V > 1 and logits.stride(-1) != 1):
        return False
    spaced = sorted((stride, n) for stride, n in zip(logits.stride()[:-1], logits.shape[:-1], strict=True) if n > 1)
    extent = V
    for stride, n in spaced:
        if stride < extent:
            break
        extent += (n - 1) * stride
    else:
        return False
    # The dimensions interleave: compare the starts of all rows.
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, n in spaced:
        starts = (starts[:, None] + stride * torch.arange(n)).flatten()
    return bool((starts.sort().values.diff() < V).any())
