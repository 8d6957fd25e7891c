"""What a model does to its head's output, found by feeding known values through its own code.

Softcaps and logit scales go by many names (``final_logit_softcapping``, ``logits_scaling`` as a divisor, ``logit_scale``
as a factor, constants in the code), and a table of names says nothing about the next architecture. So the head is made to
return known values, and the ``.logits`` that the model makes of them tell the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import linear_token_logps
from .head_layer import Compute, HeadLayer

_LINEAR = 2.0**-8  # far below any softcap in use
_SATURATED = 2.0**15  # far above any, so that tanh is 1; a float16 output still holds it
_TOKENS = 4  # compared with the model's own logits


class PostHead(NamedTuple):
    """``z = scale * x``, then ``softcap * tanh(z / softcap)`` if there is one: what the kernels can do."""

    scale: float
    softcap: float | None

    def __call__(self, x: Tensor) -> Tensor:
        z = self.scale * x
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@torch.no_grad()
def inspect(head: HeadLayer, call: Callable[[], object], backend: str | None) -> PostHead:
    """The map from the head's output to ``.logits``: two forwards of the model, with a head of no more than a few rows.

    The first fits the map, the second compares a few tokens' log-probs with those of the model's own ``.logits``.
    ValueError where there is no such map, and where the two differ.
    """
    known = None

    def known_rows(linear: nn.Linear, hidden: Tensor) -> Tensor:
        nonlocal known
        known = known_values(linear.weight.shape[0], hidden.device)
        return known.clone()  # the model may scale its logits in place

    logits = _logits(head, known_rows, call)
    post_head = fit_post_head(known, logits)

    fused = labels = eps = None

    def few_rows(linear: nn.Linear, hidden: Tensor) -> Tensor:
        nonlocal fused, labels, eps
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        rows = rows[:, :: max(1, rows.shape[1] // _TOKENS)][:, :_TOKENS]
        # Spread over the vocabulary: the user's labels may all be ignored on this rank, and not on another.
        labels = torch.arange(1, rows.shape[1] + 1, device=rows.device)[None] * linear.out_features // (_TOKENS + 1)
        fused = linear_token_logps(rows, linear.weight, labels, bias=linear.bias, backend=backend, **post_head._asdict())
        plain = nn.Linear.forward(linear, rows)
        eps = torch.finfo(plain.dtype).eps
        return plain

    logits = _logits(head, few_rows, call)
    eps = max(eps, torch.finfo(logits.dtype).eps)
    logits = logits.to(fused.device).double()
    own = torch.log_softmax(logits, dim=-1).gather(-1, labels[..., None])[..., 0]
    if torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, 2.0**-8)
    tol = 4 * eps * (1 + logits.abs().amax(-1))
    off = ~((fused - own).abs() <= tol) & ~(fused.isnan() & own.isnan())
    if off.any():
        i = int(off.flatten().nonzero()[0])
        raise ValueError(
            f"model: {head.kind} fused, gives a token the log-prob {fused.flatten()[i]:.6f}; the model's own .logits give "
            f"{own.flatten()[i]:.6f}. Refused: use token_logps on the logits"
        )
    return post_head


def _logits(head: HeadLayer, compute: Compute, call: Callable[[], object]) -> Tensor:
    head.begin(compute)
    output = call()
    head.end()
    return logits_of(output)


def logits_of(output: object) -> Tensor:
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise ValueError(f"model: its forward returned a {type(output).__name__}, wanted an output with .logits")
    return output.logits


def known_values(vocab: int, device: torch.device) -> Tensor:
    """``[1, 1, V]``: small ones in the first half of the columns show the scale, wide ones in the others the softcap."""
    half = vocab // 2
    known = torch.linspace(-64, 64, vocab, device=device)
    known[:half] = _LINEAR * torch.linspace(-1, 1, half, device=device)
    known[-1] = _SATURATED
    return known.bfloat16().float()[None, None]  # exact on its way through any dtype


def fit_post_head(known: Tensor, logits: Tensor) -> PostHead:
    """The map that takes ``known`` to ``logits``, the same in every column; ValueError if none does."""
    if logits.shape != known.shape:
        raise ValueError(
            f"model: .logits of shape {list(logits.shape)} from a head output of {list(known.shape)}, wanted the same shape. "
            "Use token_logps on the logits"
        )
    x, z = known.double().flatten(), logits.to(known.device).double().flatten()
    half = len(x) // 2
    scale, top = _slope(x[:half], z[:half]), float(z[-1])
    if abs(top - scale * _SATURATED) <= 0.01 * abs(top):
        post_head = PostHead(scale, None)
    else:
        post_head = PostHead(_slope(x[:half], top * torch.atanh(z[:half] / top)), top)
    fitted = post_head(x)
    off = ~((z - fitted).abs() <= 8 * torch.finfo(logits.dtype).eps * fitted.abs())
    if off.any() or not scale > 0:
        i = int(off.int().argmax())
        raise ValueError(
            f"model: .logits are not softcap * tanh(scale * x / softcap) of the head's output x: the closest, {post_head}, "
            f"gives {fitted[i]:.6g} for x = {x[i]:.6g} in column {i}, the model {z[i]:.6g}. Use token_logps on the logits"
        )
    return post_head


def _slope(x: Tensor, y: Tensor) -> float:
    # The median of many: where .logits are bfloat16 one quotient is off by up to 0.4%, and a few columns may be masked.
    return float((y / x)[x != 0].median())
