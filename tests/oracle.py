"""The truth of the tests is float64; their yardstick is the error of PyTorch in the same dtype against it."""

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def transformed(logits, scale=1.0, softcap=None):
    z = logits * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_token_logps(logits, labels, *, ignore_index=-100, scale=1.0, softcap=None, compute=None):
    """The usual PyTorch code: ``log_softmax`` and ``gather``, computed in ``compute`` (None: in the logits' own dtype)."""
    z = transformed(logits if compute is None else logits.to(compute), scale, softcap)
    keep = labels != ignore_index
    logps = F.log_softmax(z, dim=-1).gather(-1, labels.masked_fill(~keep, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(keep, logps, 0.0)


def value_and_grad(function, logits, upstream):
    """The function's value at ``logits`` and the gradient of its product with ``upstream``."""
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach(), grad


def assert_no_worse(ours, truth, peer, tol, what=""):
    """``|ours - truth| <= |peer - truth| + tol * (1 + |truth|)``, elementwise; NaN and infinities are where they should be."""
    ours, truth, peer = ours.detach().double().cpu(), truth.detach().double().cpu(), peer.detach().double().cpu()
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape}, wanted {truth.shape}"
    odd = ~torch.isfinite(truth)
    assert torch.equal(torch.nan_to_num(ours[odd], nan=7.0), torch.nan_to_num(truth[odd], nan=7.0)), f"{what}: NaN, inf"
    excess = (ours - truth).abs() - (peer - truth).abs() - tol * (1 + truth.abs())
    excess = excess.masked_fill(odd, -1.0)
    assert not (excess > 0).any() and not torch.isnan(excess).any(), (
        f"{what}: error exceeds the yardstick's by {excess.max().item():.3g} at {excess.argmax().item()}: "
        f"{ours.flatten()[excess.argmax()].item()} against {truth.flatten()[excess.argmax()].item()}"
    )
