"""Compares the linear functions with their parts: the GEMMs into allocated memory and the row kernels, each timed alone.

``python -m bench.linear_parts`` prints, for each case and dtype, the milliseconds of the call and of its parts, and their quotient.
Kept logits are in memory and a tile is in cache, so compare ``save_budget`` with the trained head without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import nca_kernels
from nca_kernels.rows import RowOptions
from nca_kernels.tiles import Tiling

M, D, V = 1024, 512, 32000
ROUNDS = 7
OPTIONS = RowOptions(ignore_index=-100, scale=1.0, softcap=None, backend="cpu")


def _best(function: Callable[[], object]) -> float:
    """The time of the fastest round, in milliseconds."""
    function()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def parts(hidden: Tensor, weight: Tensor, labels: Tensor, frozen: bool) -> dict[str, float]:
    """Milliseconds of each GEMM and row kernel for all tiles, extrapolated from the first tile."""
    tiling = Tiling(M, V, hidden.new_empty(0), hidden.dtype, frozen)
    block, columns = tiling.blocks[0], tiling.slices[0]
    tile, x, w, y = tiling.tile(block, columns), hidden[block], weight[columns], labels[block]
    rows, width = tile.shape
    logits = torch.randn(rows, width).to(hidden.dtype)
    stats, logps, ones = torch.empty(3, 1, rows), torch.empty(1, rows), torch.ones(1, rows)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    seconds = {
        "logits": _best(lambda: torch.mm(x, w.t(), out=tile)),
        "row forward": _best(lambda: OPTIONS.forward(logits[None], y[None], logps, stats, vocab_total=V)),
        "row backward": _best(lambda: OPTIONS.backward(ones, logits[None], y[None], stats, tile[None], vocab_total=V)),
        "dhidden": _best(lambda: torch.mm(tile, w, out=dx)),
        "dweight": _best(lambda: torch.mm(tile.t(), x, out=dw)),
    }
    return {name: value * len(tiling.blocks) * len(tiling.slices) for name, value in seconds.items()}


def call(hidden: Tensor, weight: Tensor, labels: Tensor, needs: tuple[bool, bool], save_budget: int = 0) -> float:
    """Milliseconds of ``linear_token_logps``, with its backward if any input needs a gradient."""
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip((hidden, weight), needs, strict=True)]

    def step() -> None:
        logps = nca_kernels.linear_token_logps(leaves[0], leaves[1], labels, save_budget=save_budget, backend="cpu")
        if any(needs):
            torch.autograd.grad(logps.sum(), [leaf for leaf in leaves if leaf.requires_grad])

    return _best(step)


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = torch.randn(M, D).to(dtype), (2 / D**0.5 * torch.randn(V, D)).to(dtype)
        labels = torch.randint(V, (M,))
        frozen, trained = (parts(hidden, weight, labels, kind) for kind in (True, False))
        rows = {
            "no gradient": ((False, False), 0, frozen["logits"] + frozen["row forward"]),
            "frozen head": ((True, False), 0, sum(frozen.values()) - frozen["dweight"]),
            "trained head": ((True, True), 0, sum(trained.values()) + trained["logits"]),
            "trained head, all logits kept": ((True, True), M * V * dtype.itemsize, sum(trained.values())),
        }
        for name, (needs, budget, expected) in rows.items():
            took = call(hidden, weight, labels, needs, budget)
            print(f"{dtype}, {name}: {took:.1f} ms, parts {expected:.1f} ms, quotient {took / expected:.3f}")


if __name__ == "__main__":
    main()
