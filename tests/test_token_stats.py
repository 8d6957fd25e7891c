"""token_stats: log-probs, entropy, log-sum-exp and top-1 hits, and their gradients, against float64 on every backend."""

import math

import pytest
import torch
from oracle import DTYPES, assert_no_worse, plain_token_logps, transformed

import nca_kernels

OUTPUTS = ("logps", "entropy", "lse")


def plain(logits, labels, *, compute, ignore_index=-100, scale=1.0, softcap=None):
    """Log-probs, entropy and log-sum-exp in the usual PyTorch code."""
    z = transformed(logits.to(compute), scale, softcap)
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    keep = labels != ignore_index
    logps = plain_token_logps(logits, labels, ignore_index=ignore_index, scale=scale, softcap=softcap, compute=compute)
    return logps, *(torch.where(keep, value, 0.0) for value in (entropy, z.logsumexp(-1)))


def values_and_gradients(function, logits, upstream):
    """The three values, and the gradients of each value's product with ``upstream`` and of their sum."""
    leaf = logits.detach().clone().requires_grad_()
    values = function(leaf)
    terms = [(value * g.to(value)).sum() for value, g in zip(values, upstream, strict=True)]
    gradients = [torch.autograd.grad(term, leaf, retain_graph=True)[0] for term in (*terms, sum(terms))]
    return [value.detach() for value in values], gradients


def check(target, logits, labels, tol=2e-6, **options):
    upstream = torch.randn(3, *labels.shape)
    truth = values_and_gradients(lambda x: plain(x, labels, compute=torch.float64, **options), logits.double(), upstream)
    peer = values_and_gradients(lambda x: plain(x, labels, compute=torch.float32, **options), logits.float(), upstream)
    where = labels.to(target.device)

    def ours(x):
        return nca_kernels.token_stats(x, where, entropy_gradient=True, backend=target.name, **options)[:3]

    got = values_and_gradients(ours, logits.to(target.device), upstream)
    for name, value, exact, other in zip(OUTPUTS, got[0], truth[0], peer[0], strict=True):
        assert value.dtype == torch.float32
        assert_no_worse(value, exact, other, tol, name)
    rounding = max(tol, torch.finfo(logits.dtype).eps / 2)
    for name, gradient, exact, other in zip((*OUTPUTS, "all"), got[1], truth[1], peer[1], strict=True):
        assert gradient.dtype == logits.dtype
        assert_no_worse(gradient, exact, other, rounding, f"gradient of {name}")


def problem(V, dtype=torch.float32, size=3.0):
    torch.manual_seed(V)
    logits = (size * torch.randn(2, 3, V)).to(dtype)
    labels = torch.randint(V, (2, 3))
    labels[0, 0], labels[0, 1], labels[1, 0] = 0, V - 1, -100
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("V", [1, 2, 33, 1000, 4097, 50257])
def test_values_and_gradients(target, V, dtype):
    if target.interpreted and V > 4097 and dtype != torch.bfloat16:
        pytest.skip("the interpreter is slow: the longest rows run there in bfloat16 only")
    check(target, *problem(V, dtype))


