"""float16 with loss scaling: a frozen head is as exact as a trained one and as plain PyTorch."""

import pytest
import torch

import nca_kernels

V, D, M = 2000, 256, 192
G = 65536 / 32  # the loss scale of a gradient scaler over a mean of 32


def _problem(dtype, remainder):
    """Inputs in which each row's label has the probability ``1 - remainder``."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(V, D)).to(dtype)
    labels = torch.randint(V, (M,))
    hidden = 0.3 * torch.randn(M, D)
    at_label = torch.linalg.vecdot(hidden, weight[labels].float())
    rest = (hidden @ weight.float().t()).scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    wanted = rest - torch.log(torch.tensor(remainder))
    direction = weight[labels].float()
    hidden += direction * ((wanted - at_label) / direction.square().sum(1))[:, None]
    return hidden.to(dtype), weight, labels


def _exact(hidden, weight, labels):
    """dlogp/dhidden in float64, from logits in their own dtype, which all implementations share."""
    logits = (hidden @ weight.t()).double()
    # The label's 1 - p as the sum of the others: 1 - p itself would cancel.
    odds = (logits - logits.gather(1, labels[:, None])).exp().scatter(1, labels[:, None], 0.0)
    p = odds / (1 + odds.sum(1, keepdim=True))
    q = (-p).scatter(1, labels[:, None], p.sum(1, keepdim=True))
    return q @ weight.double()


def _dhidden(problem, backend, trained=False, scale=1.0):
    hidden, weight, labels = problem
    leaf = hidden.clone().requires_grad_()
    logps = nca_kernels.linear_token_logps(leaf, weight.clone().requires_grad_(trained), labels, backend=backend, scale=scale)
    return torch.autograd.grad(logps, leaf, torch.full((M,), G))[0].double() / G


def _error(ours, exact):
    """The median over rows of the relative error."""
    return ((ours - exact).norm(dim=1) / exact.norm(dim=1)).median().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("tile_bytes", [10**7, 100_000], ids=["whole", "slices"])
@pytest.mark.parametrize("remainder", [1e-1, 1e-3, 1e-4, 1e-5, 1e-6])
def test_a_frozen_head_is_as_right_as_a_trained_one(monkeypatch, remainder, tile_bytes, dtype):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    problem = _problem(dtype, remainder)
    exact = _exact(*problem)
    frozen, trained, plain = (_error(_dhidden(problem, *case), exact) for case in (("cpu", False), ("cpu", True), ("torch", False)))
    # A tenth and a spacing of the dtype: the float32 sum of a row, 1 + remainder, is rounded in each of them by itself.
    assert frozen <= 1.1 * max(trained, plain) + torch.finfo(dtype).eps / 8, (frozen, trained, plain)


@pytest.mark.parametrize("size", [1 / 64, 32.0])
def test_the_size_of_the_weights_does_not_matter(size):
    """``u`` grows with the weights; before it is multiplied by ``g`` it must neither underflow nor overflow."""
    hidden, weight, labels = _problem(torch.float16, 1e-3)
    problem = (hidden / size if size > 1 else hidden, weight * size, labels)
    scale = 1.0 if size > 1 else 1 / size
    ours = _dhidden(problem, "cpu", scale=scale)
    assert _error(ours, _exact(hidden, weight, labels) * size * scale) <= 2e-3


def test_the_backward_of_an_ignored_row_is_zero():
    hidden, weight, labels = _problem(torch.float16, 1e-3)
    labels[::3] = -100
    dhidden = _dhidden((hidden, weight, labels), "cpu")
    assert (dhidden[::3] == 0).all() and dhidden.isfinite().all() and (dhidden[1] != 0).any()
