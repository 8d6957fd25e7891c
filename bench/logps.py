"""Log-probs from logits: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import math
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
    compiled,
    grad_error,
    on_gpu,
    ours,
    plain_logps,
    random_labels,
    value_error,
)

# rows, vocabulary, dtype, half of the rows ignored. The vocabularies on a GPU are those of Llama 2, a power of two, Llama 3, Gemma.
CASES = {
    "cpu": [(1024, 32000, dtype, ignored) for dtype in ("float32", "bfloat16") for ignored in (False, True)],
    "cuda": [(8192, vocab, "bfloat16", False) for vocab in (32000, 65536, 128256, 262144)]
    + [(8192, 128256, "bfloat16", True), (8192, 128256, "float32", False)],
}
NO_LEAVES: tuple[str, ...] = ()
LEAVES = ("logits",)
TINY = [(16, 1000, dtype, True) for dtype in ("float32", "bfloat16")]


def problems(device: str, cases: list[tuple]) -> Iterator[tuple[Problem, list[Implementation]]]:
    for rows, vocab, dtype, ignored in cases:
        for leaves in NO_LEAVES, LEAVES:
            yield (
                problem(rows, vocab, dtype, ignored, leaves, device),
                implementations(device, DTYPES[dtype], ignored, bool(leaves)),
            )


def problem(rows: int, vocab: int, dtype: str, ignored: bool, leaves: tuple[str, ...], device: str) -> Problem:
    """The problem of one size, with a backward pass if the logits are a leaf."""
    labels = random_labels(rows, vocab, ignored, device)
    logits = (2 * torch.randn(rows, vocab, device=device)).to(DTYPES[dtype])
    # Labels from unlikely to almost certain (a row's log-sum-exp is about log V + 2): near p = 1 a rounded p makes p - 1 wrong.
    boost = (2 * math.log(vocab) * torch.rand(rows, 1, device=device)).to(DTYPES[dtype])
    logits.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), boost)
    upstream = torch.randn(rows, device=device) if leaves else None
    size = logits.nbytes
    labelled = size // 2 if ignored else size
    return Problem(
        case=f"M={rows} V={vocab}" + (", half ignored" if ignored else ""),
        pass_name="fwd+bwd" if leaves else "fwd",
        dtype=dtype,
        tensors={"logits": logits, "labels": labels},
        truth=_truth(logits, labels, upstream),
        leaves=leaves,
        upstream=upstream,
        kind="bytes",
        # Backward reads the labelled rows again and writes all rows: ignored ones get zeros.
        amount=2 * labelled + size if leaves else labelled,
        bound_by="copy" if leaves else "read",
        unit="read",
        ceilings={"read": ceilings.read("logits", logits), "copy": ceilings.copy("logits", logits)},
    )


def _truth(logits: Tensor, labels: Tensor, upstream: Tensor | None) -> Truth:
    truth = LogpTruth(lambda start, stop: logits[start:stop].double(), logits.shape[1], labels, upstream)

    def errors(values: Tensor, grads: list[Tensor]) -> tuple[float, float | None]:
        worst, worst_grad = 0.0, 0.0
        for rows, logps, dlogits in truth.chunks():
            worst = max(worst, value_error(values[rows], logps))
            if dlogits is not None:
                # In units of the largest gradient of these rows, because their upstream gradients are of similar size.
                worst_grad = max(worst_grad, grad_error(grads[0][rows], dlogits))
        return worst, worst_grad if grads else None

    return errors


def implementations(device: str, dtype: torch.dtype, ignored: bool, backward: bool) -> list[Implementation]:
    def token_logps(backend: str, inplace: bool = False) -> Callable[[], Call]:
        return ours("token_logps", backend, device, dtype, inplace_backward=inplace)

    names = BACKENDS[device]
    mine = [Implementation(f"nca_kernels {name}", token_logps(name)) for name in names]
    # The same code is timed twice: the difference is the noise.
    mine.append(Implementation(f"nca_kernels {names[0]} again", token_logps(names[0])))
    if backward:
        mine += [Implementation(f"nca_kernels {name}", token_logps(name, True), inplace=True) for name in names]

    def plain() -> Call:
        return lambda tensors: plain_logps(tensors["logits"], tensors["labels"])

    def cross_entropy() -> Call:
        return lambda tensors: F.cross_entropy(tensors["logits"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none")

    def torch_compile() -> Call:
        function = compiled(plain_logps)
        return lambda tensors: function(**tensors)

    def trl() -> Call:
        from trl.trainer.utils import selective_log_softmax

        def call(tensors: Tensors) -> Tensor:
            # As two sequences: in float32 TRL loops over the first dimension, so single rows would be its worst case.
            logits, labels = (tensor.unflatten(0, (2, -1)) for tensor in tensors.values())
            mask = labels != IGNORE_INDEX if ignored else None
            return selective_log_softmax(logits, labels.clamp(min=0), row_mask=mask).flatten()

        return call

    def liger() -> Call:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return lambda tensors: liger_cross_entropy(
            tensors["logits"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none"
        )

    def quack(inplace: bool = False) -> Call:
        from quack.cross_entropy import cross_entropy

        return lambda tensors: cross_entropy(
            tensors["logits"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none", inplace_backward=inplace
        )

    peers = [
        Implementation("plain", plain),
        Implementation("F.cross_entropy", cross_entropy, negated=True),
        Implementation("torch.compile", torch_compile),
        Implementation("TRL selective_log_softmax", trl),
        # If a gradient is needed, Liger's forward always writes it over the logits.
        Implementation("Liger", on_gpu(device, liger), negated=True, inplace=backward),
        Implementation("quack", on_gpu(device, quack), negated=True),
    ]
    if backward:
        peers.append(Implementation("quack", on_gpu(device, lambda: quack(True)), negated=True, inplace=True))
    return mine + peers
