"""The reference's K-way losses against hand-computed numbers, plain loops, finite differences and the closed-form optimum.

All tests are in float64 unless they are about another dtype. They use no kernel; the kernels' tests compare with the reference.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from nca_kernels.loss_table import LOSSES
from nca_kernels.reference import group_loss, linear_token_logps, response_weights
from nca_kernels.scores import best_scored, score_pairs

F64 = torch.float64
NAN, INF = math.nan, math.inf


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


def loss_of(name, logps, scores, *, ref_logps=None, beta=1.0, alpha=1.0, **options):
    """The losses ``[B]``; reference log-probs are zero unless they are given."""
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps
    return group_loss(name, logps, ref_logps, scores, beta=beta, alpha=alpha, **options)[0]


def grad_of(name, logps, scores, **options):
    """The gradient of the losses; a NaN in any step of the backward is an error."""
    logps = logps.clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        return torch.autograd.grad(loss_of(name, logps, scores, **options).sum(), logps)[0]


# --- weights and pairs -----------------------------------------------------------------------------------------------


def test_response_weights_by_hand():
    scores = matrix([0.0, math.log(2), math.log(5)])
    torch.testing.assert_close(response_weights(scores, 1.0), matrix([1 / 8, 2 / 8, 5 / 8]))
    torch.testing.assert_close(response_weights(scores, 0.5), matrix([1 / 30, 4 / 30, 25 / 30]))  # odds squared
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(response_weights(scores, 1.0, mask), matrix([1 / 3, 2 / 3, 0]))


def test_response_weights_at_alpha_zero_and_near_it():
    scores = matrix([3.0, 7.0, 7.0, NAN], [1.0, 1.0, 1.0, 1.0], [NAN, INF, NAN, NAN], [2.0, -INF, NAN, INF])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    want = matrix([0, 1 / 2, 1 / 2, 0], [1 / 4] * 4, [0] * 4, [1, 0, 0, 0])
    for alpha in (0.0, 1e-3):
        torch.testing.assert_close(response_weights(scores, alpha, mask), want)
    assert torch.equal(best_scored(scores, mask), want > 0)


def test_response_weights_of_huge_scores_in_float32():
    # s / alpha is 1e7 here, where float32 knows whole numbers only: the gap of 0.5 must be formed first.
    scores = torch.tensor([[1e4, 1e4 - 0.0009765625, -1e4]])
    odds = math.exp(-0.9765625)
    want = torch.tensor([[1 / (1 + odds), odds / (1 + odds), 0]])
    torch.testing.assert_close(response_weights(scores, 1e-3), want)


# --- the losses, by hand ---------------------------------------------------------------------------------------------

# logps - ref_logps = ln 2, 0, -ln 2: at beta = 1 the sigmoids are 2/3, 1/2, 1/3 and the odds of the softmax 4 : 2 : 1.
LN2 = math.log(2)
SCORES = matrix([2.0, 1.0, 0.0])
# alpha = 0, so w = (1, 0, 0), and the best is the desirable one.
BY_HAND = [
    # -ln(4/7)
    ("info_nca", "best_vs_rest", 0.5596157879354227),
    # -ln(2/3) - 1/3 (ln(1/3) + ln(1/2) + ln(2/3)) = ln(3/2) + 1/3 ln 9
    ("nca", "best_vs_rest", 1.1378733005535708),
    # pairs (0,1), (0,2) with differences ln 2, ln 4: 1/2 (ln(3/2) + ln(5/4))
    ("dpo", "best_vs_rest", 0.3143043297111871),
    # and (1,2) with ln 2: 1/3 (2 ln(3/2) + ln(5/4))
    ("dpo", "all", 0.3446912558435128),
    # differences ln 2, 2 ln 2; 1/(2 beta) = 1/2: 1/2 ((ln2 - 1/2)^2 + (2 ln2 - 1/2)^2)
    ("ipo", "best_vs_rest", 0.4114117639555855),
    # 1/3 ((1 - 2/3) + (1 - sigmoid(-0)) + (1 - sigmoid(ln 2))) = 1/3 (1/3 + 1/2 + 1/3)
    ("kto", "best_vs_rest", 0.3888888888888889),
    # 1/2 (-ln(4/7) - ln(2/3)): the best of all three, the second of the last two
    ("plackett_luce", "best_vs_rest", 0.48254044801929367),
    # -ln(2/3) - 1/2 (ln(1/2) + ln(2/3))
    ("biased_nca", "best_vs_rest", 0.9547712524422021),
]


@pytest.mark.parametrize("name, pairs, want", BY_HAND)
def test_by_hand(name, pairs, want):
    logps, ref_logps = matrix([LN2 - 5, -3.0, -LN2 - 1]).requires_grad_(), matrix([-5.0, -3.0, -1.0])
    losses, rewards = group_loss(name, logps, ref_logps, SCORES, beta=1.0, alpha=0.0, pairs=pairs)
    torch.testing.assert_close(losses, torch.tensor([want], dtype=F64))
    torch.testing.assert_close(rewards, matrix([LN2, 0.0, -LN2]))
    assert losses.requires_grad and not rewards.requires_grad


# --- the losses, against each other ----------------------------------------------------------------------------------


def test_info_nca_of_two_at_alpha_zero_is_dpo():
    logps, scores = randn(6, 2), randn(6, 2, seed=1)
    dpo = loss_of("dpo", logps, scores)
    torch.testing.assert_close(loss_of("info_nca", logps, scores, alpha=0.0), dpo)
    chosen = scores.argmax(-1, keepdim=True)
    margin = (logps.gather(-1, chosen) - logps.gather(-1, 1 - chosen)).squeeze(-1)
    torch.testing.assert_close(dpo, -F.logsigmoid(margin))


def test_nca_of_two_at_alpha_zero_is_nca_pair():
    """TRL's ``nca_pair``: -log sigmoid(c) - 1/2 log sigmoid(-c) - 1/2 log sigmoid(-r) of the rewards c and r."""
    logps, ref_logps, beta = randn(6, 2), randn(6, 2, seed=1), 0.3
    chosen, rejected = (beta * (logps - ref_logps)).unbind(-1)
    want = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    scores = matrix(*[[1.0, 0.0]] * 6)
    torch.testing.assert_close(loss_of("nca", logps, scores, ref_logps=ref_logps, beta=beta, alpha=0.0), want)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_pairwise_losses_are_means_of_pairs(name):
    logps, scores, lengths = randn(1, 4), matrix([0.3, 2.0, -1.0, 0.7]), matrix([3.0, 1.0, 0.0, 8.0])

    def pair(i, j):
        return loss_of(name, logps[:, [i, j]], matrix([1.0, 0.0]), lengths=lengths[:, [i, j]])

    order = [1, 3, 0, 2]  # from the best down
    vs_rest = [pair(order[0], worse) for worse in order[1:]]
    every = [pair(order[a], order[b]) for a in range(4) for b in range(a + 1, 4)]
    assert len(vs_rest) == 3 and len(every) == math.comb(4, 2)
    for pairs, want in (("best_vs_rest", vs_rest), ("all", every)):
        got = loss_of(name, logps, scores, lengths=lengths, pairs=pairs)
        torch.testing.assert_close(got, torch.stack(want).mean(0))


