"""Tiles of the linear family: how much of rows x vocabulary is at hand at a time, and products over tiles.

A tile is a block of rows by a slice of the vocabulary. GEMMs are fast on tiles with enough rows that the head's slice is
worth reading, and enough columns that the hidden states are: a thousand rows first, then what columns the bytes allow.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# The tile at hand, in bytes. On a CPU the cache that the cores share, out of which the row kernels then read. On a GPU
# enough for one GEMM to occupy every multiprocessor. ``NCA_KERNELS_TILE_BYTES`` overrides both.
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}

# The most rows of a tile. With a frozen head few, as the tile should span the vocabulary: each slice more is a pass over
# u. Otherwise many, as each block more is a pass over dweight's slice (and, in bfloat16 on a CPU, one rounding more).
MOST_ROWS = {"cpu": (1024, 2048), "cuda": (1024, 8192)}

LOW_PRECISION_SUMS = "dtype_out" in torch.ops.aten.addmm.overloads()  # PyTorch >= 2.8, on CUDA alone


def tile_shape(M: int, V: int, dtype: torch.dtype, device: torch.device, frozen: bool) -> tuple[int, int]:
    """Rows and columns of a tile of ``[M, V]``; with a head not ``frozen`` within half the bytes.

    The other half is for the float32 sum of dhidden.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    elements = int(os.environ.get("NCA_KERNELS_TILE_BYTES", TILE_BYTES[kind])) // dtype.itemsize
    if not frozen:
        elements //= 2
    rows = max(1, min(M, MOST_ROWS[kind][not frozen], elements // min(V, 64)))
    return rows, max(1, min(V, elements // rows))


def split(total: int, most: int, multiple: int = 1) -> list[slice]:
    """``range(total)`` in as few slices of at most ``most`` as it takes, alike in length, starting at multiples.

    A multiple keeps the slices' first elements aligned; below it ``most`` has its way.
    """
    if total == 0:
        return []
    each = -(-total // -(-total // most))
    if most >= multiple:
        each = min(-(-each // multiple), most // multiple) * multiple
    return [slice(start, min(start + each, total)) for start in range(0, total, each)]


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``; ``out`` has their dtype or float32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and LOW_PRECISION_SUMS:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in float32, without rounding the product where PyTorch can (it cannot on a CPU)."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and LOW_PRECISION_SUMS:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(a, b))


class ProductSum:
    """``out = sum of a @ b`` over a known number of terms, summed in float32 and rounded once to ``out``'s dtype."""

    def __init__(self, out: Tensor, terms: int):
        self.out = out
        whole = terms == 1 or out.dtype == torch.float32
        self.total = out if whole else torch.empty_like(out, dtype=torch.float32)
        self.terms_left = terms
        self.begun = False

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.begun:
            add_product(self.total, a, b)
        else:
            product(a, b, self.total)
        self.begun = True
        self.terms_left -= 1
        if self.terms_left == 0 and self.total is not self.out:
            self.out.copy_(self.total)
