"""What a model does to its head's output: found by feeding known values through its own code.

Softcaps and logit scales go by many names (`final_logit_softcapping`, `logits_scaling` as a divisor, `logit_scale` as a
factor, a constant in the code). A table of them is wrong for the next architecture and says nothing; so the head is made
to return known values, and the model's `.logits` for them tell the map. It must be z = softcap * tanh(scale * x / softcap)
or z = scale * x, the same in every column: that is what the kernels compute.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LINEAR = 2.0**-8  # tanh(x) = x (1 - x^2 / 3): for any softcap in use the curve cannot be seen below this
SATURATED = 2.0**15  # tanh is 1 here; a float16 output still holds it


class PostHead(NamedTuple):
    scale: float
    softcap: float | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        z = self.scale * x
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def known_values(vocab: int, device: torch.device) -> torch.Tensor:
    """[1, 2, V]: a row that shows the scale, and a row that shows the softcap, over the columns' whole width."""
    ramp = torch.linspace(-1, 1, vocab, device=device)
    known = torch.stack([LINEAR * ramp, 64 * ramp])[None]
    known[0, 1, -1] = SATURATED
    return known


def fit_post_head(known: torch.Tensor, logits: torch.Tensor) -> PostHead:
    """The (scale, softcap) with which the model maps `known` to `logits`; ValueError if there is none."""
    if logits.shape != known.shape:
        raise ValueError(f"its head gives {list(known.shape)}, but its .logits are {list(logits.shape)}")
    eps = torch.finfo(logits.dtype).eps
    x, z = known.double(), logits.double()
    # Least squares, not one quotient: with a bfloat16 output each quotient alone is off by 0.4%.
    scale = float((x[0, 0] * z[0, 0]).sum() / x[0, 0].square().sum())
    top = float(z[0, 1, -1])
    linear = abs(top - scale * SATURATED) <= 0.01 * abs(scale) * SATURATED
    post_head = PostHead(scale, None if linear else top)
    fitted = post_head(x)
    bad = ~((z - fitted).abs() <= 8 * eps * fitted.abs())
    if bad.any():
        i = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"its .logits are no scaled and softcapped head output: for a head output of {x.flatten()[i]:.6g} in column "
            f"{i % x.shape[-1]} they are {z.flatten()[i]:.6g}, where {post_head} gives {fitted.flatten()[i]:.6g}"
        )
    return post_head
