"""The K-way loss at the size of a training step. It is all overhead, so the cost of launching is included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nca_kernels.loss_table import LOSSES

from .cases import BACKENDS, Call, Implementation, Problem, Tensors, Truth, compiled, grad_error, ours, value_error

BETA, ALPHA = 0.1, 0.5
# loss, prompts, responses
CASES = {device: [(name, 64, 4) for name in ("nca", "info_nca", "dpo")] for device in ("cpu", "cuda")}
TINY = [("nca", 3, 2), ("dpo", 3, 4)]


def nca(logps: Tensor, ref_logps: Tensor, scores: Tensor) -> Tensor:
    r = BETA * (logps - ref_logps)
    w = (scores / ALPHA).softmax(-1)
    return -(w * F.logsigmoid(r) + F.logsigmoid(-r) / r.shape[-1]).sum(-1).mean()


def info_nca(logps: Tensor, ref_logps: Tensor, scores: Tensor) -> Tensor:
    r = BETA * (logps - ref_logps)
    return -((scores / ALPHA).softmax(-1) * r.log_softmax(-1)).sum(-1).mean()


def dpo(logps: Tensor, ref_logps: Tensor, scores: Tensor) -> Tensor:
    """The best response against each of the others; scores are in descending order, so the best is column 0."""
    r = BETA * (logps - ref_logps)
    return -F.logsigmoid(r[:, :1] - r[:, 1:]).mean()


EAGER = {function.__name__: function for function in (nca, info_nca, dpo)}


def problems(device: str, cases: list[tuple]) -> Iterator[tuple[Problem, list[Implementation]]]:
    for name, prompts, responses in cases:
        logps, ref_logps = (-50 + 10 * torch.randn(prompts, responses, device=device) for _ in range(2))
        scores = torch.rand(prompts, responses, device=device).sort(descending=True).values
        tensors = {"logps": logps, "ref_logps": ref_logps, "scores": scores}
        problem = Problem(
            case=f"{name} B={prompts} K={responses}",
            pass_name="fwd+bwd",
            dtype="float32",
            tensors=tensors,
            truth=_truth(name, tensors),
            leaves=("logps",),
            repeats=20,
        )
        yield problem, implementations(name, device)


def _truth(name: str, tensors: Tensors) -> Truth:
    exact = {key: tensor.double() for key, tensor in tensors.items()}
    exact["logps"].requires_grad_()
    loss = EAGER[name](**exact)
    (dlogps,) = torch.autograd.grad(loss, exact["logps"])
    return lambda values, grads: (value_error(values, loss.detach()), grad_error(grads[0], dlogps))


def implementations(name: str, device: str) -> list[Implementation]:
    def on(backend: str) -> Callable[[], Call]:
        def build() -> Call:
            alpha = {"alpha": ALPHA} if "alpha" in LOSSES[name].takes else {}
            group_loss: Any = ours("group_loss", backend, device, torch.float32, name=name, beta=BETA, **alpha)()
            return lambda tensors: group_loss(tensors).loss

        return build

    def plain() -> Call:
        return lambda tensors: EAGER[name](**tensors)

    def torch_compile() -> Call:
        function = compiled(EAGER[name])
        return lambda tensors: function(**tensors)

    return [
        *(Implementation(f"nca_kernels {backend}", on(backend)) for backend in BACKENDS[device]),
        Implementation(f"nca_kernels {BACKENDS[device][0]} again", on(BACKENDS[device][0])),
        Implementation("plain", plain),  # the shortest code, without masks or checks
        Implementation("reference", on("torch")),  # with masks and checks
        Implementation("torch.compile", torch_compile),
    ]
