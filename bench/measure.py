"""The timer: it checks every implementation first and then times all of them in turn.

Each round calls all of them once, in a new random order: a drift of the machine's clock affects all alike, and none always
follows the same neighbour (with a fixed order the same function, timed twice, differed by 8%). Consecutive calls get different
copies of the inputs, so that no cache holds them.
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

from .cases import Call, Implementation, Problem, Tensors, Unsupported
from .memory import MIB, peak_extra, poisoned, release

ROTATION_BYTES = 2**28  # the size of all copies of the inputs: several times the largest cache known
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # above any rounding error, below any mistake
CEILING = "ceiling: "
SLEEP_CYCLES = 2_000_000  # about 1 ms, in which Python queues the call, so that the kernels and not the launches are timed


@dataclass
class Outcome:
    """The measurements of one implementation."""

    name: str
    pass_name: str
    status: str = "ok"
    times: list[float] = field(default_factory=list)  # ms
    peak_mib: float | None = None
    result_mib: float | None = None
    error: float | None = None
    grad_error: float | None = None
    padding: float | None = None  # the share of an epoch's positions that is padding
    computed: float | None = None  # the share of the logits that backward computes


Results = tuple[Tensor, list[Tensor]]  # values, and gradients of the leaves
Pass = Callable[[Tensors], object]
Contestant = tuple[Pass, Outcome, bool]  # the timed function, the record of its times, and whether it overwrites the leaves


@dataclass
class Budget:
    """How long to measure a problem: ``rounds`` rounds, then more until ``seconds`` are over, at most ``8 * rounds`` in all."""

    rounds: int
    seconds: float


def measure(problem: Problem, implementations: list[Implementation], budget: Budget) -> list[Outcome]:
    """Outcomes in the order of ``implementations``, then those of the ceilings, named ``ceiling: ...``."""
    device = next(iter(problem.tensors.values())).device.type
    release(device)  # memory of the previous problem
    sets = _copies(problem)
    outcomes: list[Outcome] = []
    contestants: list[Contestant] = []
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
        with reported(outcome):
            contestants.append((ceiling.build(), outcome, False))
    _time_in_turn(problem, contestants, sets, budget, device)
    return outcomes


def median(times: list[float]) -> float:
    return quantile(times, 0.5)


def quantile(times: list[float], q: float) -> float:
    return torch.tensor(times, dtype=torch.float64).quantile(q).item()


def _copies(problem: Problem) -> list[Tensors]:
    size = sum(tensor.nbytes for tensor in problem.tensors.values())
    count = min(8, max(2, -(-ROTATION_BYTES // size)))
    return [
        {name: tensor.clone().requires_grad_(name in problem.leaves) for name, tensor in problem.tensors.items()}
        for _ in range(count)
    ]


def _restore(problem: Problem, tensors: Tensors) -> None:
    """Restore the inputs that a backward in place has overwritten."""
    with torch.no_grad():
        for name in problem.leaves:
            tensors[name].copy_(problem.tensors[name])


def _run(problem: Problem, implementation: Implementation, call: Call, tensors: Tensors) -> Results:
    """One pass: the values and the gradients of the leaves."""
    values = call(tensors)
    if not problem.leaves:
        return values, []
    upstream = None
    if problem.upstream is not None:
        upstream = problem.upstream.to(values.dtype)
        upstream = -upstream if implementation.negated else upstream
    return values, list(torch.autograd.grad(values, [tensors[name] for name in problem.leaves], upstream))


@contextmanager
def reported(outcome: Outcome) -> Iterator[None]:
    """Turn an exception inside into the outcome's status, so that one implementation may fail without the others."""
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
    """The status that describes a failure."""
    return f"failed: {type(failure).__name__}: {_first_line(failure)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _checked(
    problem: Problem, implementation: Implementation, tensors: Tensors, outcome: Outcome, device: str
) -> Callable[[Tensors], Results] | None:
    """Build an implementation, check it against float64 and measure its memory; return the pass to time, or None if it failed."""
    with reported(outcome):
        call = implementation.build()

        def run(tensors: Tensors) -> Results:
            return _run(problem, implementation, call, tensors)

        with poisoned(device):
            checked, gradients = run(tensors)
        checked = -checked if implementation.negated else checked
        outcome.error, outcome.grad_error = problem.truth(checked.detach(), gradients)
        del checked, gradients
        _restore(problem, tensors)
        (values, grads), outcome.peak_mib = peak_extra(lambda: run(tensors), device)
        held = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        outcome.result_mib = (
            sum(tensor.nbytes for tensor in (values, *grads) if tensor.untyped_storage().data_ptr() not in held) / MIB
        )
        tolerance = TOLERANCE[problem.dtype]
        # `<=` is false for NaN, which is wrong too.
        of_gradients = implementation.tolerance or tolerance
        if outcome.error <= tolerance and (outcome.grad_error is None or outcome.grad_error <= of_gradients):
            return run
        outcome.status = "wrong"
    return None


def _time_in_turn(problem: Problem, contestants: list[Contestant], sets: list[Tensors], budget: Budget, device: str) -> None:
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
            with reported(outcome):  # it may fail here: the check ran alone, and now all contestants hold memory
                ms = timer(run, tensors, problem.repeats)
                if round_number >= 0:
                    outcome.times.append(ms)
            if inplace:
                _restore(problem, tensors)  # at once: restored just before its next use, it would be in the cache
        if any(outcome.status != "ok" for _, outcome, _ in contestants):
            contestants[:] = [contestant for contestant in contestants if contestant[1].status == "ok"]
            release(device)


def _time_cpu(run: Pass, tensors: Tensors, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = run(tensors)
    elapsed = time.perf_counter() - start
    del result  # freeing it is not part of the work
    return 1e3 * elapsed / repeats


def _time_cuda(run: Pass, tensors: Tensors, repeats: int) -> float:
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
