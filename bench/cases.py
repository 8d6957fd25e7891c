"""What a suite is made of: problems, the implementations that compete in them, the ceilings that bound them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IGNORE_INDEX = -100
BACKENDS = {"cpu": ["cpu"], "cuda": ["triton", "cuda"]}

Call = Callable[[dict[str, Tensor]], Tensor]


class Unsupported(Exception):
    """Why an implementation cannot run here."""


@dataclass(frozen=True)
class Implementation:
    """One competitor. ``build`` imports it and returns what maps the problem's tensors to its values."""

    name: str
    build: Callable[[], Call]
    negated: bool = False  # it returns losses, the problem asks for log-probs
    inplace: bool = False  # its backward destroys the leaves


@dataclass(frozen=True)
class Ceiling:
    """A plain operation on the same tensors that moves ``amount`` bytes (or does as many FLOP) as fast as it goes."""

    build: Callable[[], Callable[[dict[str, Tensor]], object]]
    amount: int


@dataclass
class Problem:
    """One case at one pass: inputs, truth, and the least amount of work that answers it."""

    case: str
    pass_name: str  # "fwd", "fwd+bwd" or "step"
    dtype: str
    tensors: dict[str, Tensor]
    truth: Callable[[Tensor, list[Tensor]], tuple[float, float | None]]  # errors of values and gradients
    leaves: tuple[str, ...] = ()
    upstream: Tensor | None = None
    kind: str | None = None  # "bytes", "flop" or "tokens": what `amount` counts
    amount: int | None = None
    bound_by: str | None = None  # the ceiling that bounds it
    unit: str | None = None  # the ceiling that its times are counted in
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    repeats: int = 1  # calls in one timed sample; more than 1 leaves the cost of launching in


def random_labels(rows: int, vocab: int, ignored: bool, device: str) -> Tensor:
    """Labels, every second one ignored where ``ignored``."""
    labels = torch.randint(vocab, (rows,), device=device)
    if ignored:
        labels[::2] = IGNORE_INDEX
    return labels


def plain_logps(logits: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The ordinary way: ``log_softmax`` in float32, then ``gather``."""
    logps = logits.to(dtype).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(labels == IGNORE_INDEX, 0.0)


def compiled(function: Callable) -> Callable:
    # Without the reset the second shape compiles with dynamic sizes, and the ninth not at all.
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def ours(op: str, backend: str, device: str, dtype: torch.dtype, **settings) -> Callable[[], Call]:
    """The ``build`` of this package's function ``op`` on one backend."""

    def build():
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
    """The ``build`` of a peer that has GPU kernels only."""

    def checked():
        if device != "cuda":
            raise Unsupported("has GPU kernels only")
        return build()

    return checked


class LogpTruth:
    """Float64 in closed form, some rows at a time: float64 logits of a large vocabulary fit nowhere.

    ``rows(start, stop)`` gives the float64 logits of these rows.
    """

    CHUNK_BYTES = 2**28

    def __init__(self, rows: Callable[[int, int], Tensor], vocab: int, labels: Tensor, upstream: Tensor | None):
        self.rows, self.labels, self.upstream = rows, labels, upstream
        self.step = max(1, self.CHUNK_BYTES // (8 * vocab))

    def chunks(self):
        """Rows, their float64 log-probs and d logps / d logits times the upstream gradient."""
        for start in range(0, len(self.labels), self.step):
            rows = slice(start, start + self.step)
            labels = self.labels[rows]
            scored = labels != IGNORE_INDEX
            log_p = self.rows(start, start + self.step).log_softmax(-1)
            at_label = labels.clamp(min=0).unsqueeze(-1)
            logps = log_p.gather(-1, at_label).squeeze(-1).masked_fill(~scored, 0.0)
            dlogits = None
            if self.upstream is not None:
                dlogits = log_p.exp_().neg_()
                dlogits.scatter_(-1, at_label, -torch.expm1(logps).unsqueeze(-1))
                dlogits *= torch.where(scored, self.upstream[rows].double(), 0.0).unsqueeze(-1)
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
