"""Launch settings of Triton's row kernels and tile sizes of the linear functions, beside those that the package uses.

The rows named ``nca_kernels`` are the package as it is. The other rows are named after the setting that they change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

from torch import Tensor

from nca_kernels.tiles import TILE_BYTES

from . import linear, logps
from .cases import BACKENDS, DTYPES, Call, Implementation, Problem, Tensors, ours
from .memory import MIB

# Words per thread, warps per program, and the most registers per thread; None leaves these to the compiler.
WORDS, WARPS, REGISTERS = (2, 4, 8), (4, 8, 16), (None, 64)
TILES = {"cpu": (4, 8, 16, 32), "cuda": (32, 64, 128, 256, 512)}  # MiB
# A suite and its problem: rows, width if linear, vocabulary, dtype
CASES = {
    "cpu": [("linear", 1024, 512, 32000, "float32")],
    "cuda": [("logps", 8192, vocab, "bfloat16") for vocab in (32000, 128256, 262144)]
    + [("linear", 8192, 4096, 128256, "bfloat16")],
}
TINY = [("logps", 2, 1000, "bfloat16"), ("linear", 24, 16, 300, "float32")]


def problems(device: str, cases: list[tuple]) -> Iterator[tuple[Problem, list[Implementation]]]:
    for suite, *sizes in cases:
        yield from _launches(device, *sizes) if suite == "logps" else _tiles(device, *sizes)


def _rivals(
    mine: str, build: Callable[[], Call], change: Callable[[Any], None], own: object, settings: dict[str, Any]
) -> list[Implementation]:
    """The package as it is, twice, and with each setting. ``change`` sets it before a pass, and the backward uses it too."""

    def changed(setting: object) -> Callable[[], Call]:
        def built() -> Call:
            call = build()

            def run(tensors: Tensors) -> Tensor:
                change(setting)
                return call(tensors)

            return run

        return built

    named: dict[str, object] = {f"nca_kernels {mine}": own, f"nca_kernels {mine} again": own, **settings}
    return [Implementation(name, changed(setting)) for name, setting in named.items()]


def _launches(device: str, rows: int, vocab: int, dtype: str) -> Iterator[tuple[Problem, list[Implementation]]]:
    """Forward alone, then backward after the package's own forward."""
    from nca_kernels.backends.triton import token_logps as kernels

    build = ours("token_logps", "triton", device, DTYPES[dtype])
    for name, leaves in (("_fwd_launch", logps.NO_LEAVES), ("_bwd_launch", logps.LEAVES)):
        own = getattr(kernels, name)
        settings = {}
        for words, warps, registers in product(WORDS, WARPS, REGISTERS):
            launch = {"WORDS": 32 * warps * words, "num_warps": warps, "maxnreg": registers}
            title = f"{words} words, {warps} warps" + (f", {registers} registers" if registers else "")
            settings[title] = lambda *shape, own=own, launch=launch: own(*shape) | launch
        with patch.object(kernels, name, own):
            problem = logps.problem(rows, vocab, dtype, False, leaves, device)
            yield problem, _rivals("triton", build, partial(setattr, kernels, name), own, settings)


def _tiles(device: str, rows: int, width: int, vocab: int, dtype: str) -> Iterator[tuple[Problem, list[Implementation]]]:
    backend = BACKENDS[device][0]
    build = ours("linear_token_logps", backend, device, DTYPES[dtype])
    settings = {f"tiles of {mib} MiB": mib * MIB for mib in TILES[device] if mib * MIB != TILE_BYTES[device]}
    for name in linear.PASSES:
        with patch.dict(os.environ):
            problem = linear.problem(name, rows, width, vocab, dtype, False, device)
            yield problem, _rivals(backend, build, _set_tile_bytes, TILE_BYTES[device], settings)


def _set_tile_bytes(size: int) -> None:
    os.environ["NCA_KERNELS_TILE_BYTES"] = str(size)
