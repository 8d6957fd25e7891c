"""The kernels' output for token statistics against float64: the fourth row of ``stats``, and gradients of lse and entropy."""

import math
from types import SimpleNamespace

import pytest
import torch
from oracle import DTYPES, assert_no_worse, transformed

from nca_kernels.backends import BACKENDS

TOL = 1e-6  # beside the yardstick, as in test_token_logps


def _statistics(logits, labels, compute, scale, softcap):
    """Log-prob, lse and entropy of every row, and the entropy's ``sum (z - max) exp(z - max)``."""
    z = transformed(logits.to(compute), scale, softcap)
    logps = z.log_softmax(-1)
    gaps = (z - z.amax(-1, keepdim=True)).masked_fill(z == -math.inf, 0.0)
    weighted = (gaps * (z - z.amax(-1, keepdim=True)).exp()).sum(-1)
    entropy = -(logps.exp() * logps.masked_fill(z == -math.inf, 0.0)).sum(-1)
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1), z.logsumexp(-1), entropy, weighted


def _expected(logits, labels, upstream, compute, scale=1.0, softcap=None):
    """The fourth row and the gradient, computed in ``compute``."""
    leaf = logits.detach().clone().requires_grad_()
    *outputs, weighted = _statistics(leaf, labels.clamp(min=0), compute, scale, softcap)
    total = sum(
        (value * grad.to(value.dtype)).masked_fill(labels < 0, 0.0).sum() for value, grad in zip(outputs, upstream, strict=True)
    )
    (grad,) = torch.autograd.grad(total, leaf)
    return SimpleNamespace(
        weighted=weighted.detach().masked_fill(labels < 0, 0.0), grad=grad.masked_fill((labels < 0).unsqueeze(-1), 0.0)
    )


def _ours(kernels, logits, labels, upstream, *, slices=1, inplace=False, scale=1.0, softcap=None):
    backend, device = BACKENDS[kernels.name], kernels.device
    logits, labels = logits.to(device), labels.to(device)
    dlogps, dlse, dentropy = (None if grad is None else grad.to(device).contiguous() for grad in upstream)
    options = {"ignore_index": -100, "scale": scale, "softcap": softcap, "vocab_total": logits.shape[-1]}
    bounds = torch.linspace(0, logits.shape[-1], slices + 1).long().tolist()
    parts, grads = [], []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        stats = torch.full((4, *labels.shape), math.nan, device=device)
        logps = torch.empty(labels.shape, device=device)
        backend.token_logps_fwd(logits[..., first:end], labels, logps, stats, vocab_start=first, **options)
        parts.append(stats)
    whole = _merged(torch.stack(parts)) if slices > 1 else parts[0]
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = logits[..., first:end].clone() if inplace else logits[..., first:end]
        grad = part if inplace else torch.empty_like(part)
        backend.token_logps_bwd(dlogps, part, labels, whole, grad, dlse=dlse, dentropy=dentropy, vocab_start=first, **options)
        grads.append(grad)
    return SimpleNamespace(weighted=whole[3], grad=torch.cat(grads, -1), stats=whole)


def _merged(parts):
    """The statistics of the whole vocabulary from those of its slices, ``[slices, 4, N, T]``."""
    top, total, target, weighted = parts.double().unbind(1)
    gaps = (top - top.amax(0)).masked_fill(total == 0, 0.0)
    factors = torch.where(total == 0, 0.0, gaps.exp())
    sums = (factors * total).sum(0), target.sum(0), (factors * (weighted + gaps * total)).sum(0)
    return torch.stack([top.amax(0), *sums]).float()


def _check(kernels, logits, labels, *, slices=1, inplace=False, **options):
    upstream = torch.randn(3, *labels.shape)
    truth = _expected(logits, labels, upstream, torch.float64, **options)
    peer = _expected(logits, labels, upstream, logits.dtype, **options)
    ours = _ours(kernels, logits, labels, upstream, slices=slices, inplace=inplace, **options)
    assert_no_worse(ours.weighted, truth.weighted, peer.weighted, TOL, "weighted sum")
    assert_no_worse(ours.grad, truth.grad, peer.grad, max(TOL, torch.finfo(logits.dtype).eps / 2), "dlogits")


