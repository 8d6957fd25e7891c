"""Checks values and gradients of every backend that runs on this machine against float64, on problems of milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS
from .functional import token_logps, token_stats
from .linear_functional import linear_token_logps, linear_token_stats
from .loss_table import LOSSES
from .losses import group_loss

# Relative to the largest number. Rounding alone gives up to 7e-7 in float32, and 1e-2 in bfloat16, for logits and gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Problem(NamedTuple):
    """A call to check. Its ``tensors`` are float64, except integers and masks; the ``leaves`` get a gradient."""

    op: str
    call: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)


class Outcome(NamedTuple):
    """The result of one operation of one backend over its problems."""

    op: str
    device: torch.device
    backend: str
    dtype: torch.dtype
    errors: tuple[float, float] | None  # of values and of gradients
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.errors is not None and max(self.errors) <= TOLERANCE[self.dtype]  # false for NaN

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        values, gradients = self.errors or (float("nan"), float("nan"))
        found = self.failure or f"values {values:.1e}, gradients {gradients:.1e}"
        verdict = "ok" if self.passed else "failed"
        return f"  {self.op:<19} {self.device!s:<7} {self.backend:<7} {dtype:<9} {verdict:<7} {found}"


def run(devices: list[torch.device]) -> Iterator[Outcome]:
    """Check each operation on every backend that supports it on these devices."""
    by_op: dict[str, list[Problem]] = {}
    for problem in _problems():
        by_op.setdefault(problem.op, []).append(problem)
    for device in devices:
        for op, problems in by_op.items():
            for name, backend in BACKENDS.items():
                for dtype in problems[0].dtypes:
                    if not backend.unsupported(op, device, dtype):
                        yield _outcome(op, problems, device, name, dtype)


def _outcome(op: str, problems: list[Problem], device: torch.device, backend: str, dtype: torch.dtype) -> Outcome:
    errors = []
    try:
        for problem in problems:
            rounded = {name: t.to(dtype).double() if t.is_floating_point() else t for name, t in problem.tensors.items()}
            truth = _solve(problem, rounded, torch.device("cpu"), torch.float64, "torch")
            ours = _solve(problem, rounded, device, dtype, backend)
            errors.append([_error(a, b) for a, b in zip(ours, truth, strict=True)])
    except Exception as error:  # a broken installation may raise anything, and that is the outcome
        return Outcome(op, device, backend, dtype, None, f"{type(error).__name__}: {error}")
    worst = torch.tensor([[values, max(gradients)] for values, *gradients in errors]).amax(0)  # amax keeps NaN
    return Outcome(op, device, backend, dtype, tuple(worst.tolist()))


def _solve(problem: Problem, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The value, and the gradients of the leaves."""
    own = {name: t.detach().to(device, dtype if t.is_floating_point() else None) for name, t in tensors.items()}
    leaves = [own[name].requires_grad_() for name in problem.leaves]
    value = problem.call(**own, backend=backend)
    # Each number has another weight, so that a gradient at the wrong place shows.
    weights = torch.linspace(0.5, 1.5, value.numel(), device=device).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), leaves)]


def _error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double().cpu() - truth).abs().max() / truth.abs().max()).item()


def _problems() -> Iterator[Problem]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # No vector width divides this vocabulary; a third of the labels is ignored.
    N, T, V, D, B, K = 3, 20, 1003, 64, 6, 4
    labels = torch.randint(V, (N, T), generator=generator)
    labels[torch.rand((N, T), generator=generator) < 0.3] = -100

    def from_logits(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
        return token_logps(logits, labels, shift=1, softcap=30.0, backend=backend)

    def stats_of_logits(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
        stats = token_stats(logits, labels, shift=1, softcap=30.0, entropy_gradient=True, backend=backend)
        return torch.stack((stats.logps, stats.entropy, stats.lse, stats.top1.to(stats.lse.dtype)))

    def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, backend: str) -> Tensor:
        return linear_token_logps(hidden, weight, labels, bias=bias, shift=1, backend=backend)

    def stats_of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, backend: str) -> Tensor:
        stats = linear_token_stats(hidden, weight, labels, bias=bias, shift=1, entropy_gradient=True, backend=backend)
        return torch.stack((stats.logps, stats.entropy, stats.lse))

    logits = {"logits": 4 * normal(N, T, V), "labels": labels}
    yield Problem("token_logps", from_logits, logits, ("logits",))
    yield Problem("token_stats", stats_of_logits, logits, ("logits",))
    head = {"hidden": normal(N, T, D), "weight": normal(V, D) / 4, "bias": normal(V), "labels": labels}
    for leaves in (("hidden",), ("hidden", "weight", "bias")):  # a frozen head and a trained one take different code paths
        yield Problem("linear_token_logps", from_hidden, head, leaves)
        yield Problem("linear_token_stats", stats_of_hidden, head, leaves)

    group = {
        "logps": 5 * normal(B, K) - 30,
        "ref_logps": 5 * normal(B, K) - 30,
        "scores": normal(B, K).round(),  # with ties
        "mask": torch.arange(K) < torch.randint(1, K + 1, (B, 1), generator=generator),
        "lengths": torch.randint(1, 20, (B, K), generator=generator),
    }
    for name in LOSSES:

        def loss(name: str = name, **tensors: Any) -> Tensor:
            lengths = tensors.pop("lengths")
            given: dict[str, Any] = {"alpha": 0.5, "baseline": 0.5, "label_smoothing": 0.1}
            own = {argument: given[argument] for argument in LOSSES[name].takes if argument in given}
            return group_loss(name, **tensors, **own, lengths=lengths, nll_weight=0.1, reduction="none").loss

        yield Problem("group_loss", loss, group, ("logps",), (torch.float32,))
