"""The reference's log-probs against hand-computed numbers, PyTorch's own functions and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_reference import F64, INF, NAN, matrix, randn

from nca_kernels.reference import linear_token_logps, token_logps


def test_token_logps_by_hand():
    # Odds 1 : 2 : 5 of 8; then scale 2 squares them: 1 : 4 : 25 of 30.
    logits = matrix([0.0, math.log(2), math.log(5)]).requires_grad_()
    labels = torch.tensor([2])
    logps = token_logps(logits, labels)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(logps, torch.tensor([math.log(5 / 8)], dtype=F64))
    torch.testing.assert_close(grad, matrix([-1 / 8, -2 / 8, 1 - 5 / 8]))
    torch.testing.assert_close(token_logps(logits, labels, scale=2.0), torch.tensor([math.log(25 / 30)], dtype=F64))


def test_softcap_by_hand():
    # atanh(1/2) = ln(3)/2, so a logit of 3 * ln(3)/2 capped at 3 is 3/2, and of scale 1/2 times its double the same.
    logits = matrix([0.0, 3 * math.log(3)]).requires_grad_()
    logps = token_logps(logits, torch.tensor([1]), scale=0.5, softcap=3.0)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    p = 1 / (1 + math.exp(-1.5))
    torch.testing.assert_close(logps, torch.tensor([math.log(p)], dtype=F64))
    # d logp / d logit = (onehot - p) * scale * (1 - tanh^2): tanh is 0 and 1/2.
    torch.testing.assert_close(grad, matrix([-(1 - p) * 0.5, (1 - p) * 0.5 * (1 - 1 / 4)]))


def test_token_logps_is_log_softmax_and_cross_entropy():
    logits, labels = randn(2, 3, 7), torch.tensor([[6, 0, -100], [-100, 3, 3]])
    got, kept = token_logps(logits, labels), labels.clamp(min=0)
    torch.testing.assert_close(got, F.log_softmax(logits, -1).gather(-1, kept[..., None])[..., 0] * (labels >= 0))
    torch.testing.assert_close(got, -F.cross_entropy(logits.mT, labels, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_dtype_of_results(dtype):
    logits, labels = randn(4, 5, dtype=dtype).requires_grad_(), torch.tensor([0, 4, -100, 2])
    logps = token_logps(logits, labels)
    logps.sum().backward()
    assert logps.dtype == (F64 if dtype == F64 else torch.float32) and logits.grad.dtype == dtype
    # The arithmetic is not done in the half dtypes: only the rounding of the input remains.
    torch.testing.assert_close(logps, token_logps(logits.to(F64), labels).to(logps.dtype))


def test_ignored_rows_are_not_read():
    rows = matrix([NAN, NAN, NAN], [1.0, 2.0, 3.0], [INF, -INF, NAN]).requires_grad_()
    logps = token_logps(rows, torch.tensor([-100, 0, -100]), softcap=30.0)
    (grad,) = torch.autograd.grad(logps.sum(), rows)
    assert logps[0] == logps[2] == 0 and torch.isfinite(logps[1])
    assert grad[[0, 2]].count_nonzero() == 0 and grad[1].isfinite().all() and grad[1].count_nonzero() == 3
    logps = token_logps(rows, torch.tensor([2, 0, 2]), ignore_index=2)  # it may be a token
    assert logps[0] == logps[2] == 0 and torch.isfinite(logps[1])


@pytest.mark.parametrize("label, logit", [(-1, 0.0), (4, 0.0), (10**12, 0.0), (-(10**12), 0.0), (0, NAN), (2, NAN)])
def test_illegal_label_or_nan_logit_poisons_its_row_alone(label, logit):
    logits = randn(3, 4)
    logits[1, 2] = logit
    logits.requires_grad_()
    logps = token_logps(logits, torch.tensor([1, label, 2]))
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert logps.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(-1).tolist() == grad.isnan().any(-1).tolist() == [False, True, False]


def test_minus_infinity_is_probability_zero():
    logits = matrix([0.0, -INF, math.log(3)], [-INF, -INF, -INF], [0.0, -INF, 0.0]).requires_grad_()
    logps = token_logps(logits, torch.tensor([2, 0, 1]))
    (grad,) = torch.autograd.grad(logps[0], logits)
    torch.testing.assert_close(logps[0].item(), math.log(3 / 4))
    torch.testing.assert_close(grad[0], torch.tensor([-1 / 4, 0, 1 / 4], dtype=F64))
    assert logps[1].isnan() and logps[2] == -INF


def test_minus_infinity_under_a_softcap_is_minus_softcap():
    logits = matrix([0.0, -INF]).requires_grad_()
    logps = token_logps(logits, torch.tensor([0]), softcap=2.0)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(logps.item(), -math.log(1 + math.exp(-2)))
    assert grad[0, 1] == 0 and grad.isfinite().all()


def test_large_rows_keep_their_digits_in_float32():
    # A log-sum-exp near 1e4 has an ulp of 1e-3 in float32; logp is small and must not be formed from it.
    logits, labels = randn(8, 16, dtype=torch.float32) + 1e4, torch.arange(8)
    torch.testing.assert_close(token_logps(logits, labels), token_logps(logits.double(), labels).float())


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shapes", [[(3, 4)], [(3, 2), (4, 2), (4,)]], ids=["logits", "hidden"])
def test_token_derivatives(shapes, softcap):
    labels = torch.tensor([3, -100, 0])

    def function(x, weight=None, bias=None):
        if weight is None:
            return token_logps(x, labels, scale=0.7, softcap=softcap)
        return linear_token_logps(x, weight, labels, bias=bias, scale=0.7, softcap=softcap)

    inputs = [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_linear_token_logps_is_token_logps_of_the_logits():
    hidden, weight, bias = randn(3, 4), randn(5, 4, seed=1), randn(5, seed=2)
    hidden[1] = NAN
    labels, options = torch.tensor([4, -100, 0]), {"scale": 0.5, "softcap": 3.0}
    inputs = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    got = linear_token_logps(hidden, weight, labels, bias=bias, **options)
    torch.testing.assert_close(got, token_logps(hidden @ weight.T + bias, labels, **options))
    grads = torch.autograd.grad(got.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads) and grads[0][1].count_nonzero() == 0
