"""Where a training step on a GPU makes the CPU wait for it: ``python -m bench.syncs``, by PyTorch's own warnings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch

from . import step


def waits(call: Callable[[], object]) -> Counter[str]:
    """The lines of Python at which ``call`` waits for the GPU, and how often."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{each.filename}:{each.lineno}" for each in found if "synchroniz" in str(each.message))


def main() -> None:
    problem, implementations = next(step.problems("cuda", step.TINY))
    ours = implementations[0]
    tensors = {name: tensor.cpu() for name, tensor in problem.tensors.items()}  # as a data loader hands them over
    run = ours.build()
    run(tensors)  # compiles, allocates
    places = waits(lambda: run(tensors))
    print(f"{ours.name}: one training step, forward to optimizer, waits for the GPU {places.total()} times")
    for place, times in places.most_common():
        print(f"{times:4} at {place}")


if __name__ == "__main__":
    main()