def _case(V, dtype, spread=3.0):
    torch.manual_seed(V)
    logits = (spread * torch.randn(2, 4, V)).to(dtype)
    labels = torch.randint(V, (2, 4))
    labels[0, 0], labels[0, 1], labels[1, 0] = 0, V - 1, -100
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 31, 33, 63, 65, 1000, 4097, 8209])
def test_values_and_gradients(kernels, V, dtype):
    _check(kernels, *_case(V, dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_and_softcap(kernels, dtype):
    for scale, softcap in ((0.5, None), (2.0, 5.0), (1.0, 0.25)):
        _check(kernels, *_case(517, dtype, 8.0), scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_slices_and_in_place(kernels, dtype):
    _check(kernels, *_case(517, dtype), slices=3)
    _check(kernels, *_case(517, dtype), inplace=True)


def test_large_and_rising_logits(kernels):
    """Every block has a larger maximum than the one before, up to 1e4."""
    logits = torch.linspace(-1e4, 1e4, 9001).expand(1, 2, -1).contiguous()
    _check(kernels, logits, torch.tensor([[9000, 8990]]))
    _check(kernels, logits.flip(-1), torch.tensor([[0, 10]]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_minus_infinity_adds_nothing(kernels, dtype):
    logits, labels = _case(9000, dtype)
    logits[0, :, :8500] = -math.inf
    logits[1, :, 100:] = -math.inf
    labels[0, 1:] = torch.tensor([8500, 8999, 8600])
    labels[1, 1:] = torch.tensor([0, 99, 50])
    labels[0, 0] = 8501
    _check(kernels, logits, labels)
    ours = _ours(kernels, logits, labels, torch.ones(3, 2, 4))
    assert (ours.grad[1, :, 100:] == 0).all() and (ours.grad[0, :, :8500] == 0).all()


def test_one_certain_column(kernels):
    """One finite column: entropy 0, lse that column, and no gradient but lse's."""
    logits = torch.full((1, 1, 40), -math.inf)
    logits[..., 7] = 3.0
    ours = _ours(kernels, logits, torch.tensor([[7]]), torch.tensor([2.0, 5.0, 3.0]).view(3, 1, 1))
    assert ours.stats.flatten().tolist() == [3.0, 1.0, 3.0, 0.0]
    wanted = torch.zeros(40)
    wanted[7] = 5.0
    assert torch.equal(ours.grad.flatten().cpu(), wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_and_infinity_stay_in_their_row(kernels, value):
    logits, labels = _case(4099, torch.float32)
    clean = _ours(kernels, logits, labels, torch.ones(3, 2, 4))
    logits[0, 1, 4098] = logits[0, 2, 0] = logits[1, 1, 2000] = value
    bad = ~torch.isfinite(logits).all(-1)
    ours = _ours(kernels, logits, labels, torch.ones(3, 2, 4))
    assert torch.isnan(ours.grad.cpu()[bad]).all() and torch.isnan(ours.weighted.cpu()[bad]).all()
    assert torch.equal(ours.grad.cpu()[~bad], clean.grad.cpu()[~bad])
    assert torch.equal(ours.stats.cpu()[:, ~bad], clean.stats.cpu()[:, ~bad])


def test_ignored_rows(kernels):
    """Ignored rows have the statistics (0, 1, 0, 0) and zero gradients, whatever the logits and upstream gradients are."""
    logits = torch.full((1, 2, 33), math.nan)
    ours = _ours(kernels, logits, torch.full((1, 2), -100), torch.full((3, 1, 2), math.inf))
    assert ours.stats[:, 0, 0].tolist() == ours.stats[:, 0, 1].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert (ours.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_that_are_not_given_count_as_zero(kernels, dtype):
    logits, labels = _case(300, dtype)
    upstream, zero = torch.randn(3, 2, 4), torch.zeros(2, 4)
    for absent in ({1}, {2}, {1, 2}):
        given = _ours(kernels, logits, labels, [None if i in absent else grad for i, grad in enumerate(upstream)])
        zeros = _ours(kernels, logits, labels, [zero if i in absent else grad for i, grad in enumerate(upstream)])
        torch.testing.assert_close(given.grad, zeros.grad, rtol=0, atol=0 if len(absent) == 1 else torch.finfo(dtype).eps)


def test_three_rows_are_the_first_three_of_four(kernels):
    logits, labels = _case(5000, torch.float32)
    backend, device = BACKENDS[kernels.name], kernels.device
    options = {"ignore_index": -100, "scale": 1.0, "softcap": None, "vocab_start": 0, "vocab_total": 5000}
    results = {}
    for rows in (3, 4):
        stats, logps = torch.empty(rows, 2, 4, device=device), torch.empty(2, 4, device=device)
        backend.token_logps_fwd(logits.to(device), labels.to(device), logps, stats, **options)
        results[rows] = logps, stats[:3]
    for three, four in zip(results[3], results[4], strict=True):
        torch.testing.assert_close(three, four, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_alignment(kernels, dtype):
    """Rows may start anywhere in a 16-byte word; they are read without a copy and overwritten in place."""
    store = _case(703, dtype)[0].to(kernels.device)
    labels = torch.randint(700, (2, 3))
    upstream = torch.randn(3, 2, 3)
    for view in (store[:, :-1, 1:701], store[:, 1:, :700], store[:, :3, 3:]):
        aligned = _ours(kernels, view.contiguous(), labels, upstream)
        ours = _ours(kernels, view, labels, upstream)
        torch.testing.assert_close(ours.stats, aligned.stats, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.grad, aligned.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
        written = store.clone()
        rows = written.as_strided(view.shape, view.stride(), view.storage_offset())
        options = {"ignore_index": -100, "scale": 1.0, "softcap": None, "vocab_start": 0, "vocab_total": 700}
        dlogps, dlse, dentropy = upstream.to(kernels.device)
        stats, labels_there = ours.stats, labels.to(kernels.device)
        BACKENDS[kernels.name].token_logps_bwd(dlogps, rows, labels_there, stats, rows, dlse=dlse, dentropy=dentropy, **options)
        assert torch.equal(rows, ours.grad)
        rows.copy_(view)
        assert torch.equal(written, store), "written beside the rows"


def test_a_gradient_of_the_lse_needs_no_fourth_row(kernels):
    logits, labels = _case(300, torch.float32)
    dlogps, dlse = torch.randn(2, 2, 4)
    stats = _ours(kernels, logits, labels, (dlogps, dlse, None)).stats
    logits, labels, dlogps, dlse = (x.to(kernels.device) for x in (logits, labels, dlogps, dlse))
    options = {"ignore_index": -100, "scale": 1.0, "softcap": None, "vocab_start": 0, "vocab_total": 300, "dlse": dlse}
    grads = torch.empty(2, *logits.shape, device=kernels.device)
    for grad, rows in zip(grads, (4, 3), strict=True):
        BACKENDS[kernels.name].token_logps_bwd(dlogps, logits, labels, stats[:rows], grad, **options)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offset", [-60.0, 0.0, 60.0])
def test_the_maximum_is_a_rows_own(kernels, dtype, offset):
    """The maximum is exact, because it decides whether the label is top-1; the bits of negative numbers fall as they grow."""
    torch.manual_seed(12)
    logits = (20 * torch.rand(2, 4, 2100) + offset - 30 * (offset < 0)).to(dtype).to(kernels.device)
    stats, logps = torch.empty(3, 2, 4, device=kernels.device), torch.empty(2, 4, device=kernels.device)
    options = {"ignore_index": -100, "scale": 1.0, "softcap": None, "vocab_start": 0, "vocab_total": 2100}
    BACKENDS[kernels.name].token_logps_fwd(logits, logits.argmax(-1), logps, stats, **options)
    assert torch.equal(stats[0], logits.float().amax(-1)) and torch.equal(stats[2], stats[0])
