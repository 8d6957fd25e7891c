"""Tiles of the linear family: how much of rows x vocabulary is held at a time, and products over tiles.

A tile is a block of rows by a slice of the vocabulary. Its GEMMs are fast where it has enough rows to amortise reading the
slice of the head, and enough columns to amortise reading the hidden states. The result depends on the tile by rounding alone.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Bytes of a tile. On a CPU half the cache that its cores share (32 MiB where it was measured; 32 MiB were no faster), so that
# the row kernels find the tile there beside the GEMM's operands; on a GPU enough for one GEMM to occupy every multiprocessor.
# The environment variable NCA_KERNELS_TILE_BYTES overrides both.
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

# The most rows of a tile. Frozen, more rows would cost columns, and each further slice is a pass over u. Trained, each further
# block is a pass over dweight.
MOST_ROWS_FROZEN = 1024
MOST_ROWS_TRAINED = {"cpu": 2048, "cuda": 8192}

# With a frozen head, rows are given up for one slice of the whole vocabulary, down to this many.
LEAST_ROWS_FROZEN = 512

# Slices and rows of a tile start at multiples of this, so that the GEMM finds its operands aligned.
ALIGNED = 64

# The most elements of the head that are converted to float32 at a time, where a GEMM needs float32 operands.
CONVERTED = 2 << 20

# PyTorch >= 2.8 can leave the product of bfloat16 or float16 matrices in float32, and >= 2.10 add it to a float32 matrix (2.8 and
# 2.9 want the addend in the operands' dtype); on CUDA alone.
_HAS_MM_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
_HAS_ADDMM_OUT_DTYPE = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


def aligned(columns: int) -> int:
    """``columns`` rounded up to a multiple of :data:`ALIGNED`."""
    return -(-columns // ALIGNED) * ALIGNED


def tile_shape(M: int, V: int, dtype: torch.dtype, device: torch.device, frozen: bool) -> tuple[int, int]:
    """Rows and columns of the tiles of logits ``[M, V]`` of ``dtype``; a tile is stored with rows padded to :data:`ALIGNED`.

    Without a ``frozen`` head half of the bytes are left to float32 sums.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    given = os.environ.get("NCA_KERNELS_TILE_BYTES", str(TILE_BYTES[kind]))
    if not given.isdecimal():
        raise ValueError(f"NCA_KERNELS_TILE_BYTES: got {given!r}, wanted a number of bytes")
    size = int(given) // dtype.itemsize
    if not frozen:
        size //= 2
    rows = min(M, MOST_ROWS_FROZEN if frozen else MOST_ROWS_TRAINED[kind], size // min(V, ALIGNED))
    if frozen and size // V >= min(M, LEAST_ROWS_FROZEN):
        rows = min(rows, size // V)
    rows = max(1, rows)
    return rows, max(1, min(V, size // rows))


def split(total: int, most: int, multiple: int = 1) -> list[slice]:
    """``range(total)`` in as few slices of at most ``most`` as it takes, alike in length, starting at multiples."""
    if total <= most:
        return [slice(0, total)] if total else []
    each = -(-total // -(-total // most))
    each = -(-each // multiple) * multiple
    if each > most:  # the next lower multiple, unless most is below the first
        each = most // multiple * multiple or most
    return [slice(start, min(start + each, total)) for start in range(0, total, each)]


def stored_elements(M: int, V: int, save_budget: int, dtype: torch.dtype) -> int:
    """The room for logits ``[M, V]`` that a budget in bytes buys: padding of the rows comes on top of it.

    ``M`` may be symbolic, hence no comparison.
    """
    budget = save_budget // dtype.itemsize * aligned(V) // V
    return torch.sym_min(budget, M * aligned(V))


class Tiling:
    """The rows in blocks, the columns in slices, memory for one tile, and the logits that are kept (``kept``, flat)."""

    def __init__(self, M: int, V: int, kept: Tensor, operand_dtype: torch.dtype, frozen: bool) -> None:
        """Tiles are of ``kept``'s dtype and device, their GEMMs' operands of ``operand_dtype``."""
        rows, columns = tile_shape(M, V, kept.dtype, kept.device, frozen)
        stored = V if M * aligned(V) <= kept.numel() else kept.numel() // max(M, 1) // ALIGNED * ALIGNED
        self.store = kept[: M * aligned(stored)].view(M, aligned(stored))[:, :stored]
        self.blocks = split(M, rows)
        self.slices = split(stored, columns, ALIGNED)
        self.slices += [slice(stored + s.start, stored + s.stop) for s in split(V - stored, columns, ALIGNED)]
        width = max((s.stop - s.start for s in self.slices), default=0)
        self.operand_dtype = operand_dtype
        self._buffer = kept.new_empty(rows * aligned(width))
        self._spare = self._operand = kept.new_empty(0)

    def tile(self, block: slice, columns: slice) -> Tensor:
        """Memory of the tile, its rows padded to :data:`ALIGNED` for the GEMMs and row kernels, also where V is odd."""
        return _tile_in(self._buffer, block, columns)

    def spare_tile(self, block: slice, columns: slice) -> Tensor:
        """Memory of a second tile."""
        if not self._spare.numel():
            self._spare = torch.empty_like(self._buffer)
        return _tile_in(self._spare, block, columns)

    def logits(self, block: slice, columns: slice) -> tuple[Tensor, bool]:
        """Where a tile's logits belong, and whether they are kept there."""
        kept = columns.stop <= self.store.shape[1]
        return self.store[block, columns] if kept else self.tile(block, columns), kept

    def operand(self, tile: Tensor) -> Tensor:
        """The tile in the dtype of the GEMMs: itself, or a copy that the next call overwrites."""
        if tile.dtype == self.operand_dtype:
            return tile
        if not self._operand.numel():
            self._operand = self._buffer.new_empty(self._buffer.shape, dtype=self.operand_dtype)
        return _tile_in(self._operand, slice(0, len(tile)), slice(0, tile.shape[1])).copy_(tile)


def _tile_in(memory: Tensor, block: slice, columns: slice) -> Tensor:
    rows, width = block.stop - block.start, columns.stop - columns.start
    return memory[: rows * aligned(width)].view(rows, aligned(width))[:, :width]


def multiplies_wide(a: Tensor) -> bool:
    """Whether the GEMM can leave a product of 16-bit matrices in float32."""
    if not a.is_cuda or torch.version.hip or not _HAS_MM_OUT_DTYPE:
        return False
    # PyTorch refuses a float32 product where float16 sums are allowed.
    return a.dtype != torch.float16 or not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, ``out`` of their dtype or float32.

    In float32 the product of 16-bit matrices is rounded to their dtype on its way where the GEMM cannot leave it in float32.
    """
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif multiplies_wide(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def exact_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b.T`` in float32 from 16-bit ``a [M, D]`` and ``b [V, D]``, rounded to float32 alone.

    Where the GEMM cannot do that, ``a`` and a few rows of ``b`` at a time are converted to float32.
    """
    if multiplies_wide(a):
        torch.mm(a, b.t(), out_dtype=torch.float32, out=out)
        return
    a = a.float()
    parts = split(len(b), max(1, CONVERTED // b.shape[1]))
    # One buffer for all parts: malloc may keep those that are freed, up to a float32 copy of the head.
    buffer = b.new_empty((max((part.stop - part.start for part in parts), default=0), b.shape[1]), dtype=torch.float32)
    for part in parts:
        piece = buffer[: part.stop - part.start].copy_(b[part])
        torch.mm(a, piece.t(), out=out[:, part])


class ProductSum:
    """``out = sum of a @ b`` over a known number of terms: summed in float32, rounded once to the dtype of ``out``.

    A single term is written straight to ``out``. Of several in bfloat16 or float16 each is rounded on its way to the sum where
    the GEMM has no product in float32 (on a CPU).
    """

    def __init__(self, out: Tensor, terms: int) -> None:
        self.out, self.left = out, terms
        direct = terms == 1 or out.dtype == torch.float32
        self.total = out if direct else torch.empty_like(out, dtype=torch.float32)
        self.begun = False

    def add(self, a: Tensor, b: Tensor) -> None:
        if not self.begun:
            product(a, b, self.total)
        elif a.dtype == torch.float32:
            self.total.addmm_(a, b)
        elif not multiplies_wide(a):
            self.total.add_(torch.mm(a, b))
        elif _HAS_ADDMM_OUT_DTYPE:
            torch.addmm(self.total, a, b, out_dtype=torch.float32, out=self.total)
        else:
            self.total.add_(torch.mm(a, b, out_dtype=torch.float32))
        self.begun = True
        self.left -= 1
        if self.left == 0 and self.total is not self.out:
            self.out.copy_(self.total)