@pytest.mark.parametrize("scale, softcap", [(0.5, None), (2.0, 5.0), (1.0, 30.0)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_and_softcap(target, dtype, scale, softcap):
    check(target, *problem(517, dtype, size=8.0), scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_large_logits(target, dtype):
    logits, labels = problem(999, dtype)
    check(target, (3000 * logits.clamp(-6, 6).float()).to(dtype), labels)


def test_a_certain_row_and_a_uniform_one(target):
    """The entropy of an almost certain row keeps its digits, which lse - sum p z would lose; that of equal logits is log V."""
    logits = torch.zeros(1, 2, 64, device=target.device)
    logits[0, 0, 5] = 20.0
    labels = torch.tensor([[5, 63]], device=target.device)
    stats = nca_kernels.token_stats(logits, labels, backend=target.name)
    z = logits[0, 0].double()
    exact = torch.special.entr(z.softmax(-1)).sum().item()
    assert stats.entropy[0, 0].item() == pytest.approx(exact, abs=2**-23)  # of 3e-6; as lse - sum p z it would be off by 2e-6
    assert stats.entropy[0, 1].item() == pytest.approx(math.log(64), rel=1e-6)
    assert stats.lse[0].tolist() == pytest.approx([z.logsumexp(-1).item(), math.log(64)], rel=1e-6)
    assert stats.top1.tolist() == [[True, True]]  # ties count


def test_top1_is_that_of_argmax(target):
    logits, _ = problem(1000, torch.bfloat16)
    labels = torch.stack((logits[0].argmax(-1), logits[1].argmin(-1)))
    labels[0, 2] = -100
    stats = nca_kernels.token_stats(logits.to(target.device), labels.to(target.device), backend=target.name)
    assert stats.top1.dtype == torch.bool
    assert stats.top1.tolist() == [[True, True, False], [False] * 3]


def test_minus_infinity_is_legal(target):
    torch.manual_seed(2)
    logits = torch.randn(2, 3, 300)
    logits[..., 40:290] = -math.inf
    logits[1, 0, :299] = -math.inf  # one finite logit left: log-prob 0, entropy 0
    labels = torch.tensor([[0, 39, 292], [299, 295, 5]])
    check(target, logits, labels)
    masked = labels.clone()
    masked[1, 2] = 50  # masked itself: log-prob -inf, the others as they were
    stats, before = (
        nca_kernels.token_stats(logits.to(target.device), y.to(target.device), backend=target.name) for y in (masked, labels)
    )
    assert stats.logps[1, 2] == -math.inf and not stats.top1[1, 2]
    assert torch.equal(stats.entropy, before.entropy) and torch.equal(stats.lse, before.lse)
    check(target, logits, masked, softcap=4.0)


def test_minus_infinity_in_a_whole_leading_block(target):
    logits = torch.full((1, 2, 20000), -math.inf)
    logits[..., -3:] = torch.tensor([1.0, 2.0, 3.0])
    check(target, logits, torch.tensor([[19999, 19997]]))


def test_nan_stays_in_its_row(target):
    torch.manual_seed(3)
    logits = torch.randn(1, 5, 4099, device=target.device)
    logits[0, 1, 4098] = math.nan
    logits[0, 2, 0] = math.nan
    logits[0, 3] = -math.inf  # nothing left to be the label
    leaf = logits.requires_grad_()
    labels = torch.zeros((1, 5), dtype=torch.int64, device=target.device)
    stats = nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=target.name)
    bad = torch.tensor([False, True, True, True, False], device=target.device)
    for values in stats[:3]:
        assert torch.equal(values[0].isnan(), bad)
        (grad,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True)
        assert torch.equal(grad[0].isnan().all(-1), bad) and torch.equal(grad[0].isnan().any(-1), bad)
    assert not stats.top1[0][bad].any()


def test_ignored_rows_are_not_read(target):
    logits = torch.randn(2, 4, 64, device=target.device)
    logits[0, 1:], logits[1, :2] = math.nan, math.inf
    labels = torch.full((2, 4), -100, device=target.device)
    labels[0, 0], labels[1, 2], labels[1, 3] = 3, 63, 0
    leaf = logits.requires_grad_()
    stats = nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=target.name)
    ignored = labels == -100
    weight = torch.where(ignored, math.nan, 1.0)  # whatever the upstream gradient holds there
    sum((values * weight)[~ignored].sum() + (values * 1.0)[ignored].sum() for values in stats[:3]).backward()
    assert all((values[ignored] == 0).all() for values in stats[:3]) and not stats.top1[ignored].any()
    assert (leaf.grad[ignored] == 0).all() and torch.isfinite(leaf.grad).all()
    upstream = [torch.where(ignored, math.nan, 1.0) for _ in range(3)]
    leaf = logits.detach().clone().requires_grad_()
    stats = nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=target.name)
    (grad,) = torch.autograd.grad(stats[:3], leaf, upstream)
    if target.name != "torch":  # PyTorch's masked_fill has 0 there as well, but log_softmax before it has not
        assert (grad[ignored] == 0).all() and torch.isfinite(grad).all()


def test_what_has_a_gradient(target):
    logits, labels = (t.to(target.device) for t in problem(65))
    leaf = logits.requires_grad_()
    stats = nca_kernels.token_stats(leaf, labels, backend=target.name)
    assert stats.logps.requires_grad and stats.lse.requires_grad
    assert not stats.entropy.requires_grad and not stats.top1.requires_grad
    with_entropy = nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=target.name)
    assert with_entropy.entropy.requires_grad
    for ours, same in zip(stats, with_entropy, strict=True):
        assert torch.equal(ours, same)


def test_its_log_probs_are_those_of_token_logps(target):
    logits, labels = (t.to(target.device) for t in problem(1000, torch.bfloat16))
    upstream = torch.randn(labels.shape, device=target.device)
    results = []
    for function in (nca_kernels.token_logps, lambda *a, **k: nca_kernels.token_stats(*a, **k).logps):
        leaf = logits.clone().requires_grad_()
        logps = function(leaf, labels, shift=1, backend=target.name)
        results.append((logps.detach(), *torch.autograd.grad(logps, leaf, upstream)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32])
