"""The one timer: check first, then time every implementation in turn.

Each round calls all of them once, in an order of its own: a drift of the machine's clock hits all alike, and none always
follows the same neighbour (with a fixed order the same function, timed twice, differed by 8%). Each call gets another copy
of the inputs than the call before, so that no cache holds them.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import Implementation, Problem, Unsupported
from .memory import MIB, peak_extra, poisoned, release

ROTATION_BYTES = 2**28  # the copies of the inputs together: several times the largest cache met so far
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # wider than any rounding, narrower than any mistake
CEILING = "ceiling: "
SLEEP_CYCLES = 2_000_000  # about 1 ms of a GPU, in which Python queues the call: kernels are timed, not launches


@dataclass
class Outcome:
    """What was measured of one implementation."""

    name: str
    pass_name: str
    status: str = "ok"
    times: list[float] = field(default_factory=list)  # ms
    peak_mib: float | None = None
    result_mib: float | None = None
    error: float | None = None
    grad_error: float | None = None


@dataclass
class Budget:
    """How long to measure a problem: at least ``rounds``, then on until ``seconds`` are over, up to 8 times as many."""

    rounds: int
    seconds: float


def measure(problem: Problem, implementations: list[Implementation], budget: Budget) -> list[Outcome]:
    """The outcomes in the order of ``implementations``, then those of the ceilings, named ``ceiling: ...``."""
    device = next(iter(problem.tensors.values())).device.type
    release(device)  # the last problem's
    sets = _copies(problem)
    outcomes, contestants = [], []
    for implementation in implementations:
        outcome = Outcome(implementation.name, problem.pass_name + (" in place" if implementation.inplace else ""))
        outcomes.append(outcome)
        run = _checked(problem, implementation, sets[0], outcome, device)
        _restore(problem, sets[0])
        if run is None:
            release(device)
        else:
            contestants.append((run, outcome, implementation.inplace))
    for name, ceiling in problem.ceilings.items():
        outcome = Outcome(CEILING + name, problem.pass_name)
        outcomes.append(outcome)
        with _reported(outcome):
            contestants.append((ceiling.build(), outcome, False))
    _time_in_turn(problem, contestants, sets, budget, device)
    return outcomes


def median(times: list[float]) -> float:
    return quantile(times, 0.5)


def quantile(times: list[float], q: float) -> float:
    return torch.tensor(times, dtype=torch.float64).quantile(q).item()


def _copies(problem: Problem) -> list[dict[str, Tensor]]:
    size = sum(tensor.nbytes for tensor in problem.tensors.values())
    count = min(8, max(2, -(-ROTATION_BYTES // size)))
    return [
        {name: tensor.clone().requires_grad_(name in problem.leaves) for name, tensor in problem.tensors.items()}
        for _ in range(count)
    ]


def _restore(problem: Problem, tensors: dict[str, Tensor]) -> None:
    """Undo a backward in place."""
    with torch.no_grad():
        for name in problem.leaves:
            tensors[name].copy_(problem.tensors[name])


def _run(problem: Problem, implementation: Implementation, call: Callable, tensors: dict[str, Tensor]):
    """One pass: values, and the gradients of the leaves."""
    values = call(tensors)
    if not problem.leaves:
        return values, []
    upstream = None
    if problem.upstream is not None:
        upstream = problem.upstream.to(values.dtype)
        upstream = -upstream if implementation.negated else upstream
    return values, list(torch.autograd.grad(values, [tensors[name] for name in problem.leaves], upstream))


@contextmanager
def _reported(outcome: Outcome) -> Iterator[None]:
    """A failure inside becomes the outcome's status: a peer may fail in any way, and the others still count."""
    try:
        yield
    except (Unsupported, ImportError) as reason:
        outcome.status = f"unsupported: {_first_line(reason)}"
    except Exception as failure:
        traceback.print_exc()
        outcome.status = failed(failure)
    if outcome.status != "ok":
        outcome.times.clear()


def failed(failure: Exception) -> str:
    """A failure as a status."""
    return f"failed: {type(failure).__name__}: {_first_line(failure)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _checked(problem, implementation, tensors, outcome, device) -> Callable | None:
    """Build, check against float64, take the memory; the pass to time, or None where there is nothing to time."""
    with _reported(outcome):
        call = implementation.build()

        def run(tensors):
            return _run(problem, implementation, call, tensors)

        with poisoned(device):
            values, grads = run(tensors)
        values = -values if implementation.negated else values
        outcome.error, outcome.grad_error = problem.truth(values.detach(), grads)
        del values, grads
        _restore(problem, tensors)
        (values, grads), outcome.peak_mib = peak_extra(lambda: run(tensors), device)
        held = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        outcome.result_mib = (
            sum(tensor.nbytes for tensor in (values, *grads) if tensor.untyped_storage().data_ptr() not in held) / MIB
        )
        tolerance = TOLERANCE[problem.dtype]
        # Not ">": NaN is wrong, too.
        if outcome.error <= tolerance and (outcome.grad_error is None or outcome.grad_error <= tolerance):
            return run
        outcome.status = "wrong"
    return None


def _time_in_turn(problem, contestants, sets, budget, device) -> None:
    timer = _time_cuda if device == "cuda" else _time_cpu
    started = time.monotonic()
    turn, order = 0, random.Random(0)
    for round_number in range(-1, 8 * budget.rounds):  # the first, -1, warms up
        if round_number >= budget.rounds and time.monotonic() - started > budget.seconds:
            break
        order.shuffle(contestants)
        for run, outcome, inplace in contestants:
            tensors = sets[turn % len(sets)]
            turn += 1
            with _reported(outcome):  # with all contestants alive, what was memory enough for the check may not be
                ms = timer(run, tensors, problem.repeats)
                if round_number >= 0:
                    outcome.times.append(ms)
            if inplace:
                _restore(problem, tensors)  # now, not before its next use: that would leave it in the cache
        if any(outcome.status != "ok" for _, outcome, _ in contestants):
            contestants[:] = [contestant for contestant in contestants if contestant[1].status == "ok"]
            release(device)


def _time_cpu(run, tensors, repeats) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = run(tensors)
    elapsed = time.perf_counter() - start
    del result  # freeing it is not part of the work
    return 1e3 * elapsed / repeats


def _time_cuda(run, tensors, repeats) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if repeats == 1:
        torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    for _ in range(repeats):
        run(tensors)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats
