"""The parts of a suite: problems, the implementations that solve them, and the ceilings that bound their speed.

A problem's truth is its result in float64, and its leaves are the inputs whose gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IGNORE_INDEX = -100
BACKENDS = {"cpu": ["cpu"], "cuda": ["triton", "cuda"]}

Tensors = dict[str, Tensor]  # the inputs of a problem, by the names of the arguments
Call = Callable[[Tensors], Tensor]
Truth = Callable[[Tensor, list[Tensor]], tuple[float, float | None]]  # from values and gradients to their errors


class Unsupported(Exception):
    """An implementation cannot run here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One implementation to time. ``build`` imports it and returns a function from the problem's tensors to its values."""

    name: str
    build: Callable[[], Call]
    negated: bool = False  # it returns losses, and the problem asks for log-probs
    inplace: bool = False  # its backward overwrites the leaves
    tolerance: float | None = None  # of the gradients, if they are approximate on purpose


@dataclass(frozen=True)
class Ceiling:
    """A plain operation on the same tensors that moves ``amount`` bytes, or does ``amount`` FLOP, at the machine's full speed."""

    build: Callable[[], Callable[[Tensors], object]]
    amount: int


@dataclass
class Problem:
    """One case and pass: the inputs, the truth, and the least amount of work that solves it."""

    case: str
    pass_name: str  # "fwd", "fwd+bwd" or "step"
    dtype: str
    tensors: Tensors
    truth: Truth
    leaves: tuple[str, ...] = ()
    upstream: Tensor | None = None
    kind: str | None = None  # "bytes", "flop" or "tokens": what `amount` counts
    amount: int | None = None
    bound_by: str | None = None  # the ceiling that bounds it
    unit: str | None = None  # the ceiling whose time is the unit of its times
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    repeats: int = 1  # calls in one timed sample; more than 1 includes the cost of launching


def random_labels(rows: int, vocab: int, ignored: bool, device: str) -> Tensor:
    """Random labels; with ``ignored`` every second one is ignored."""
    labels = torch.randint(vocab, (rows,), device=device)
    if ignored:
        labels[::2] = IGNORE_INDEX
    return labels


def plain_logps(logits: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The usual PyTorch code: ``log_softmax`` in float32, then ``gather``."""
    logps = logits.to(dtype).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(labels == IGNORE_INDEX, 0.0)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` under ``torch.compile``, for the shapes of its first call."""
    # Without the reset the second shape is compiled with dynamic sizes, and the ninth is not compiled at all.
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def ours(op: str, backend: str, device: str, dtype: torch.dtype, **settings: Any) -> Callable[[], Call]:
    """A ``build`` of this package's function ``op`` on one backend."""

    def build() -> Call:
        import nca_kernels
        from nca_kernels.dispatch import resolve

        try:
            resolve(op, backend, torch.device(device), dtype)
        except RuntimeError as error:
            raise Unsupported(str(error)) from None
        function = getattr(nca_kernels, op)
        return lambda tensors: function(**tensors, **settings, backend=backend)

    return build


def on_gpu(device: str, build: Callable[[], Call]) -> Callable[[], Call]:
    """A ``build`` of a package that has only GPU kernels."""

    def checked() -> Call:
        if device != "cuda":
            raise Unsupported("has only GPU kernels")
        return build()

    return checked


class LogpTruth:
    """Log-probs and gradients in float64 from their closed form, in blocks of rows, because all rows do not fit in memory.

    ``rows(start, stop)`` returns the float64 logits of these rows.
    """

    CHUNK_BYTES = 2**28

    def __init__(self, rows: Callable[[int, int], Tensor], vocab: int, labels: Tensor, upstream: Tensor | None) -> None:
        self.rows, self.labels, self.upstream = rows, labels, upstream
        self.step = max(1, self.CHUNK_BYTES // (8 * vocab))

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Rows, their log-probs, and d logps / d logits times the upstream gradient, if there is one."""
        for start in range(0, len(self.labels), self.step):
            rows = slice(start, start + self.step)
            labels = self.labels[rows]
            counted = labels != IGNORE_INDEX
            log_p = self.rows(start, start + self.step).log_softmax(-1)
            at_label = labels.clamp(min=0).unsqueeze(-1)
            logps = log_p.gather(-1, at_label).squeeze(-1).masked_fill(~counted, 0.0)
            dlogits = None
            if self.upstream is not None:
                dlogits = log_p.exp_().neg_()
                dlogits.scatter_(-1, at_label, -torch.expm1(logps).unsqueeze(-1))
                dlogits *= torch.where(counted, self.upstream[rows].double(), 0.0).unsqueeze(-1)
            yield rows, logps, dlogits


def value_error(values: Tensor, truth: Tensor) -> float:
    """The largest error in units of ``1 + |truth|``."""
    return _largest((values.double() - truth) / (1 + truth.abs()), values, truth)


def grad_error(grad: Tensor, truth: Tensor) -> float:
    """The largest error in units of the largest gradient."""
    return _largest(grad.double() - truth, grad, truth) / truth.abs().max().item()


def _largest(difference: Tensor, got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape:
        raise ValueError(f"got shape {list(got.shape)}, wanted {list(truth.shape)}")
    return difference.abs().nan_to_num(nan=torch.inf).max().item()
