"""The shapes of tiles of logits, and matrix products over tiles.

A tile is a block of rows by a slice of the vocabulary. Its GEMMs are fast if it has enough rows to amortise reading the slice of
the head, and enough columns to amortise reading the hidden states. Results depend on the shape of the tiles by rounding alone.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Bytes of a tile. On a CPU, half of the cache that its cores share (which is 32 MiB where it was measured; a tile of 32 MiB was no
# faster): the row kernels then find the tile in the cache, and the GEMM's operands fit beside it. On a GPU, enough for one GEMM to
# occupy every multiprocessor. The environment variable NCA_KERNELS_TILE_BYTES overrides both.
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

# The most rows of a tile. With a frozen head, more rows would mean fewer columns, and each further slice is a pass over u. With a
# trained head, each further block of rows is a pass over dweight.
MOST_ROWS_FROZEN = 1024
MOST_ROWS_TRAINED = {"cpu": 2048, "cuda": 8192}

# With a frozen head, a tile gets as few rows as this if that makes one slice of the whole vocabulary.
LEAST_ROWS_FROZEN = 512

# Slices and rows of a tile start at multiples of this many elements, so that the GEMM finds its operands aligned.
ALIGNED = 64

# The most elements of the head that are converted to float32 at a time, where a GEMM needs float32 operands.
CONVERTED = 2 << 20

# On CUDA, PyTorch >= 2.8 can write the product of bfloat16 or float16 matrices in float32, and PyTorch >= 2.10 can add it to a
# float32 matrix (2.8 and 2.9 take the addend in the operands' dtype).
_HAS_MM_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
_HAS_ADDMM_OUT_DTYPE = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


def aligned(columns: int) -> int:
    """``columns`` rounded up to a multiple of :data:`ALIGNED`."""
    return -(-columns // ALIGNED) * ALIGNED


def tile_shape(M: int, V: int, dtype: torch.dtype, device: torch.device, frozen: bool, width: int | None = None) -> tuple[int, int]:
    """Rows and columns of the tiles of logits ``[M, V]`` of ``dtype``; a tile is stored with rows padded to :data:`ALIGNED`.

    Unless the head is ``frozen``, the tile gets half of the bytes, and float32 sums the other half. ``width`` gives the columns.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    given = os.environ.get("NCA_KERNELS_TILE_BYTES", str(TILE_BYTES[kind]))
    if not given.isdecimal():
        raise ValueError(f"NCA_KERNELS_TILE_BYTES: got {given!r}, wanted a number of bytes")
    size = int(given) // dtype.itemsize
    if not frozen:
        size //= 2
    rows = min(M, MOST_ROWS_FROZEN if frozen else MOST_ROWS_TRAINED[kind], size // (width or min(V, ALIGNED)))
    if frozen and size // V >= min(M, LEAST_ROWS_FROZEN):
        rows = min(rows, size // V)
    rows = max(1, rows)
    return rows, width or max(1, min(V, size // rows))


def split(total: int, most: int, multiple: int = 1) -> list[slice]:
    """``range(total)`` in the fewest slices of at most ``most``, of about equal length, starting at multiples of ``multiple``."""
    if total <= most:
        return [slice(0, total)] if total else []
    each = -(-total // -(-total // most))
    each = -(-each // multiple) * multiple
    if each > most:  # the next lower multiple, unless most is below the first
        each = most // multiple * multiple or most
    return [slice(start, min(start + each, total)) for start in range(0, total, each)]


def stored_elements(M: int, V: int, save_budget: int, dtype: torch.dtype) -> int:
    """How many elements of kept logits ``[M, V]`` a budget in bytes allows. The padding of their rows comes on top of it.

    ``M`` may be symbolic, so it is not compared.
    """
    budget = save_budget // dtype.itemsize * aligned(V) // V
    return torch.sym_min(budget, M * aligned(V))


class Tiling:
    """The blocks of rows, the slices of columns, memory for one tile, and the kept logits (``kept``, flat)."""

    def __init__(self, M: int, V: int, kept: Tensor, operand_dtype: torch.dtype, frozen: bool, width: int | None = None) -> None:
        """Tiles have the dtype and device of ``kept``; the operands of their GEMMs have ``operand_dtype``.

        If ``width`` is given, all slices but the last have so many columns, and a slice is kept whole or not at all.
        """
        self.rows, columns = tile_shape(M, V, kept.dtype, kept.device, frozen, width)
        stored = V if M * aligned(V) <= kept.numel() else kept.numel() // max(M, 1) // ALIGNED * ALIGNED
        self.store = kept[: M * aligned(stored)].view(M, aligned(stored))[:, :stored]
        self.blocks = split(M, self.rows)
        if width is None:
            self.slices = split(stored, columns, ALIGNED)
            self.slices += [slice(stored + s.start, stored + s.stop) for s in split(V - stored, columns, ALIGNED)]
        else:
            self.slices = [slice(start, min(start + width, V)) for start in range(0, V, width)]
        widest = max((s.stop - s.start for s in self.slices), default=0)
        self.operand_dtype = operand_dtype
        self._buffer = kept.new_empty(self.rows * aligned(widest))
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
        """Memory for a tile's logits, and whether they are kept in it."""
        kept = self.keeps(columns)
        return self.store[block, columns] if kept else self.tile(block, columns), kept

    def keeps(self, columns: slice) -> bool:
        """Whether the logits of a slice are kept."""
        return columns.stop <= self.store.shape[1]

    def operand(self, tile: Tensor) -> Tensor:
        """The tile in the dtype of the GEMMs: itself, or a copy that the next call overwrites."""
        if tile.dtype == self.operand_dtype:
            return tile
        if not self._operand.numel():
            self._operand = self._buffer.new_empty(self._buffer.shape, dtype=self.operand_dtype)
        return _tile_in(self._operand, slice(0, len(tile)), slice(0, tile.shape[1])).copy_(tile)


def _tile_in(memory: Tensor, block: slice, columns: slice) -> Tensor:
    rows, width = block.stop - block.start, columns.stop - columns.start
    padded = memory[: rows * aligned(width)].view(rows, aligned(width))
    # A GEMM of 16-bit matrices on a CPU with AMX may multiply the padding by zeros, and what was there before may be NaN. On a GPU
    # no GEMM reads it, and this would be a kernel a tile.
    if not memory.is_cuda:
        padded[:, width:].zero_()
    return padded[:, :width]


def multiplies_wide(a: Tensor) -> bool:
    """Whether the GEMM can write a product of 16-bit matrices in float32."""
    if not a.is_cuda or torch.version.hip or not _HAS_MM_OUT_DTYPE:
        return False
    # PyTorch refuses a float32 product where float16 sums are allowed.
    return a.dtype != torch.float16 or not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``; ``out`` has their dtype or float32.

    If the GEMM cannot write the product of 16-bit matrices in float32, the product is rounded to their dtype first.
    """
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif multiplies_wide(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def exact_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b.T`` in float32 from 16-bit ``a [M, D]`` and ``b [V, D]``, without a rounding to 16 bits.

    If the GEMM cannot do that, ``a`` and a few rows of ``b`` at a time are converted to float32.
    """
    if multiplies_wide(a):
        torch.mm(a, b.t(), out_dtype=torch.float32, out=out)
        return
    a = a.float()
    parts = split(len(b), max(1, CONVERTED // b.shape[1]))
    # One buffer for all parts: malloc may hold on to freed ones, up to a float32 copy of the head.
    buffer = b.new_empty((max((part.stop - part.start for part in parts), default=0), b.shape[1]), dtype=torch.float32)
    for part in parts:
        piece = buffer[: part.stop - part.start].copy_(b[part])
        torch.mm(a, piece.t(), out=out[:, part])


class ProductSum:
    """``out = sum of a @ b`` over a known number of terms: summed in float32, rounded once to the dtype of ``out``.

    A single term is written straight to ``out``. If there are several, in bfloat16 or float16, and the GEMM cannot write a product
    in float32 (on a CPU), each is rounded before it is added.
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
