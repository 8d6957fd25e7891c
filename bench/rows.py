"""The CPU row kernels of several builds in one process, each called in turn on inputs that no cache holds.

    python -m bench.rows [--threads 2] [--rounds 15] [--dtype bfloat16] [other builds' _cpu*.so ...]

It prints medians in ms, with that of one read of the logits. A ratio above 1 says how much faster this build is than the other.
NCA_KERNELS_ISA sets the instruction set of all builds.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nca_kernels.backends.native import NativeBackend

from . import ceilings
from .cases import DTYPES
from .measure import median

OPTIONS = {"ignore_index": -100, "scale": 1.0, "softcap": None, "vocab_start": 0}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__.split("\n")[0])
    parser.add_argument("others", nargs="*", type=Path, help="extension modules to compare with")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backends = [NativeBackend("cpu"), *map(_load, options.others)]
    print(f"M={options.rows} V={options.vocab}, {options.threads} threads; {', '.join(each.description() for each in backends)}")
    for dtype in options.dtype or DTYPES:
        logits = (2 * torch.randn(options.rows, options.vocab)).to(DTYPES[dtype]).unsqueeze(0)
        for name, times in _measure(logits, backends, options.rounds):
            ours, *others = times[: len(backends)]
            ratios = ", ".join(f"{other / ours:.2f}" for other in others)
            print(f"{dtype:<9} {name:<28} " + " ".join(f"{each:7.2f}" for each in times) + f"   {ratios}", flush=True)


def _load(path: Path) -> NativeBackend:
    # pybind11 keeps one module for each name.
    spec = importlib.util.spec_from_file_location(f"{path.absolute().parent}._cpu", path)
    assert spec and spec.loader, path
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = NativeBackend("cpu")
    vars(backend)["_module"] = module
    return backend


def _measure(logits: Tensor, backends: list[NativeBackend], rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each pass with its medians: one per backend, then that of one read."""
    labels = torch.randint(logits.shape[-1], logits.shape[:2])
    logps, upstream = torch.empty(labels.shape), torch.randn(3, *labels.shape)
    buffers = [logits.clone() for _ in range(len(backends) + 1)]
    options: dict[str, Any] = {**OPTIONS, "vocab_total": logits.shape[-1]}
    reader = ceilings.read("logits", logits).build()

    def forward(stat_rows: int) -> list[Callable[[Tensor], None]]:
        stats = torch.empty(stat_rows, *labels.shape)

        def call(backend: NativeBackend, x: Tensor) -> None:
            backend.token_logps_fwd(x, labels, logps, stats, **options)

        return [partial(call, backend) for backend in backends]

    def backward(target: Tensor | None, **grads: Any) -> list[Callable[[Tensor], None]]:
        stats = torch.empty(4, *labels.shape)
        backends[0].token_logps_fwd(logits, labels, logps, stats, **options)

        def call(backend: NativeBackend, x: Tensor) -> None:
            backend.token_logps_bwd(upstream[0], x, labels, stats, x if target is None else target, **grads, **options)

        return [partial(call, backend) for backend in backends]

    passes = {
        "forward": forward(3),
        "forward, four statistics": forward(4),
        "backward in place": backward(None),
        "backward": backward(torch.zeros_like(logits)),
        "backward of all in place": backward(None, dlse=upstream[1], dentropy=upstream[2]),
    }
    for name, calls in passes.items():
        contestants = [*calls, lambda x: reader({"logits": x})]
        times: list[list[float]] = [[] for _ in contestants]
        for _ in range(rounds):
            if "in place" in name:
                for buffer in buffers:
                    buffer.copy_(logits)
            pool = random.sample(buffers, len(buffers))
            for at, buffer in zip(random.sample(range(len(contestants)), len(contestants)), pool, strict=True):
                start = time.perf_counter()
                contestants[at](buffer)
                times[at].append(1e3 * (time.perf_counter() - start))
        yield name, [median(each) for each in times]


if __name__ == "__main__":
    main()