def test_ties_are_no_pair():
    logps = randn(2, 4)
    scores = matrix([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0])
    better = score_pairs(scores, torch.ones(2, 4, dtype=torch.bool), "best_vs_rest")
    assert better[0].sum() == 0
    assert better[1].nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]  # both best against both others
    for name, pairs in product(("dpo", "ipo"), ("best_vs_rest", "all")):
        assert loss_of(name, logps, scores, pairs=pairs)[0] == 0
        assert grad_of(name, logps, scores, pairs=pairs)[0].count_nonzero() == 0


# --- plain loops in Python floats ------------------------------------------------------------------------------------

RAGGED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)


def ragged(name, seed=0):
    """Random arguments of a loss with 4, 3, 1, 0 and 3 valid responses and, in the last prompt, a tie of the best."""
    B, K = RAGGED.shape
    scores = randn(B, K, seed=seed + 2)
    scores[4] = torch.tensor([1.5, 1.5, 9.0, 0.5], dtype=F64)
    options = {"ref_logps": randn(B, K, seed=seed + 1), "beta": 0.4, "alpha": 0.7, "mask": RAGGED}
    if name in ("ipo", "nca", "kto"):
        options["lengths"] = (4 * randn(B, K, seed=seed + 4)).abs().floor()  # some are 0
    if name in ("nca", "kto"):  # with and without weights by alpha
        options["nll_weight"] = 0.3
    if name == "dpo":
        options["label_smoothing"] = 0.2
    if name == "kto":
        options["desirable"] = randn(B, K, seed=seed + 3) > 0
        options["baseline"] = torch.tensor([0.2], dtype=F64)
    return randn(B, K, seed=seed), scores, options


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def loop_loss(
    name, logps, scores, *, ref_logps, beta, alpha, mask, pairs,
    lengths=None, desirable=None, baseline=None, label_smoothing=0.0, nll_weight=0.0,
):  # fmt: skip
    losses = []
    for b in range(len(logps)):
        valid = [i for i in range(logps.shape[1]) if mask[b, i]]
        s = {i: scores[b, i].item() for i in valid}
        ratio = {i: logps[b, i].item() - ref_logps[b, i].item() for i in valid}
        r = {i: beta * ratio[i] for i in valid}
        w = {i: math.exp(s[i] / alpha) / sum(math.exp(s[j] / alpha) for j in valid) for i in valid}
        better = [(i, j) for i in valid for j in valid if s[i] > s[j] and (pairs == "all" or s[i] == max(s.values()))]
        if name == "info_nca":
            partition = sum(math.exp(r[j]) for j in valid)
            losses.append(-sum(w[i] * math.log(math.exp(r[i]) / partition) for i in valid))
        elif name == "nca":
            losses.append(-sum(w[i] * math.log(sigmoid(r[i])) + math.log(sigmoid(-r[i])) / len(valid) for i in valid))
        elif name == "dpo":
            e = label_smoothing
            losses.append(mean(-(1 - e) * math.log(sigmoid(r[i] - r[j])) - e * math.log(sigmoid(r[j] - r[i])) for i, j in better))
        elif name == "ipo":
            average = {i: ratio[i] / max(lengths[b, i].item(), 1) for i in valid}
            losses.append(mean((average[i] - average[j] - 1 / (2 * beta)) ** 2 for i, j in better))
        elif name == "kto":
            z = max(baseline.item(), 0)
            signs = {i: 1 if desirable[b, i] else -1 for i in valid}
            losses.append(mean(1 - sigmoid(signs[i] * beta * (ratio[i] - z)) for i in valid))
        elif name == "plackett_luce":
            below = {i: [j for j in valid if s[j] <= s[i]] for i in valid}
            chosen = [i for i in valid if len(below[i]) > 1 and len(set(s.values())) > 1]
            losses.append(mean(-math.log(math.exp(r[i]) / sum(math.exp(r[j]) for j in below[i])) for i in chosen))
        else:
            assert name == "biased_nca"
            noise = {i: (1 - w[i]) / max(len(valid) - 1, 1) for i in valid}
            terms = [w[i] * math.log(sigmoid(r[i])) + noise[i] * math.log(sigmoid(-r[i])) for i in valid]
            losses.append(-sum(terms) if len(valid) > 1 else 0)
        if nll_weight:
            best = [i for i in valid if s[i] == max(s.values())]
            share = w if name in ("info_nca", "nca", "biased_nca") else {i: (i in best) / len(best) for i in valid}
            losses[-1] -= nll_weight * sum(share[i] * logps[b, i].item() / max(lengths[b, i].item(), 1) for i in valid)
    return torch.tensor(losses, dtype=F64)


