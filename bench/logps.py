"""Log-probs from logits: one read of the logits forward, one read and one write backward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ceilings
from .cases import (
    BACKENDS,
    DTYPES,
    IGNORE_INDEX,
    Implementation,
    LogpTruth,
    Problem,
    compiled,
    grad_error,
    on_gpu,
    ours,
    plain_logps,
    random_labels,
    value_error,
)  # fmt: skip

# rows, vocabulary, dtype, half of the rows ignored. The vocabularies on a GPU: Llama 2's, a round one, Llama 3's, Gemma's.
CASES = {
    "cpu": [(1024, 32000, dtype, ignored) for dtype in ("float32", "bfloat16") for ignored in (False, True)],
    "cuda": [(8192, vocab, "bfloat16", False) for vocab in (32000, 65536, 128256, 262144)]
    + [(8192, 128256, "bfloat16", True), (8192, 128256, "float32", False)],
}
TINY = [(16, 1000, dtype, True) for dtype in ("float32", "bfloat16")]


def problems(device: str, cases: list[tuple]) -> Iterator[tuple[Problem, list[Implementation]]]:
    for rows, vocab, dtype, ignored in cases:
        for leaves in ((), ("logits",)):
            problem = _problem(rows, vocab, dtype, ignored, leaves, device)
            yield problem, implementations(device, DTYPES[dtype], ignored, bool(leaves))


def _problem(rows, vocab, dtype, ignored, leaves, device) -> Problem:
    labels = random_labels(rows, vocab, ignored, device)
    logits = (2 * torch.randn(rows, vocab, device=device)).to(DTYPES[dtype])
    # From unlikely labels to almost certain ones (a row's lse is about log V + 2): a rounded p - 1 goes wrong near p = 1.
    boost = (2 * math.log(vocab) * torch.rand(rows, 1, device=device)).to(DTYPES[dtype])
    logits.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), boost)
    upstream = torch.randn(rows, device=device) if leaves else None
    size = logits.nbytes
    scored = size // 2 if ignored else size
    return Problem(
        case=f"M={rows} V={vocab}" + (", half ignored" if ignored else ""),
        pass_name="fwd+bwd" if leaves else "fwd",
        dtype=dtype,
        tensors={"logits": logits, "labels": labels},
        truth=_truth(logits, labels, upstream),
        leaves=leaves,
        upstream=upstream,
        kind="bytes",
        # Backward reads the scored rows once more and writes all: ignored ones get zeros.
        amount=2 * scored + size if leaves else scored,
        bound_by="copy" if leaves else "read",
        unit="read",
        ceilings={"read": ceilings.read("logits", logits), "copy": ceilings.copy("logits", logits)},
    )


def _truth(logits, labels, upstream):
    truth = LogpTruth(lambda start, stop: logits[start:stop].double(), logits.shape[1], labels, upstream)

    def errors(values: Tensor, grads: list[Tensor]) -> tuple[float, float | None]:
        worst, worst_grad = 0.0, None if upstream is None else 0.0
        for rows, logps, dlogits in truth.chunks():
            worst = max(worst, value_error(values[rows], logps))
            if grads:
                # Against the largest gradient of these rows: their upstream gradients are of one size.
                worst_grad = max(worst_grad, grad_error(grads[0][rows], dlogits))
        return worst, worst_grad

    return errors


def implementations(device: str, dtype: torch.dtype, ignored: bool, backward: bool) -> list[Implementation]:
    def token_logps(backend, inplace=False):
        return ours("token_logps", backend, device, dtype, inplace_backward=inplace)

    names = BACKENDS[device]
    mine = [Implementation(f"nca_kernels {name}", token_logps(name)) for name in names]
    # The same once more: the difference is the noise.
    mine.append(Implementation(f"nca_kernels {names[0]} again", token_logps(names[0])))
    if backward:
        mine += [Implementation(f"nca_kernels {name}", token_logps(name, True), inplace=True) for name in names]

    def plain():
        return lambda tensors: plain_logps(**tensors)

    def cross_entropy():
        return lambda tensors: F.cross_entropy(tensors["logits"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none")

    def torch_compile():
        function = compiled(plain_logps)
        return lambda tensors: function(**tensors)

    def trl():
        from trl.trainer.utils import selective_log_softmax

        def call(tensors):
            # Two sequences: in float32 it loops over the first dimension, so rows alone would be its worst case.
            logits, labels = (tensor.unflatten(0, (2, -1)) for tensor in tensors.values())
            mask = labels != IGNORE_INDEX if ignored else None
            return selective_log_softmax(logits, labels.clamp(min=0), row_mask=mask).flatten()

        return call

    def liger():
        from liger_kernel.transformers.functional import liger_cross_entropy

        return lambda tensors: liger_cross_entropy(
            tensors["logits"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none"
        )

    def quack(inplace=False):
        from quack.cross_entropy import cross_entropy

        return lambda tensors: cross_entropy(
            tensors["logits"], tensors["labels"], ignore_index=IGNORE_INDEX, reduction="none", inplace_backward=inplace
        )

    peers = [
        Implementation("plain", plain),
        Implementation("F.cross_entropy", cross_entropy, negated=True),
        Implementation("torch.compile", torch_compile),
        Implementation("TRL selective_log_softmax", trl),
        # With a gradient to come, Liger's forward writes it over the logits, always.
        Implementation("Liger", on_gpu(device, liger), negated=True, inplace=backward),
        Implementation("quack", on_gpu(device, quack), negated=True),
    ]
    if backward:
        peers.append(Implementation("quack", on_gpu(device, lambda: quack(True)), negated=True, inplace=True))
    return mine + peers
