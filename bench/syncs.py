"""``python -m bench.syncs`` lists where a training step makes the CPU wait for the GPU, from PyTorch's own warnings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch

from . import step


def waits(call: Callable[[], object]) -> Counter[str]:
    """The lines of Python code at which ``call`` waits for the GPU, each with its count."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{each.filename}:{each.lineno}" for each in found if "synchroniz" in str(each.message))


def main() -> None:
    case = step.TINY[0]
    name = next(name for name in step.ways(case, "cuda") if name.startswith("nca_kernels"))
    runner = step.Runner(name)
    runner.begin(case, "cuda")
    batch = runner.batches[0]
    runner.step(batch)  # the first step compiles and allocates
    places = waits(lambda: runner.step(batch))
    print(f"{name}: one training step, forward to optimizer, waits for the GPU {places.total()} times")
    for place, times in places.most_common():
        print(f"{times:4} at {place}")


if __name__ == "__main__":
    main()
