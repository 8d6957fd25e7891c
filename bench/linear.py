"""Log-probs from hidden states, in units of U: the one GEMM ``[M, D] x [D, V]``, timed in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ceilings
from .cases import (
    BACKENDS,
    DTYPES,
    IGNORE_INDEX,
    Call,
    Implementation,
    LogpTruth,
    Problem,
    Tensors,
    Truth,
    Unsupported,
    grad_error,
    on_gpu,
    ours,
    plain_logps,
    random_labels,
    value_error,
)

# The leaves of the three cases, and the least number of GEMMs of each.
PASSES = {"no gradient": ((), 1), "frozen head": (("hidden",), 2), "trained head": (("hidden", "weight"), 3)}
# rows, width, vocabulary, dtype, half of the rows ignored
CASES = {
    "cpu": [
        (1024, 512, 32000, "float32", False),
        (1024, 512, 32000, "bfloat16", False),
        (1024, 512, 32000, "float32", True),
    ],
    "cuda": [(8192, 4096, 128256, "bfloat16", False), (8192, 4096, 128256, "bfloat16", True)],
}
TINY = [(24, 16, 300, "float32", True)]
TRL_CHUNK = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE


def problems(device: str, cases: list[tuple]) -> Iterator[tuple[Problem, list[Implementation]]]:
    for rows, width, vocab, dtype, ignored in cases:
        for name in PASSES:
            logits_bytes = rows * vocab * DTYPES[dtype].itemsize // (2 if ignored else 1)
            yield (
                problem(name, rows, width, vocab, dtype, ignored, device),
                implementations(device, DTYPES[dtype], name, logits_bytes),
            )


def problem(name: str, rows: int, width: int, vocab: int, dtype: str, ignored: bool, device: str) -> Problem:
    """One of :data:`PASSES` at one size."""
    leaves, gemms = PASSES[name]
    labels = random_labels(rows, vocab, ignored, device)
    weight = (2 / width**0.5 * torch.randn(vocab, width, device=device)).to(DTYPES[dtype])  # logits have a standard deviation of 2
    hidden = torch.randn(rows, width, device=device)
    # A row of weight has a squared norm of about 4, so this raises the logits of the labels by up to 12.
    hidden += 3 * torch.rand(rows, 1, device=device) * weight[labels.clamp(min=0)].float()
    hidden = hidden.to(DTYPES[dtype])
    upstream = torch.randn(rows, device=device) if leaves else None
    gemm = ceilings.gemm(hidden, weight)
    return Problem(
        case=f"{name}, M={rows} D={width} V={vocab}" + (", half ignored" if ignored else ""),
        pass_name="fwd+bwd" if leaves else "fwd",
        dtype=dtype,
        tensors={"hidden": hidden, "weight": weight, "labels": labels},
        truth=gradient_truth(hidden, weight, labels, upstream, leaves),
        leaves=leaves,
        upstream=upstream,
        kind="flop",
        amount=gemms * gemm.amount // (2 if ignored else 1),
        bound_by="GEMM",
        unit="GEMM",
        ceilings={"GEMM": gemm},
    )


def gradient_truth(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor | None, leaves: tuple[str, ...]) -> Truth:
    """The truth of the log-probs and of the gradients of ``leaves``."""
    weight64 = weight.double()
    truth = LogpTruth(lambda start, stop: hidden[start:stop].double() @ weight64.t(), len(weight), labels, upstream)
    values, dhidden, dweight = [], [], torch.zeros_like(weight64)
    for rows, logps, dlogits in truth.chunks():
        values.append(logps)
        if dlogits is not None:
            dhidden.append(dlogits @ weight64)
            dweight.addmm_(dlogits.t(), hidden[rows].double())
    all_logps = torch.cat(values)
    wanted = [torch.cat(dhidden)] if leaves else []
    wanted += [dweight] if "weight" in leaves else []

    def errors(values: Tensor, grads: list[Tensor]) -> tuple[float, float | None]:
        worst = [grad_error(grad, exact) for grad, exact in zip(grads, wanted, strict=True)]
        return value_error(values, all_logps), max(worst, default=None)

    return errors


def implementations(device: str, dtype: torch.dtype, case: str, logits_bytes: int) -> list[Implementation]:
    def linear_token_logps(backend: str, save_budget: int = 0) -> Callable[[], Call]:
        return ours("linear_token_logps", backend, device, dtype, save_budget=save_budget)

    names = BACKENDS[device]
    mine = [Implementation(f"nca_kernels {name}", linear_token_logps(name)) for name in names]
    mine.append(Implementation(f"nca_kernels {names[0]} again", linear_token_logps(names[0])))
    if case == "trained head":
        mine += [
            Implementation(f"nca_kernels {names[0]}, save_budget {percent}%", linear_token_logps(names[0], budget))
            for percent in (25, 50, 75, 100)
            for budget in [logits_bytes * percent // 100]
        ]
    return mine + peers(device)


def peers(device: str) -> list[Implementation]:
    """Plain PyTorch and other packages."""

    def plain() -> Call:
        return lambda tensors: plain_logps(F.linear(tensors["hidden"], tensors["weight"]), tensors["labels"])

    def cross_entropy() -> Call:
        return lambda tensors: F.cross_entropy(
            F.linear(tensors["hidden"], tensors["weight"]),
            tensors["labels"],
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )

    def linear_cross_entropy() -> Call:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unsupported(f"PyTorch {torch.__version__} has no F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions()
        inputs = ("hidden", "weight", "labels")
        return lambda tensors: F.linear_cross_entropy(
            *(tensors[name] for name in inputs), reduction="none", ignore_index=IGNORE_INDEX, options=options
        )

    def trl() -> Call:
        from trl.kernels import ChunkedLogProbFunction

        def call(tensors: Tensors) -> Tensor:
            hidden, weight, labels = tensors["hidden"], tensors["weight"], tensors["labels"]
            mask = labels != IGNORE_INDEX
            # As in its trainer: only labelled positions if it has Triton kernels, otherwise all positions.
            if hidden.is_cuda:
                logps = ChunkedLogProbFunction.apply(hidden[mask], weight, None, labels[mask], 1.0, TRL_CHUNK, None, 1.0, ())[0]
                return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
            logps = ChunkedLogProbFunction.apply(hidden, weight, None, labels.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, ())[0]
            return logps.masked_fill(~mask, 0.0)

        return call

    def liger() -> Call:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda tensors: liger_fused_linear_cross_entropy(
            tensors["hidden"], tensors["weight"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none"
        )

    def cut_cross_entropy() -> Call:
        from cut_cross_entropy import linear_cross_entropy

        return lambda tensors: linear_cross_entropy(
            tensors["hidden"], tensors["weight"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none"
        )

    return [
        Implementation("plain", plain),
        Implementation("F.cross_entropy", cross_entropy, negated=True),
        Implementation("F.linear_cross_entropy", linear_cross_entropy, negated=True),
        Implementation("TRL ChunkedLogProbFunction", trl),
        Implementation("Liger", on_gpu(device, liger), negated=True),
        Implementation("Cut Cross-Entropy", on_gpu(device, cut_cross_entropy), negated=True),
    ]
