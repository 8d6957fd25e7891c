"""The row kernels of every backend, called as the operators call them: four rows of statistics, and their gradients.

``stats`` is max z, sum exp(z - max), the label's z and, as a fourth row, ``sum (z - max) exp(z - max)``. The log-sum-exp and
the entropy follow from them. Truth is float64, the yardstick PyTorch's own error in the dtype of the logits.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from conftest import Target, _target
from oracle import DTYPES, assert_no_worse, transformed
from torch import Tensor

from nca_kernels.backends import BACKENDS

TOL = 1e-6
IGNORED = -100


@pytest.fixture(params=["triton"])
def kernels(request) -> Target:
    """The backends that have these statistics so far."""
    return _target(request)


class Upstream(NamedTuple):
    """The gradients that come from above."""

    logps: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None


def _forward(target: Target, logits: Tensor, labels: Tensor, rows: int = 4, start: int = 0, total: int | None = None, **options):
    logits, labels = logits.to(target.device), labels.to(target.device)
    logps = torch.full(labels.shape, 7.0, device=target.device)
    stats = torch.full((rows, *labels.shape), 7.0, device=target.device)
    options = {"scale": 1.0, "softcap": None, **options}
    BACKENDS[target.name].token_logps_fwd(
        logits, labels, logps, stats,
        ignore_index=IGNORED, vocab_start=start, vocab_total=total or logits.shape[-1], **options,
    )  # fmt: skip
    return logps.cpu(), stats.cpu()


def _backward(target: Target, logits, labels, stats, upstream: Upstream, start=0, total=None, **options) -> Tensor:
    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(target.device)

    dlogits = torch.full_like(logits, 7.0, device=target.device)
    options = {"scale": 1.0, "softcap": None, **options}
    BACKENDS[target.name].token_logps_bwd(
        to(upstream.logps), to(logits), to(labels), to(stats), dlogits, dlse=to(upstream.lse), dentropy=to(upstream.entropy),
        ignore_index=IGNORED, vocab_start=start, vocab_total=total or logits.shape[-1], **options,
    )  # fmt: skip
    return dlogits.cpu()


def _lse_and_entropy(stats: Tensor) -> tuple[Tensor, Tensor]:
    top, total, _, moment = stats
    return top + total.log(), total.log() - moment / total


def _plain(logits: Tensor, labels: Tensor, upstream: Upstream, compute: torch.dtype, **options) -> tuple[Tensor, ...]:
    """Log-probs, log-sum-exp, entropy and the gradient of their products with ``upstream``, by PyTorch's functions."""
    leaf = logits.detach().clone().requires_grad_()
    z = transformed(leaf.to(compute), **options)
    kept = labels != IGNORED
    log_p = z.log_softmax(-1)
    logps = log_p.gather(-1, labels.masked_fill(~kept, 0)[..., None])[..., 0]
    lse = z.logsumexp(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    total = sum(
        (value * each.to(value.dtype)).where(kept, 0.0).sum()
        for value, each in zip((logps, lse, entropy), upstream, strict=True)
        if each is not None
    )
    (grad,) = torch.autograd.grad(total, leaf)
    return *(value.detach().where(kept, 0.0) for value in (logps, lse, entropy)), grad


def _check(target: Target, logits: Tensor, labels: Tensor, upstream: Upstream | None = None, **options) -> None:
    upstream = upstream or Upstream(*torch.randn(3, *labels.shape))
    logps, stats = _forward(target, logits, labels, **options)
    dlogits = _backward(target, logits, labels, stats, upstream, **options)
    truth = _plain(logits, labels, upstream, torch.float64, **options)
    peer = _plain(logits, labels, upstream, logits.dtype, **options)
    ours = (logps, *_lse_and_entropy(stats))
    for what, a, b, c in zip(("logps", "lse", "entropy"), ours, truth, peer, strict=False):
        assert_no_worse(a, b, c, TOL, what)
    # Rounded to the dtype of the logits once: half an ulp of it beside the yardstick's own error.
    assert_no_worse(dlogits, truth[-1], peer[-1], max(TOL, torch.finfo(logits.dtype).eps / 2), "dlogits")


@pytest.mark.parametrize("V", [1, 2, 33, 517, 4099, 17001])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_statistics_and_their_gradients(kernels, dtype, V):
    torch.manual_seed(V)
    labels = torch.randint(V, (1, 3))
    labels[0, 1] = IGNORED
    _check(kernels, (3 * torch.randn(1, 3, V)).to(dtype), labels)


@pytest.mark.parametrize("scale, softcap", [(0.5, None), (2.0, 5.0), (1.0, 0.25)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_and_softcap(kernels, dtype, scale, softcap):
    torch.manual_seed(0)
    _check(kernels, (8 * torch.randn(2, 3, 517)).to(dtype), torch.randint(517, (2, 3)), scale=scale, softcap=softcap)


@pytest.mark.parametrize("lse, entropy", [(False, True), (True, False)])
def test_a_gradient_that_is_not_there_counts_as_zero(kernels, lse, entropy):
    torch.manual_seed(1)
    logits, labels = 2 * torch.randn(1, 4, 1001), torch.randint(1001, (1, 4))
    there = torch.randn(3, 1, 4)
    some = Upstream(there[0], there[1] if lse else None, there[2] if entropy else None)
    zeros = Upstream(*(torch.zeros(1, 4) if each is None else each for each in some))
    _check(kernels, logits, labels, some)
    _, stats = _forward(kernels, logits, labels)
    assert torch.equal(_backward(kernels, logits, labels, stats, some), _backward(kernels, logits, labels, stats, zeros))
    if lse:  # needs no fourth row
        assert torch.equal(_backward(kernels, logits, labels, stats[:3], some), _backward(kernels, logits, labels, stats, some))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_three_rows_are_the_same_numbers(kernels, dtype):
    torch.manual_seed(2)
    logits, labels, dlogps = torch.randn(2, 3, 1027).to(dtype), torch.randint(1027, (2, 3)), torch.randn(2, 3)
    labels[1, 1] = IGNORED
    (logps, stats), (few_logps, few) = _forward(kernels, logits, labels), _forward(kernels, logits, labels, rows=3)
    assert torch.equal(logps, few_logps) and torch.equal(stats[:3], few)
    dlogits = [_backward(kernels, logits, labels, each, Upstream(dlogps)) for each in (stats, few)]
    assert torch.equal(*dlogits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_minus_infinity_adds_nothing(kernels, dtype):
    """Among others, over whole blocks, at the label, and everywhere but at the label."""
    torch.manual_seed(3)
    logits = torch.randn(1, 5, 9000).to(dtype)
    logits[0, 0, ::3] = -math.inf
    logits[0, 1, :8990] = -math.inf
    logits[0, 2, 40:] = -math.inf
    logits[0, 3] = -math.inf
    logits[0, 3, 4500] = 2.0
    logits[0, 4, 7] = -math.inf
    labels = torch.tensor([[1, 8995, 3, 4500, 7]])
    upstream = Upstream(torch.tensor([[1.0, -0.5, 2.0, 0.3, 0.0]]), *torch.randn(2, 1, 5))
    _check(kernels, logits, labels, upstream)
    _, stats = _forward(kernels, logits, labels)
    dlogits = _backward(kernels, logits, labels, stats, upstream)
    assert torch.isfinite(stats[[0, 1, 3]]).all() and (dlogits[logits == -math.inf] == 0).all()
    assert _lse_and_entropy(stats)[1][0, 3] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("column", [0, 4098])
def test_nan_and_infinity_stay_in_their_row(kernels, bad, column):
    torch.manual_seed(4)
    logits, labels = torch.randn(1, 4, 4099), torch.randint(1, 4098, (1, 4))
    upstream = Upstream(*torch.randn(3, 1, 4))
    clean_stats = _forward(kernels, logits, labels)[1]
    clean = _backward(kernels, logits, labels, clean_stats, upstream)
    logits[0, 1, column] = bad
    logits[0, 2] = -math.inf  # no distribution at all
    _, stats = _forward(kernels, logits, labels)
    dlogits = _backward(kernels, logits, labels, stats, upstream)
    odd = torch.tensor([False, True, True, False])
    assert torch.equal(torch.isnan(_lse_and_entropy(stats)[1][0]), odd)
    assert torch.isnan(dlogits[0, odd]).all()
    assert torch.equal(dlogits[0, ~odd], clean[0, ~odd]) and torch.equal(stats[:, 0, ~odd], clean_stats[:, 0, ~odd])


def test_ignored_rows_are_zeros_whatever_comes_from_above(kernels):
    logits = torch.full((1, 3, 300), math.nan)
    logits[0, 1] = torch.randn(300)
    labels = torch.tensor([[IGNORED, 5, IGNORED]])
    upstream = Upstream(*(torch.tensor([[bad, 1.0, math.inf]]) for bad in (math.nan, math.inf, math.nan)))
    logps, stats = _forward(kernels, logits, labels)
    dlogits = _backward(kernels, logits, labels, stats, upstream)
    assert (stats[:, 0, ::2] == torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]).all() and (logps[0, ::2] == 0).all()
    assert (dlogits[0, ::2] == 0).all() and torch.isfinite(dlogits).all()


def test_a_one_hot_row(kernels):
    """Where one probability rounds to 1, entropy and gradients are those of what is left."""
    logits = torch.zeros(1, 3, 64)
    logits[0, :, 9] = torch.tensor([20.0, 60.0, 1e4])
    upstream = Upstream(*torch.randn(3, 1, 3))
    _, stats = _forward(kernels, logits, torch.tensor([[9, 9, 9]]))
    entropies = [63 * math.exp(-20.0) * 21, 63 * math.exp(-60.0) * 61, 0.0]
    assert _lse_and_entropy(stats)[1][0].tolist() == pytest.approx(entropies, rel=1e-6, abs=2**-24)  # an ulp of the sum, near 1
    _check(kernels, logits, torch.tensor([[9, 9, 9]]), upstream)
    _check(kernels, logits, torch.tensor([[3, 3, 3]]), upstream)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_slices_of_the_vocabulary_merge(kernels, dtype):
    """Slices of odd lengths, one of them -inf throughout for one row."""
    torch.manual_seed(5)
    bounds = [0, 1, 334, 2049, 3001]
    logits, labels = (4 * torch.randn(1, 5, bounds[-1])).to(dtype), torch.tensor([[0, 333, 334, 3000, IGNORED]])
    logits[0, 1, 334:2049] = -math.inf
    upstream = Upstream(*torch.randn(3, 1, 5))
    slices = list(itertools.pairwise(bounds))
    apart = torch.stack([_forward(kernels, logits[..., a:b], labels, start=a, total=bounds[-1])[1] for a, b in slices], 1)
    tops, totals, targets, moments = apart
    top = tops.amax(0)
    shares = torch.where(totals == 0, 0.0, (tops - top).exp())
    moment = (shares * moments + torch.where(totals == 0, 0.0, shares * (tops - top) * totals)).sum(0)
    merged = torch.stack([top, (shares * totals).sum(0), targets.sum(0), moment])
    merged[:, 0, 4] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    truth, peer = (_plain(logits, labels, upstream, compute) for compute in (torch.float64, dtype))
    for what, *values in zip(("lse", "entropy"), _lse_and_entropy(merged), truth[1:], peer[1:], strict=False):
        assert_no_worse(*values, TOL, what)
    dlogits = torch.cat(
        [_backward(kernels, logits[..., a:b], labels, merged, upstream, start=a, total=bounds[-1]) for a, b in slices], -1
    )
    assert_no_worse(dlogits, truth[-1], peer[-1], max(TOL, torch.finfo(dtype).eps / 2), "dlogits")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_in_place_and_at_any_alignment(kernels, dtype):
    torch.manual_seed(6)
    store = torch.randn(2, 4, 703).to(dtype)
    labels, upstream = torch.randint(700, (2, 3)), Upstream(*torch.randn(3, 2, 3))
    for view in (store[:, :-1, 1:701], store[:, 1:, :700], store[..., 3:][:, ::2][:, :2]):
        view = view[:, : labels.shape[1]]
        here, above = labels[:, : view.shape[1]].contiguous(), Upstream(*(x[:, : view.shape[1]].contiguous() for x in upstream))
        _, stats = _forward(kernels, view, here)
        _, wanted = _forward(kernels, view.contiguous(), here)
        torch.testing.assert_close(stats, wanted, rtol=1e-6, atol=1e-6)
        fresh = _backward(kernels, view, here, stats, above)
        written = store.clone().to(kernels.device)
        inside = written.as_strided(view.shape, view.stride(), view.storage_offset())
        BACKENDS[kernels.name].token_logps_bwd(
            *(x.to(kernels.device) for x in (above.logps, inside, here, stats)), inside,
            dlse=above.lse.to(kernels.device), dentropy=above.entropy.to(kernels.device),
            ignore_index=IGNORED, scale=1.0, softcap=None, vocab_start=0, vocab_total=700,
        )  # fmt: skip
        assert torch.equal(inside.cpu(), fresh)
        inside.copy_(view)
        assert torch.equal(written.cpu(), store), "written beside the rows"
