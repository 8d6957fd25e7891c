"""Tiles of the linear family: how much of rows x vocabulary is at hand at a time, and sums of products over tiles.

A tile is a block of rows by a slice of the vocabulary. Its GEMMs are fast where it has rows enough to be worth reading
the slice of the head, and columns enough to be worth reading the hidden states: a thousand rows or so come first, then
as many columns as the bytes allow. The result does not depend on it beyond rounding.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Bytes of a tile. On a CPU half the cache that its cores share (32 MiB where it was measured; 32 MiB were no faster), so that
# the row kernels find it there beside the GEMM's operands; on a GPU what gives one GEMM a piece of work for every
# multiprocessor. The environment variable NCA_KERNELS_TILE_BYTES overrides both.
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

# The most rows of a tile, the head frozen or not. Frozen, a tile should span the vocabulary, for each slice more is a pass
# over u. Not frozen, it should span the rows, for each block more is a pass over dweight.
MOST_ROWS = {"cpu": (1024, 2048), "cuda": (1024, 8192)}

# Slices start at multiples of this, so that the vendor's GEMM finds its operands aligned.
ALIGNED = 64

# PyTorch >= 2.8 can leave the product of bfloat16 or float16 matrices in float32, and >= 2.10 add it to a float32 matrix (2.8 and
# 2.9 want the addend in the operands' dtype); on CUDA alone.
WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.mm.overloads()
WIDE_SUMS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 10)


def tile_shape(M: int, V: int, dtype: torch.dtype, device: torch.device, frozen: bool) -> tuple[int, int]:
    """Rows and columns of the tiles of ``[M, V]``. The head not ``frozen``, half the bytes are left to float32 sums."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    given = os.environ.get("NCA_KERNELS_TILE_BYTES", str(TILE_BYTES[kind]))
    if not given.isdecimal():
        raise ValueError(f"NCA_KERNELS_TILE_BYTES: got {given!r}, wanted a number of bytes")
    size = int(given) // dtype.itemsize
    if not frozen:
        size //= 2
    rows = max(1, min(M, MOST_ROWS[kind][not frozen], size // min(V, ALIGNED)))
    return rows, max(1, min(V, size // rows))


def split(total: int, most: int, multiple: int = 1) -> list[slice]:
    """``range(total)`` in as few slices of at most ``most`` as it takes, alike in length, starting at multiples."""
    if total == 0:
        return []
    each = -(-total // -(-total // most))
    each = -(-each // multiple) * multiple
    if each > most:  # the next lower multiple, unless most is below the first
        each = most // multiple * multiple or most
    return [slice(start, min(start + each, total)) for start in range(0, total, each)]


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, ``out`` of their dtype or float32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and WIDE_PRODUCTS:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


class ProductSum:
    """``out = sum of a @ b`` over a known number of terms: summed in float32, rounded once to the dtype of ``out``.

    A single term goes straight to ``out``. Of several in bfloat16 or float16 each is rounded on its way to the sum where
    PyTorch has no product in float32 (on a CPU).
    """

    def __init__(self, out: Tensor, terms: int):
        self.out, self.left = out, terms
        direct = terms == 1 or out.dtype == torch.float32
        self.total = out if direct else torch.empty_like(out, dtype=torch.float32)
        self.begun = False

    def add(self, a: Tensor, b: Tensor) -> None:
        if not self.begun:
            product(a, b, self.total)
        elif a.dtype == torch.float32:
            self.total.addmm_(a, b)
        elif a.is_cuda and WIDE_SUMS:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        elif a.is_cuda and WIDE_PRODUCTS:
            self.total.add_(torch.mm(a, b, out_dtype=torch.float32))
        else:
            self.total.add_(torch.mm(a, b))
        self.begun = True
        self.left -= 1
        if self.left == 0 and self.total is not self.out:
            self.out.copy_(self.total)