def test_shift_strides_and_label_dtypes(target, labels_dtype):
    torch.manual_seed(4)
    store = torch.randn(2, 6, 70, device=target.device)
    labels = torch.randint(64, (2, 6), device=target.device).to(labels_dtype)
    view = store[:, ::2, 3:67]
    every = labels.repeat_interleave(2, dim=1)[:, ::4]
    assert not every.is_contiguous()
    ours = nca_kernels.token_stats(view, every, shift=1, backend=target.name)
    plainly = nca_kernels.token_stats(view[:, :-1].contiguous(), every[:, 1:].contiguous(), backend=target.name)
    for value, wanted in zip(ours, plainly, strict=True):
        assert torch.allclose(value[:, :-1].float(), wanted.float(), rtol=1e-6, atol=1e-6) and (value[:, -1] == 0).all()


def test_any_leading_dimensions(target):
    logits = torch.randn(2, 3, 4, 16, device=target.device)
    labels = torch.randint(16, (2, 3, 4), device=target.device)
    deep = nca_kernels.token_stats(logits, labels, backend=target.name)
    flat = nca_kernels.token_stats(logits.view(24, 16), labels.view(24), backend=target.name)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(deep, flat, strict=True))
    for shape in ((0, 5, 7), (3, 0, 7), (0, 7)):
        leaf = torch.randn(shape, device=target.device, requires_grad=True)
        labels = torch.empty(shape[:-1], dtype=torch.int64, device=target.device)
        stats = nca_kernels.token_stats(leaf, labels, backend=target.name)
        (stats.logps.sum() + stats.lse.sum()).backward()
        assert stats.top1.shape == shape[:-1] and leaf.grad.shape == shape


def test_an_illegal_label(target):
    logits = torch.randn(1, 2, 5, device=target.device)
    labels = torch.tensor([[1, 5]], device=target.device)
    if target.device.type == "cpu":
        with pytest.raises(IndexError, match="labels: the label 5 of the logits at flat position 1"):
            nca_kernels.token_stats(logits, labels, backend=target.name)
        return
    stats = nca_kernels.token_stats(logits, labels, backend=target.name)
    assert all(values.isnan().tolist() == [[False, True]] for values in stats[:3]) and not stats.top1[0, 1]


def test_bad_arguments():
    logits, labels = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="entropy_gradient: got str, wanted a bool"):
        nca_kernels.token_stats(logits, labels, entropy_gradient="yes")
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 2\], wanted \[2, 3\]"):
        nca_kernels.token_stats(logits, labels[:, :2])
    with pytest.raises(TypeError, match="logits: got list"):
        nca_kernels.token_stats([1.0], labels)
    with pytest.raises(ValueError, match="scale: got 0"):
        nca_kernels.token_stats(logits, labels, scale=0)


def test_float64_and_second_derivatives_on_torch():
    torch.manual_seed(5)
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 4, -100], [3, 2, 1]])
    logits[0, 0, 2] = 3.0
    leaf = logits.requires_grad_()

    def stats(x):
        return nca_kernels.token_stats(x, labels, softcap=3.0, scale=0.7, entropy_gradient=True, backend="torch")[:3]

    assert all(value.dtype == torch.float64 for value in stats(leaf))
    assert torch.autograd.gradcheck(stats, leaf) and torch.autograd.gradgradcheck(stats, leaf)


def test_second_derivatives_are_refused_on_kernels(kernels):
    logits, labels = (t.to(kernels.device) for t in problem(65))
    leaf = logits.requires_grad_()
    stats = nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=kernels.name)
    for value in stats[:3]:
        (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='torch'"):
            grad.square().sum().backward()


def test_opcheck(kernels):
    logits, labels = (t.to(kernels.device) for t in problem(65))
    operator = torch.ops.nca_kernels.token_stats
    for entropy_gradient in (False, True):
        leaf = logits.clone().requires_grad_()
        torch.library.opcheck(operator, (leaf, labels, entropy_gradient, -100, 0.5, 3.0, kernels.name))
    *_, stats = operator(logits, labels, True, -100, 1.0, None, kernels.name)
    dlogps, dlse, dentropy = torch.randn(3, 2, 3, device=kernels.device)
    for upstream in ((dlogps, None, None), (dlogps, dlse, dentropy)):
        torch.library.opcheck(
            torch.ops.nca_kernels.token_logps_bwd, (*upstream, logits, labels, stats, -100, 1.0, None, kernels.name)
        )


def test_compiles_to_one_graph(target):
    logits, labels = (t.to(target.device) for t in problem(65))

    def loss(logits, labels):
        stats = nca_kernels.token_stats(logits * 1.5, labels, shift=1, entropy_gradient=True, backend=target.name)
        return stats.logps.sum() + 0.1 * stats.lse.square().sum() - 0.01 * stats.entropy.sum() + stats.top1.sum()

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, labels)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
