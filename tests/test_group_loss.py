"""group_loss: losses, rewards and gradients against the reference in float64, on every backend."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_no_worse

import nca_kernels
from nca_kernels import reference
from nca_kernels.backends import BACKENDS
from nca_kernels.loss_table import LOSSES, PAIRS, REDUCTIONS, Loss

TOL = 1e-6
SHARED = ("beta", "mask", "reduction", "nll_weight")  # what every loss takes


def _batch(B, K, ragged, ties, seed=0):
    """Log-probs of the size of long responses (hundreds of nats), scores with ties, and a mask with empty prompts."""
    generator = torch.Generator().manual_seed(seed)
    ref_logps = -300 * torch.rand(B, K, generator=generator) - 20
    logps = ref_logps + 12 * torch.randn(B, K, generator=generator)
    scores = torch.randint(0, 4, (B, K), generator=generator).float() if ties else torch.randn(B, K, generator=generator)
    mask = None
    if ragged:
        mask = torch.rand(B, K, generator=generator) < 0.7
        mask[0], mask[-1] = True, False
    lengths = torch.randint(0, 90, (B, K), generator=generator)
    desirable = torch.rand(B, K, generator=generator) < 0.5
    return logps, ref_logps, scores, mask, lengths, desirable


def taken(name, options):
    """Only the options that the loss takes."""
    own = (*LOSSES[name].takes, *SHARED, *(("lengths",) if options.get("nll_weight") else ()))
    return {key: value for key, value in options.items() if key in own}


def _run(name, logps, ref_logps, scores, backend, upstream, **options):
    leaf = logps.clone().requires_grad_()
    out = nca_kernels.group_loss(name, leaf, ref_logps, scores, backend=backend, **options)
    assert not out.rewards.requires_grad
    (grad,) = torch.autograd.grad(out.loss, leaf, upstream.to(out.loss))
    return out.loss.detach(), out.rewards, grad


def _check(target, name, logps, ref_logps, scores, *, reduction="none", **options):
    """Compare with float64; the yardstick is the reference in float32 on the same float32 inputs."""
    B, options = len(logps), taken(name, options)
    upstream = torch.randn(B) if reduction == "none" else torch.tensor(1.7)
    options["reduction"] = reduction
    to = target.device
    wide = [None if x is None else x.double() for x in (logps, ref_logps, scores)]
    truth = _run(name, *wide, "torch", upstream, **options)
    peer = _run(name, logps, ref_logps, scores, "torch", upstream, **options)
    moved = {k: v.to(to) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    tensors = [None if x is None else x.to(to) for x in (logps, ref_logps, scores)]
    ours = _run(name, *tensors, target.name, upstream.to(to), **moved)
    for what, a, b, c in zip(("loss", "rewards", "dlogps"), ours, truth, peer, strict=True):
        assert a.dtype == torch.float32
        assert_no_worse(a, b, c, TOL, what)


# Each two of the number of responses, ties and masks, once: a mask takes responses away before scores are compared, so that the
# three together are a group of another size, with or without ties.
GROUPS = [
    *((K, ties, ties) for K in (1, 4) for ties in (False, True)),
    *((K, ties, not ties) for K in (2, 7) for ties in (False, True)),
]


@pytest.mark.parametrize("K, ties, ragged", GROUPS)
@pytest.mark.parametrize("name", LOSSES)
def test_against_the_reference(target, name, K, ties, ragged):
    logps, ref_logps, scores, mask, lengths, desirable = _batch(9, K, ragged, ties, seed=K)
    for alpha in (0.0, 0.3, 1.0) if "alpha" in LOSSES[name].takes else (None,):
        _check(target, name, logps, ref_logps, scores, mask=mask, beta=0.1, alpha=alpha)
    _check(target, name, logps, ref_logps, scores, mask=mask, beta=0.7, reduction="mean")
    _check(target, name, logps, ref_logps, scores, mask=mask, lengths=lengths, nll_weight=0.3, alpha=0.3)
    _check(target, name, logps, ref_logps, scores, mask=mask, reduction="sum")
    _check(target, name, logps, ref_logps, None, mask=mask)
    if name in ("dpo", "ipo"):
        _check(target, name, logps, ref_logps, scores, mask=mask, pairs="all")
    if name == "dpo":
        _check(target, name, logps, ref_logps, scores, mask=mask, pairs="all", label_smoothing=0.2)
    if name == "ipo":
        _check(target, name, logps, ref_logps, scores, mask=mask, lengths=lengths, pairs="all")
    if name == "kto":
        _check(target, name, logps, ref_logps, scores, mask=mask, desirable=desirable, baseline=1.25)
        _check(target, name, logps, ref_logps, scores, mask=mask, desirable=desirable, baseline=torch.tensor([-3.0]))


@pytest.mark.parametrize("name", LOSSES)
def test_many_prompts_and_many_responses(target, name):
    """More prompts than a block of threads has threads, and more responses than a warp has."""
    for B, K in ((2100, 2), (5, 67)):
        if target.interpreted and B > 100:
            B = 100
        logps, ref_logps, scores, mask, lengths, _ = _batch(B, K, True, True)
        _check(target, name, logps, ref_logps, scores, mask=mask, lengths=lengths, pairs="all")
        _check(target, name, logps, ref_logps, scores, mask=mask, lengths=lengths, reduction="mean")


@pytest.mark.parametrize("name", LOSSES)
def test_what_masked_entries_hold_does_not_matter(target, name):
    logps, ref_logps, scores, mask, lengths, desirable = _batch(6, 4, True, False)
    options = taken(name, {"mask": mask, "lengths": lengths, "desirable": desirable})
    poisoned = [torch.where(mask, x, bad) for x, bad in ((logps, math.nan), (ref_logps, math.inf), (scores, math.inf))]
    to = target.device
    options = {k: v.to(to) for k, v in options.items()}
    clean, dirty = (
        _run(name, *(x.to(to) for x in inputs), target.name, torch.ones(6, device=to), reduction="none", **options)
        for inputs in ((logps, ref_logps, scores), poisoned)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert (dirty[1][~mask.to(to)] == 0).all() and (dirty[2][~mask.to(to)] == 0).all()


NAN_INPUTS = ("logps", "ref_logps", "scores", "lengths", "baseline")


@pytest.mark.parametrize("where", NAN_INPUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_nan_reaches_its_prompt_alone(target, name, where):
    """No comparison or maximum hides the NaN, and the losses and gradients of the other prompts do not change."""
    logps, ref_logps, scores, mask, lengths, _ = _batch(6, 4, True, False, seed=5)
    inputs = {"logps": logps, "ref_logps": ref_logps, "scores": scores, "lengths": lengths.float(), "baseline": torch.ones(1)}
    mask[1] = torch.tensor([True, True, False, True])
    options = {"mask": mask, "nll_weight": 0.1 if where == "lengths" else 0.0}

    def run(inputs, **more):
        given = taken(name, {**inputs, **options, **more})
        tensors = {key: value.to(target.device) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        three = (inputs[key].to(target.device) for key in ("logps", "ref_logps", "scores"))
        upstream = torch.ones(6 if more["reduction"] == "none" else (), device=target.device)
        loss, _, grad = _run(name, *three, target.name, upstream, **tensors)
        return loss.cpu(), grad.cpu()

    read = where not in ("lengths", "baseline") or where in taken(name, {**inputs, **options})
    spoiled = {**inputs, where: inputs[where].clone()}
    spoiled[where].view(-1)[0 if where == "baseline" else 7] = math.nan  # of prompt 1, its last response
    bad = torch.zeros(6, dtype=torch.bool)
    bad[1] = read
    if read and where == "baseline":
        bad = mask.any(1)
    for pairs, reduction in itertools.product(PAIRS if "pairs" in LOSSES[name].takes else (None,), REDUCTIONS):
        clean, got = (run(x, pairs=pairs, reduction=reduction) for x in (inputs, spoiled))
        assert torch.equal(got[1].isnan(), bad[:, None] & mask)
        assert torch.equal(got[1][~bad], clean[1][~bad])
        if reduction == "none":
            assert torch.equal(got[0].isnan(), bad) and torch.equal(got[0][~bad], clean[0][~bad])
        else:
            assert got[0].isnan() == bad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_and_rewards(target, name):
    """Nothing overflows: scores of 1e4 at alpha 1e-3, implicit rewards of +-1e3."""
    logps = torch.tensor([[-1e4, -10.0, -5e3], [-10.0, -1e4, -10.0]])
    ref_logps = torch.tensor([[-10.0, -1e4, -5e3], [-10.0, -10.0, -1e4]])
    scores = torch.tensor([[1e4, -1e4, 0.0], [1.0, 1.0001, 1.0]])
    _check(target, name, logps, ref_logps, scores, alpha=1e-3)


@pytest.mark.parametrize("name", ["dpo", "ipo", "plackett_luce"])
def test_nothing_to_learn_from(target, name):
    """There is no pair: only ties, one response, or no response."""
    scores = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [0.0, 1.0, 2.0]], device=target.device)
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]], device=target.device)
    logps = torch.randn(3, 3, device=target.device, requires_grad=True)
    out = nca_kernels.group_loss(
        name, logps, torch.zeros_like(logps.detach()), scores, mask=mask, reduction="none", backend=target.name
    )
    out.loss.sum().backward()
    assert (out.loss == 0).all() and (logps.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_prompt_at_all(target, name):
    logps = torch.randn(0, 4, device=target.device, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        out = nca_kernels.group_loss(name, logps, logps.detach(), reduction=reduction, backend=target.name)
        assert out.loss.sum() == 0 and out.rewards.shape == (0, 4)


def test_named_functions_are_the_same(target):
    logps, ref_logps, scores, mask, lengths, desirable = (
        None if x is None else x.to(target.device) for x in _batch(5, 4, True, False)
    )
    options = {"beta": 0.3, "mask": mask, "reduction": "sum", "backend": target.name}
    extras = {"alpha": 0.2, "pairs": "all", "lengths": lengths, "desirable": desirable, "baseline": 0.5}
    for name in LOSSES:
        extra = taken(name, extras)
        fixed = getattr(nca_kernels, f"{name}_loss")(logps, ref_logps, scores, **options, **extra)
        general = nca_kernels.group_loss(name, logps, ref_logps, scores, **options, **extra)
        assert torch.equal(fixed.loss, general.loss) and torch.equal(fixed.rewards, general.rewards)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", LOSSES)
def test_integer_scores(target, name, dtype):
    """Integer ratings give the same results as floating-point numbers of the same value."""
    logps, ref_logps, scores, mask, *_ = (None if x is None else x.to(target.device) for x in _batch(5, 4, True, True))
    options = {"mask": mask, "reduction": "none", "backend": target.name}
    whole, floating = (nca_kernels.group_loss(name, logps, ref_logps, s, **options) for s in (scores.to(dtype), scores))
    assert torch.equal(whole.loss, floating.loss)
    assert torch.equal(getattr(nca_kernels, f"{name}_loss")(logps, ref_logps, scores.to(dtype), **options).loss, whole.loss)


def test_low_precision_log_probs_are_computed_in_float32(target):
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.bfloat16, device=target.device, requires_grad=True)
    out = nca_kernels.dpo_loss(logps, torch.zeros(1, 2, device=target.device), beta=1.0, backend=target.name)
    out.loss.backward()
    assert out.loss.dtype == out.rewards.dtype == torch.float32 and logps.grad.dtype == torch.bfloat16
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "nca"])
def test_label_smoothing_and_nll_by_their_definition(target, name):
    """Compare with other calls of the same function: with reversed pairs, and with the gradient of the weighted averages."""
    logps, ref_logps, scores, mask, lengths, _ = (x.to(target.device) for x in _batch(5, 4, True, True))
    options = {"mask": mask, "reduction": "none", "backend": target.name}
    plain = nca_kernels.group_loss(name, logps, ref_logps, scores, **options).loss
    if name == "dpo":
        smooth, around = (
            nca_kernels.dpo_loss(logps, ref_logps, scores, pairs="all", label_smoothing=e, **options).loss for e in (0.3, 0.0)
        )
        flipped = nca_kernels.dpo_loss(logps, ref_logps, -scores, pairs="all", **options).loss
        assert torch.allclose(smooth, 0.7 * around + 0.3 * flipped, rtol=1e-5, atol=1e-5)
    more = nca_kernels.group_loss(name, logps, ref_logps, scores, lengths=lengths, nll_weight=0.5, **options).loss
    w = reference.response_weights(scores, 1.0 if name == "nca" else 0.0, mask)
    assert torch.allclose(more - plain, -0.5 * (w * logps / lengths.clamp(min=1)).sum(1), rtol=1e-4, atol=1e-4)


def test_an_impossible_response_without_weight(target):
    """A log-prob of -inf has the weight 0, and 0 * inf must not give NaN."""
    logps = torch.tensor([[-1.0, -math.inf]], device=target.device)
    ref_logps, scores = torch.full_like(logps, -2.0), torch.tensor([[1, 0]], device=target.device)
    lengths = torch.full_like(logps, 4.0)
    for name in ("info_nca", "nca", "biased_nca", "dpo", "plackett_luce"):
        options = taken(name, {"alpha": 0.0, "nll_weight": 0.1, "lengths": lengths})
        assert nca_kernels.group_loss(name, logps, ref_logps, scores, backend=target.name, **options).loss.isfinite(), name


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_the_responses_does_not_matter(target, name):
    logps, ref_logps, scores, mask, lengths, desirable = (x.to(target.device) for x in _batch(6, 5, True, True))
    order = torch.tensor([3, 0, 4, 1, 2], device=target.device)
    columns = {"mask": mask, "lengths": lengths, "desirable": desirable}
    one = torch.ones(6, device=target.device)
    results = []
    for turn in (slice(None), order):
        options = taken(name, {**{key: x[:, turn] for key, x in columns.items()}, "pairs": "all", "reduction": "none"})
        results.append(_run(name, logps[:, turn], ref_logps[:, turn], scores[:, turn], target.name, one, **options))
    (loss, rewards, grad), (turned, turned_rewards, turned_grad) = results
    assert torch.allclose(turned, loss, rtol=1e-6, atol=1e-6) and torch.equal(turned_rewards, rewards[:, order])
    assert torch.allclose(turned_grad, grad[:, order], rtol=1e-5, atol=1e-7)


def test_plackett_luce_and_biased_nca_of_two(target):
    """Without ties, Plackett-Luce is DPO; at alpha 0, biased NCA is -log sigmoid(r_w) - log sigmoid(-r_l). One response gives 0."""
    logps, ref_logps, scores, *_ = (None if x is None else x.to(target.device) for x in _batch(50, 2, False, False))
    options = {"reduction": "none", "backend": target.name}
    ours = nca_kernels.plackett_luce_loss(logps, ref_logps, scores, **options).loss
    assert torch.allclose(ours, nca_kernels.dpo_loss(logps, ref_logps, scores, **options).loss, rtol=1e-6, atol=1e-6)
    r = 0.1 * (logps - ref_logps)
    best, worst = (r.gather(1, at.unsqueeze(1)).squeeze(1) for at in (scores.argmax(1), scores.argmin(1)))
    ours = nca_kernels.biased_nca_loss(logps, ref_logps, scores, alpha=0.0, **options).loss
    assert torch.allclose(ours, -F.logsigmoid(best) - F.logsigmoid(-worst), rtol=1e-6, atol=1e-6)
    ties = torch.ones_like(scores)
    assert (nca_kernels.plackett_luce_loss(logps, ref_logps, ties, **options).loss == 0).all()
    for function in (nca_kernels.plackett_luce_loss, nca_kernels.biased_nca_loss):
        assert (function(logps[:, :1], ref_logps[:, :1], scores[:, :1], **options).loss == 0).all()


def test_a_batch_that_takes_several_blocks(target):
    """The reductions give the sum and the mean of the losses of single prompts."""
    B, K = (36, 31) if target.interpreted else (1100, 6)
    logps, ref_logps, scores, mask, *_ = (x.to(target.device) for x in _batch(B, K, True, True))
    options = {"mask": mask, "backend": target.name}
    each = nca_kernels.plackett_luce_loss(logps, ref_logps, scores, reduction="none", **options).loss.double()
    for reduction in ("mean", "sum"):
        total = nca_kernels.plackett_luce_loss(logps, ref_logps, scores, reduction=reduction, **options).loss
        assert total.item() == pytest.approx(getattr(each, reduction)().item(), rel=1e-6)


def test_two_responses_and_alpha_zero(target):
    """InfoNCA is DPO, and NCA is TRL's ``nca_pair``: -log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l)."""
    logps, ref_logps, scores, *_ = (None if x is None else x.to(target.device) for x in _batch(50, 2, False, False))
    options = {"reduction": "none", "backend": target.name}
    info_nca, nca, dpo = (
        nca_kernels.group_loss(name, logps, ref_logps, scores, **taken(name, {"alpha": 0.0}), **options).loss
        for name in ("info_nca", "nca", "dpo")
    )
    assert torch.allclose(info_nca, dpo, rtol=1e-6, atol=1e-6)
    r = 0.1 * (logps - ref_logps).double()
    best = r.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    nca_pair = -F.logsigmoid(best) - F.logsigmoid(-r).sum(1) / 2
    assert torch.allclose(nca.double(), nca_pair, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["info_nca", "nca"])