@pytest.mark.parametrize("pairs", ["best_vs_rest", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_against_plain_loops(name, pairs):
    for seed in range(3):
        logps, scores, options = ragged(name, seed)
        torch.testing.assert_close(
            loss_of(name, logps, scores, pairs=pairs, **options),
            loop_loss(name, logps, scores, pairs=pairs, **options),
        )


def test_ties_of_plackett_luce():
    """If the two worst tie, the best competes with all three and each of the two with both. If all tie, there is no preference."""
    r = matrix([math.log(4), 0.0, LN2], [1.0, 2.0, 3.0])
    losses = loss_of("plackett_luce", r, matrix([1.0, 0.0, 0.0], [5.0, 5.0, 5.0]))
    want = (math.log(7 / 4) + math.log(3) + math.log(3 / 2)) / 3
    torch.testing.assert_close(losses, torch.tensor([want, 0.0], dtype=F64))
    assert grad_of("plackett_luce", r, matrix([1.0, 0.0, 0.0], [5.0, 5.0, 5.0]))[1].count_nonzero() == 0


def test_kto_baseline_is_clamped_and_detached():
    logps, scores = randn(3, 4), randn(3, 4, seed=1)
    below, none = torch.tensor([-2.0], dtype=F64), loss_of("kto", logps, scores)
    torch.testing.assert_close(loss_of("kto", logps, scores, baseline=below), none)
    baseline = torch.tensor([0.5], dtype=F64, requires_grad=True)
    assert not loss_of("kto", logps, scores, baseline=baseline).requires_grad
    desirable = scores == scores.amax(-1, keepdim=True)  # the default
    torch.testing.assert_close(loss_of("kto", logps, scores, desirable=desirable), none)


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["best_vs_rest", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_group_loss_derivatives(name, pairs):
    logps, scores, options = ragged(name)

    def function(logps):
        return loss_of(name, logps, scores, pairs=pairs, **options)

    logps.requires_grad_()
    assert torch.autograd.gradcheck(function, logps)
    assert torch.autograd.gradgradcheck(function, logps)


def test_closed_form_derivatives():
    r, scores, alpha = randn(5, 4), randn(5, 4, seed=1), 0.6
    w = torch.softmax(scores / alpha, -1)
    torch.testing.assert_close(grad_of("info_nca", r, scores, alpha=alpha), torch.softmax(r, -1) - w)
    want = -w * torch.sigmoid(-r) + torch.sigmoid(r) / 4
    torch.testing.assert_close(grad_of("nca", r, scores, alpha=alpha), want)
    want = -w * torch.sigmoid(-r) + (1 - w) / 3 * torch.sigmoid(r)
    torch.testing.assert_close(grad_of("biased_nca", r, scores, alpha=alpha), want)
    at_or_below = scores.unsqueeze(1) <= scores.unsqueeze(2)  # [B, i, j]
    shares = torch.where(at_or_below, r.exp().unsqueeze(1), 0.0)  # of j among those that i is chosen from
    shares = shares / shares.sum(2, keepdim=True)
    torch.testing.assert_close(grad_of("plackett_luce", r, scores), (shares.sum(1) - 1) / 3)


@pytest.mark.parametrize("pairs", ["best_vs_rest", "all"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries_do_not_matter(name, junk, pairs):
    spoil = partial(torch.masked_fill, mask=~RAGGED, value=junk)
    logps, scores, options = ragged(name)
    options["pairs"] = pairs
    spoiled = {key: spoil(value) if key in ("ref_logps", "lengths") else value for key, value in options.items()}
    losses, rewards = group_loss(name, spoil(logps), scores=spoil(scores), **spoiled)
    grad = grad_of(name, spoil(logps), spoil(scores), **spoiled)
    assert torch.equal(losses, loss_of(name, logps, scores, **options))
    assert torch.equal(grad, grad_of(name, logps, scores, **options))
    assert losses[3] == grad[~RAGGED].count_nonzero() == 0  # the prompt with no valid response
    torch.testing.assert_close(rewards, torch.where(RAGGED, options["beta"] * (logps - options["ref_logps"]), 0))


@pytest.mark.parametrize("name", LOSSES)
def test_one_valid_response(name):
    """InfoNCA and the pairwise losses compare responses, so they have no gradient; NCA and KTO use each response by itself."""
    mask = torch.tensor([[False, True, False]])
    logps, scores = matrix([NAN, LN2, NAN]), matrix([NAN, 3.0, INF])
    want = {"nca": -math.log(2 / 3) - math.log(1 / 3), "kto": 1 / 3}.get(name, 0.0)
    slope = {"nca": -1 / 3 + 2 / 3, "kto": -2 / 9}.get(name, 0.0)  # -w sigmoid(-r) + sigmoid(r); -s (1 - s), s = 2/3
    torch.testing.assert_close(loss_of(name, logps, scores, mask=mask).item(), want)
    torch.testing.assert_close(grad_of(name, logps, scores, mask=mask), matrix([0.0, slope, 0.0]))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_rewards_stay_finite_in_float32(name):
    logps, scores = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert loss_of(name, logps, scores, alpha=1e-3).isfinite().all()
    assert grad_of(name, logps, scores, alpha=1e-3).isfinite().all()


def test_impossible_rejected_response():
    """The margin is infinite, so the gradient is zero, and comparing the response with itself must not give inf - inf."""
    logps, scores = matrix([0.0, -INF]), matrix([1.0, 0.0])
    assert loss_of("dpo", logps, scores).item() == grad_of("dpo", logps, scores).count_nonzero() == 0


# --- the optimum -----------------------------------------------------------------------------------------------------

TABLE = matrix([1.0, 0.3, -0.4, -1.0], [0.0, 0.0, 0.9, 0.1], [-0.5, -0.6, -0.7, 1.0])


def optimum(name, scores, alpha):
    """The rewards that gradient descent finds if every response's reward is free, as in a tabular policy."""
    r = torch.zeros_like(scores, requires_grad=True)
    # No line search: it compares loss values, which are flat within 1e-8 of the optimum in float64. Gradients are not.
    optimizer = torch.optim.LBFGS([r], max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        r.grad = grad_of(name, r.detach(), scores, alpha=alpha)
        return r.grad.norm()

    optimizer.step(closure)
    return r.detach()


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_optimum_of_info_nca_is_the_score_up_to_a_constant(alpha):
    offset = optimum("info_nca", TABLE, alpha) - TABLE / alpha
    torch.testing.assert_close(offset, offset[:, :1].expand(3, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_optimum_of_nca_is_absolute(alpha):
    r = optimum("nca", TABLE, alpha)
    odds = torch.exp(TABLE / alpha)
    for want in (4 * response_weights(TABLE, alpha), odds / odds.mean(-1, keepdim=True)):
        torch.testing.assert_close(r, want.log(), rtol=0, atol=1e-12)
    assert (r.amax(-1) >= 0).all()


# --- tracing ---------------------------------------------------------------------------------------------------------


def test_compiles_without_a_graph_break():
    def step(hidden, weight, labels, ref_logps, scores, mask):
        logps = linear_token_logps(hidden, weight, labels, softcap=5.0).sum(-1).view(2, 3)
        losses = (loss_of(name, logps, scores, ref_logps=ref_logps, alpha=0.0, mask=mask) for name in LOSSES)
        return torch.stack(list(losses))

    hidden, labels = randn(6, 4, 2).requires_grad_(), torch.tensor([[1, 4, -100, 0]]).expand(6, 4)
    arguments = (hidden, randn(5, 2, seed=1), labels, randn(2, 3), randn(2, 3, seed=1), RAGGED[:2, :3])
    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments), step(*arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(losses.sum(), hidden) for losses in (got, want)))
