"""Finds the map that a model applies to the output of its head, by passing known values through the model's own code.

Softcaps and logit scales have many names (``final_logit_softcapping``, ``logits_scaling`` as a divisor, ``logit_scale`` as a
factor, constants in the code), and a table of names does not cover the next architecture. So the head returns known values, and the
map is fitted to the ``.logits`` that the model makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import linear_token_logps
from .head_layer import Compute, HeadLayer

_LINEAR = 2.0**-8  # far below any softcap in use
_SATURATED = 2.0**15  # far above any, so that tanh is 1; a float16 output still holds it
_TOKENS = 4  # compared with the model's own logits
_TOLERANCE = 8  # spacings of the dtype of .logits, relative


class PostHead(NamedTuple):
    """``z = scale * x``, then ``softcap * tanh(z / softcap)`` if there is one: the maps that the kernels support."""

    scale: float
    softcap: float | None

    def __call__(self, x: Tensor) -> Tensor:
        z = self.scale * x
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def differs(self, x: Tensor, logits: Tensor) -> Tensor:
        """Where ``logits`` differ from this map of ``x`` by more than rounding."""
        fitted = self(x.double())
        return ~((logits.double() - fitted).abs() <= _TOLERANCE * torch.finfo(logits.dtype).eps * fitted.abs())


def find_post_head(head: HeadLayer, call: Callable[[], object], backend: str | None, with_gradients: bool) -> PostHead:
    """The map from the head's output to ``.logits``: two forwards of the model, with a few rows of logits at most.

    The first forward fits the map. The second compares the log-probs of a few tokens with those of the model's own ``.logits``.
    ``ValueError`` if there is no such map, if the two differ and, ``with_gradients``, if the map has trained parameters.
    """
    known = _KnownHead(with_gradients)
    logits = _logits(head, known, call)
    if logits.requires_grad:
        raise learned_map(head, _names_of_influences(head, logits))
    post_head = fit_post_head(known.values, logits)
    few = _FewRows(post_head, backend)
    logits = _logits(head, few, call)
    eps = max(few.eps, torch.finfo(logits.dtype).eps)
    logits = logits.to(few.fused.device).double()
    own = torch.log_softmax(logits, dim=-1).gather(-1, few.labels[..., None])[..., 0]
    if torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, 2.0**-8)
    tol = 4 * eps * (1 + logits.abs().amax(-1))
    off = ~((few.fused - own).abs() <= tol) & ~(few.fused.isnan() & own.isnan())
    if off.any():
        i = int(off.flatten().nonzero()[0])
        raise ValueError(
            f"model: {head.kind} fused, gives a token the log-prob {few.fused.flatten()[i]:.6f}; the model's own .logits give "
            f"{own.flatten()[i]:.6f}. Refused: use token_logps on the logits"
        )
    return post_head


class _KnownHead:
    """Returns known values in place of the head's output; ``with_gradients``, autograd records what the model does to them."""

    def __init__(self, with_gradients: bool) -> None:
        self.with_gradients = with_gradients

    def __call__(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        self.values = known_values(linear.weight.shape[0], hidden.device)
        if self.with_gradients:
            torch.set_grad_enabled(True)  # until the model's forward ends
        return self.values.clone()  # the model may scale its logits in place


class _FewRows:
    """Returns the logits of a few tokens in place of the head's output, and keeps their log-probs (:func:`linear_token_logps`)."""

    def __init__(self, post_head: PostHead, backend: str | None) -> None:
        self.post_head, self.backend = post_head, backend

    def __call__(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        rows = rows[:, :: max(1, rows.shape[1] // _TOKENS)][:, :_TOKENS]
        # Labels spread over the vocabulary. The user's may all be ignored on this rank and not on another.
        self.labels = torch.arange(1, rows.shape[1] + 1, device=rows.device)[None] * linear.out_features // (_TOKENS + 1)
        self.fused = linear_token_logps(
            rows, linear.weight, self.labels, bias=linear.bias, backend=self.backend, **self.post_head._asdict()
        )
        plain = nn.Linear.forward(linear, rows)
        self.eps = torch.finfo(plain.dtype).eps
        return plain


def _logits(head: HeadLayer, compute: Compute, call: Callable[[], object]) -> Tensor:
    head.begin(compute)
    with torch.no_grad():
        output = call()
    head.end()
    return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """The ``.logits`` of a model's output."""
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise ValueError(f"model: its forward returned a {type(output).__name__}, wanted an output with .logits")
    return output.logits


def known_values(vocab: int, device: torch.device) -> Tensor:
    """``[1, 1, V]``: small values in the first half of the columns show the scale, large ones in the other half the softcap."""
    half = vocab // 2
    known = torch.linspace(-64, 64, vocab, device=device)
    known[:half] = _LINEAR * torch.linspace(-1, 1, half, device=device)
    known[-1] = _SATURATED
    return known.bfloat16().float()[None, None]  # exact in every dtype


def fit_post_head(known: Tensor, logits: Tensor) -> PostHead:
    """The map that takes ``known`` to ``logits``, the same in every column; ValueError if none does."""
    if logits.shape != known.shape:
        raise ValueError(
            f"model: .logits of shape {list(logits.shape)} from a head output of {list(known.shape)}, wanted the same shape. "
            "Use token_logps on the logits"
        )
    logits = logits.detach().to(known.device).flatten()
    x, z = known.double().flatten(), logits.double()
    half = len(x) // 2
    scale, top = _slope(x[:half], z[:half]), float(z[-1])
    if abs(top - scale * _SATURATED) <= 0.01 * abs(top):
        post_head = PostHead(scale, None)
    else:
        post_head = PostHead(_slope(x[:half], top * torch.atanh(z[:half] / top)), top)
    off = post_head.differs(x, logits)
    if off.any() or not scale > 0:
        i = int(off.int().argmax())
        raise ValueError(
            f"model: .logits are not softcap * tanh(scale * x / softcap) of the head's output x: the closest, {post_head}, "
            f"gives {post_head(x)[i]:.6g} for x = {x[i]:.6g} in column {i}, the model {z[i]:.6g}. Use token_logps on the logits"
        )
    return post_head


def _slope(x: Tensor, y: Tensor) -> float:
    # A median: with bfloat16 .logits a single quotient is off by up to 0.4%, and a few columns may be masked.
    return float((y / x)[x != 0].median())


# --- at every call ---------------------------------------------------------------------------------------------------


class Probe(torch.autograd.Function):
    """Returns known values ``[N, T, 1]`` in place of the head's output. They are in the graph of the log-probs and give them zeros.

    The model maps them like logits, so its output shows whether the map is still the same. FSDP and ZeRO-3 gather weights when a
    gradient reaches a module's output; for that the output must be in the graph.
    """

    @staticmethod
    def forward(ctx: Any, logps: Tensor) -> Tensor:
        ctx.shape = logps.shape
        return probe_values(logps)

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> Tensor:
        return doutput.new_zeros(()).expand(ctx.shape)


def probe_values(like: Tensor) -> Tensor:
    """Powers of two from 2^-6 to 2^15 in float32, of both signs, in mixed order: the first is 8, the fifth 2^15."""
    i = torch.arange(like.numel(), device=like.device)
    values = torch.exp2(15.0 - 3 * ((5 * i + 4) % 8)) * (1 - 2 * (i % 2))
    return values.view(*like.shape, 1).clone()  # not a view: the model may scale its logits in place


def parameters_after_head(logps: Tensor, logits: Tensor) -> list[Tensor]:
    """The trained parameters between the probe of ``logps`` and ``logits``; none if a compiled graph hides the probe."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    nodes = [logits.grad_fn]
    probe_seen = not logps.requires_grad
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "ProbeBackward":
            probe_seen = True
            continue
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found if probe_seen else []


def learned_map(head: HeadLayer, names: list[str]) -> ValueError:
    """The error for a map with trained parameters: the kernels take numbers."""
    named = ", ".join(names[:3]) or "a trained parameter"
    return ValueError(
        f"model: after {head.kind} its logits depend on {named}, which would get no gradient. "
        "Use token_logps on the logits, or set requires_grad=False"
    )


def names_of(core: nn.Module, parameters: list[Tensor]) -> list[str]:
    """The names of the parameters in ``core``."""
    return [name for name, own in core.named_parameters() if any(own is parameter for parameter in parameters)]


def _names_of_influences(head: HeadLayer, logits: Tensor) -> list[str]:
    named = [(name, p) for name, p in head.core.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None]
