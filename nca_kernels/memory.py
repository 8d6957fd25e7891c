"""Memory for a gradient as large as the logits: fresh, or that of the logits themselves."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor, nn

from . import _compat

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, which on Linux asks for huge pages where they fit into CPU memory.

    The allocator gets large blocks from the system at every call, and their first touch faults once for each page: with pages
    of 4 KiB a backward from logits takes 3.5 times as long.
    """
    fresh = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and fresh.nbytes >= 2 * _HUGE_PAGE and sys.platform == "linux":
        first = -(-fresh.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (fresh.data_ptr() + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # Only a hint: where it is refused, nothing is lost but time.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return fresh


def may_be_overwritten(logits: Tensor, node: object) -> bool:
    """Whether the backward of an autograd node may write its gradient in the place of the logits that it has saved.

    Not in a graph that is being traced, where the compiler plans the memory; not where one number belongs to several rows;
    not where saved-tensor hooks may keep the logits for another operator, since PyTorch compares no versions there.
    """
    if type(logits) not in (Tensor, nn.Parameter) or rows_overlap(logits) or _compat.shares_storage(logits):
        return False
    base = _compat.view_base(logits)
    makers = (logits.grad_fn, None if base is None else base.grad_fn)
    return not any(_compat.saved_under_hooks(n) for n in (node, *makers))


def rows_overlap(logits: Tensor) -> bool:
    """Whether two rows ``[..., V]`` share a number; false where a row's own numbers lie apart, which no kernel reads."""
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
    # The dimensions interleave, so only the rows' starts can tell.
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, n in spaced:
        starts = (starts[:, None] + stride * torch.arange(n)).flatten()
    return bool((starts.sort().values.diff() < V).any())