def test_the_optimum_of_a_free_policy(target, name):
    """Descent by the backend's gradients ends at s / alpha + C for InfoNCA, and at log(K w), without a free constant, for NCA."""
    scores = torch.tensor([[0.3, -0.2, 0.9, 0.1], [1.0, 1.0, 0.0, -0.5]], device=target.device)
    beta, alpha = 0.5, 0.6
    table = torch.zeros_like(scores, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=60, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nca_kernels.group_loss(
            name, table, torch.zeros_like(scores), scores, beta=beta, alpha=alpha, backend=target.name
        ).loss
        value.backward()
        return value

    optimizer.step(loss)
    r = beta * table.detach()
    if name == "info_nca":
        constant = r - scores / alpha
        assert torch.allclose(constant, constant.mean(1, keepdim=True), atol=2e-3)
    else:
        assert torch.allclose(r, (4 * (scores / alpha).softmax(1)).log(), atol=2e-3)


def test_the_reference_has_every_loss():
    assert set(reference.FUNCTIONS) == set(LOSSES)


@pytest.mark.filterwarnings("ignore:nca_kernels. group_loss on cpu runs on plain PyTorch")
def test_a_new_loss_runs_on_torch_by_a_line_and_a_function(monkeypatch, kernels):
    def hinge(log_ratios, scores, mask, *, beta):
        return (1 - beta * log_ratios).clamp(min=0).masked_fill(~mask, 0.0).sum(-1)

    monkeypatch.setitem(LOSSES, "hinge", Loss(takes=(), has_kernels=False))
    monkeypatch.setitem(reference.FUNCTIONS, "hinge", hinge)
    logps = torch.zeros(2, 3, device=kernels.device, requires_grad=True)
    loss = nca_kernels.group_loss("hinge", logps, logps.detach(), beta=2.0).loss
    loss.backward()
    assert loss == 3 and (logps.grad == -1).all()
    with pytest.raises(RuntimeError, match=f"backend '{kernels.name}' cannot run group_loss: .*no kernel for the loss 'hinge'"):
        nca_kernels.group_loss("hinge", logps, logps.detach(), backend=kernels.name)


def test_the_extension_has_the_names_of_the_table(kernels):
    if kernels.name == "triton":
        pytest.skip("no extension: its kernel reads the names themselves")
    module = BACKENDS[kernels.name]._module
    assert set(module.LOSSES) == {name for name, loss in LOSSES.items() if loss.has_kernels}
    assert set(module.PAIRS) == set(PAIRS) and set(module.REDUCTIONS) == set(REDUCTIONS)
