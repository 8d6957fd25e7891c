"""Errors of values and gradients against float64, next to those of PyTorch on the same inputs: ``python -m bench numerics``.

A cell is the largest error of a case, in the unit of its table. On a CPU the Triton kernels run in Triton's interpreter, which uses
``exp`` and ``log`` of NumPy instead of a GPU's, and truncates to bfloat16 where a GPU rounds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nca_kernels
from nca_kernels.backends import BACKENDS
from nca_kernels.loss_table import LOSSES

from . import schema
from .cases import LogpTruth

NAMES = {"cpu": ["cpu", "triton"], "cuda": ["triton", "cuda"]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 2.0**-23  # of float32
ROWS = 4
# Round numbers, and the vocabularies of Llama 2, Llama 3 and Qwen 2.5.
VOCABS = (1000, 32000, 128256, 151936)
LOGITS = ("x 1", "x 30", "x 1e4", "certain")
LENGTHS = (128, 1024, 8192)
HEAD = (64, 512, 32000)  # rows, width, vocabulary
GROUPS = ((64, 4), (16, 64))  # prompts, responses

Pass = tuple[Tensor, Tensor]  # values and one gradient
Row = dict[str, str]


def tables(
    device: str,
    vocabs: tuple[int, ...] = VOCABS,
    lengths: tuple[int, ...] = LENGTHS,
    head: tuple[int, int, int] = HEAD,
) -> Iterator[tuple[str, list[Row]]]:
    """Titles and rows of the tables."""
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined
    torch.manual_seed(0)
    yield (
        "token_logps: log-probs in 2^-23 (1 + |truth|) / gradients in spacings of their dtype at the true value",
        [_tokens(dtype, logits, V, device) for dtype in DTYPES for logits in LOGITS for V in vocabs],
    )
    yield (
        "sequence_logps: sums of T tokens in 2^-23 |truth|, V = 1000",
        [_sequences(dtype, T, packed, device) for dtype in DTYPES for packed in (False, True) for T in lengths],
    )
    yield (
        "token_stats: entropy in 2^-23 (1 + truth) / log-sum-exp in 2^-23 (1 + |truth|) / the gradient of both in eps of its row's "
        f"largest; eps is that of the dtype, V = {vocabs[-1]}",
        [_stats(dtype, logits, vocabs[-1], device) for dtype in DTYPES for logits in LOGITS],
    )
    yield (
        "linear_token_logps: log-probs in eps (1 + |truth|) / gradients in eps of the largest; eps is that of the dtype, "
        f"M = {head[0]}, D = {head[1]}, V = {head[2]}",
        [_head(dtype, trained, head, device) for dtype in DTYPES[:2] for trained in (False, True)],
    )
    yield (
        "group_loss: losses in 2^-23 (1 + |truth|) / gradients in 2^-23 of the largest, float32",
        [_losses(name, B, K, device) for name in LOSSES for B, K in GROUPS],
    )


def _obstacles(device: str) -> dict[str, list[str]]:
    """All reasons why each backend would not run here; empty if it runs."""
    return {name: BACKENDS[name].unsupported("token_logps", torch.device(device), torch.float32) for name in NAMES[device]}


def _backends(device: str) -> list[str]:
    return [name for name, reasons in _obstacles(device).items() if not reasons]


def _ours(function: Callable, device: str) -> dict[str, Callable]:
    return {backend: lambda *a, b=backend, **k: function(*a, **k, backend=b) for backend in _backends(device)}


def _plain(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


PEERS = {"PyTorch in float32": lambda x, y: _plain(x.float(), y), "PyTorch in the dtype": _plain}


def _pass(function: Callable[[Tensor], Tensor], leaf: Tensor, upstream: Tensor) -> Pass:
    leaf = leaf.detach().requires_grad_()
    values = function(leaf)
    (gradient,) = torch.autograd.grad(values, leaf, upstream.to(values.dtype))
    return values.detach().double(), gradient.double()


def _largest(error: Tensor) -> str:
    largest = error.abs().max().item()
    return "0" if largest < 0.005 else f"{largest:.0f}" if 100 <= largest < 1e4 else f"{largest:.2g}"


# --- from logits -----------------------------------------------------------------------------------------------------


def _problem(kind: str, V: int) -> tuple[Tensor, Tensor]:
    logits, labels = torch.randn(ROWS, V), torch.randint(V, (ROWS,))
    if kind != "certain":
        return logits * float(kind.removeprefix("x ")), labels
    # 1 - p from about 1e-1 to 1e-5.
    rest = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return logits.scatter_(1, labels[:, None], (rest + torch.linspace(2, 11, ROWS))[:, None]), labels


def _tokens(dtype: torch.dtype, kind: str, V: int, device: str) -> Row:
    logits, labels = _problem(kind, V)
    upstream = torch.randn(ROWS, device=device)
    logits, labels = logits.to(device, dtype), labels.to(device)
    truth = LogpTruth(lambda start, stop: logits[start:stop].double(), V, labels, upstream)
    [(_, logps, dlogits)] = truth.chunks()
    assert dlogits is not None
    row = {"dtype": _name(dtype), "logits": kind, "V": str(V)}
    for name, function in {**_ours(nca_kernels.token_logps, device), **PEERS}.items():
        values, gradient = _pass(lambda x: function(x, labels), logits, upstream)  # noqa: B023
        row[name] = f"{_largest((values - logps) / (EPS * (1 + logps.abs())))} / {_largest(_spacings(gradient, dlogits, dtype))}"
    return row


def _plain_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1), logits.logsumexp(-1)


STATS_PEERS = {"PyTorch in float32": lambda x, y: _plain_stats(x.float(), y), "PyTorch in the dtype": _plain_stats}


def _stats(dtype: torch.dtype, kind: str, V: int, device: str) -> Row:
    logits, labels = _problem(kind, V)
    logits, labels = logits.to(device, dtype), labels.to(device)
    upstream = torch.randn(2, ROWS, device=device)

    def run(function: Callable, leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = leaf.detach().requires_grad_()
        entropy, lse = function(leaf, labels)
        (gradient,) = torch.autograd.grad((entropy, lse), leaf, [g.to(entropy.dtype) for g in upstream])
        return entropy.detach().double(), lse.detach().double(), gradient.double()

    def ours(x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        stats = nca_kernels.token_stats(x, y, entropy_gradient=True, backend=backend)
        return stats.entropy, stats.lse

    truth = run(_plain_stats, logits.double())
    spacing = torch.finfo(dtype).eps * truth[2].abs().amax(-1, keepdim=True)
    row = {"dtype": _name(dtype), "logits": kind}
    for name, function in {**_ours(ours, device), **STATS_PEERS}.items():
        entropy, lse, gradient = run(function, logits)
        cells = [(got - exact) / (EPS * (1 + exact.abs())) for got, exact in ((entropy, truth[0]), (lse, truth[1]))]
        cells.append((gradient - truth[2]) / spacing)
        row[name] = " / ".join(map(_largest, cells))
    return row


def _spacings(got: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The error in spacings of ``dtype`` at the true value, or at its smallest normal number if that is larger."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(truth.abs().clamp(min=info.tiny)).exponent - 1
    return (got - truth) / torch.ldexp(torch.full_like(truth, info.eps), exponent)


def _sequences(dtype: torch.dtype, T: int, packed: bool, device: str) -> Row:
    """Two sequences of T tokens, in two rows or packed into one; on one backend, because PyTorch computes the sum on all."""
    backend = _backends(device)[0]
    logits = (2 * torch.randn(2 * T, 1000)).to(device, dtype)
    labels = torch.randint(1000, (2 * T,), device=device)
    bounds = torch.tensor([0, T, 2 * T], device=device)
    truth = _plain(logits.double(), labels).view(2, T).sum(1)
    if packed:
        ours = nca_kernels.sequence_logps(logits, labels, cu_seqlens=bounds, backend=backend)
    else:
        ours = nca_kernels.sequence_logps(logits.view(2, T, 1000), labels.view(2, T), backend=backend)
    sums = {backend: ours} | {name: peer(logits, labels).view(2, T).sum(1) for name, peer in PEERS.items()}
    row = {"dtype": _name(dtype), "T": str(T), "layout": "packed" if packed else "rows"}
    return row | {name: _largest((value.double() - truth) / (EPS * truth)) for name, value in sums.items()}


# --- from hidden states ----------------------------------------------------------------------------------------------


def _head(dtype: torch.dtype, trained: bool, sizes: tuple[int, int, int], device: str) -> Row:
    """A row of the table of heads. The gradient is that of the weight if the head is trained, else that of the hidden states."""
    M, D, V = sizes
    hidden, weight = torch.randn(M, D).to(device, dtype), (2 * D**-0.5 * torch.randn(V, D)).to(device, dtype)
    labels, upstream = torch.randint(V, (M,), device=device), torch.randn(M, device=device)
    leaf = weight if trained else hidden

    def run(function: Callable[[Tensor, Tensor], Tensor], to: torch.dtype) -> Pass:
        if trained:
            return _pass(lambda w: function(hidden.to(to), w), leaf.to(to), upstream)
        return _pass(lambda h: function(h, weight.to(to)), leaf.to(to), upstream)

    logps, truth = run(lambda h, w: _plain(F.linear(h, w), labels), torch.float64)
    ours = {
        name: lambda h, w, f=function: f(h, w, labels) for name, function in _ours(nca_kernels.linear_token_logps, device).items()
    }
    peers = {name: lambda h, w, f=peer: f(F.linear(h, w), labels) for name, peer in PEERS.items()}
    row = {"dtype": _name(dtype), "head": "trained" if trained else "frozen"}
    eps = torch.finfo(dtype).eps
    for name, function in (ours | peers).items():
        values, gradient = run(function, dtype)
        value_error = (values - logps) / (eps * (1 + logps.abs()))
        row[name] = f"{_largest(value_error)} / {_largest((gradient - truth) / (eps * truth.abs().max()))}"
    return row


# --- the K-way losses ------------------------------------------------------------------------------------------------


def _losses(name: str, B: int, K: int, device: str) -> Row:
    """A row for log-probs of long responses: hundreds of nats, and a few nats away from those of the reference model."""
    ref_logps = -300 * torch.rand(B, K, device=device) - 20
    logps = ref_logps + 12 * torch.randn(B, K, device=device)
    scores = torch.rand(B, K, device=device)

    def run(backend: str, dtype: torch.dtype) -> Pass:
        alpha: dict[str, Any] = {"alpha": 0.3} if "alpha" in LOSSES[name].takes else {}

        def loss(x: Tensor) -> Tensor:
            return nca_kernels.group_loss(name, x, ref_logps.to(dtype), scores.to(dtype), backend=backend, **alpha).loss

        return _pass(loss, logps.to(dtype), torch.ones((), device=device))

    loss, truth = run("torch", torch.float64)
    row = {"loss": name, "B": str(B), "K": str(K)}
    for title, backend in {**{b: b for b in _backends(device)}, "PyTorch in float32": "torch"}.items():
        value, gradient = run(backend, torch.float32)
        value_error = (value - loss) / (EPS * (1 + loss.abs()))
        row[title] = f"{_largest(value_error)} / {_largest((gradient - truth) / (EPS * truth.abs().max()))}"
    return row


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def markdown(rows: list[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def store(device: str, out: Path) -> Path:
    """Measure and print all tables, and write them to the folder of the device's results."""
    warnings.filterwarnings("ignore", module="triton")  # its interpreter computes both branches of a `where`
    header = schema.header("numerics", device)
    parts = [", ".join(f"{key} {value}" for key, value in header.items() if value is not None)]
    for title, rows in tables(device):
        parts.append(f"### {title}\n\n{markdown(rows)}")
        print(parts[-1], flush=True)
    parts += [f"Left out: {name} ({'; '.join(reasons)})" for name, reasons in _obstacles(device).items() if reasons]
    file = schema.path(out, {"header": header}).with_suffix(".md")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(parts) + "\n")
    return file
