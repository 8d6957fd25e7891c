"""nca_kernels.drop_in: TRL's selective log-softmax and verl's linear_cross_entropy, where they differ from our own functions."""

import math
import re

import pytest
import torch
from oracle import assert_no_worse
from torch._subclasses import FakeTensorMode

import nca_kernels
from nca_kernels import drop_in

pytestmark = pytest.mark.usefixtures("default_dispatch")
V = 33
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _problem(dtype=torch.float32):
    torch.manual_seed(9)
    return torch.randn(2, 5, V).to(dtype), torch.randint(V, (2, 5)), torch.rand(2, 5) < 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"entropy_requires_grad": False}, {"row_mask": True}], ids=str)
def test_log_probs_and_entropy_are_trls(dtype, options):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    logits, index, mask = _problem(dtype)
    options = {name: mask if name == "row_mask" else value for name, value in options.items()}
    ours = drop_in.selective_log_softmax_and_entropy(logits, index, **options)
    theirs = utils.selective_log_softmax_and_entropy(logits, index, **options)
    truth = utils.selective_log_softmax_and_entropy(logits.double(), index, **options)
    for value, peer, exact in zip(ours, theirs, truth, strict=True):
        assert value.dtype == peer.dtype and value.shape == peer.shape
        assert_no_worse(value, exact, peer, max(1e-6, torch.finfo(dtype).eps / 2))


def test_what_has_a_gradient():
    logits, index, _ = _problem()
    leaf = logits.requires_grad_()
    assert all(values.requires_grad for values in drop_in.selective_log_softmax_and_entropy(leaf, index))
    logps, entropy = drop_in.selective_log_softmax_and_entropy(leaf, index, entropy_requires_grad=False)
    assert logps.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_ids_have_a_graph(dtype):
    logits = _problem(dtype)[0].requires_grad_()
    for index in (torch.zeros(2, 5, 0, dtype=torch.int64), torch.zeros(2, 5, 0, dtype=torch.int32)):
        result = drop_in.selective_log_softmax(logits, index)
        assert result.shape == (2, 5, 0) and result.dtype == dtype
        (grad,) = torch.autograd.grad(result.sum(), logits)
        assert grad.shape == logits.shape and (grad == 0).all()


@pytest.mark.parametrize("function", [drop_in.selective_log_softmax, drop_in.selective_log_softmax_and_entropy])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_temperature_may_be_a_tensor(function, dtype):
    logits, index, _ = _problem(dtype)
    results = [function(logits, index, temperature=t) for t in (0.75, torch.tensor(0.75), torch.tensor([0.75], dtype=dtype))]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    tol = 2 * torch.finfo(dtype).eps
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=2 * tol, atol=2 * tol)


def test_a_temperature_may_be_learned():
    logits, index, _ = _problem(torch.float64)
    leaf, t = logits.requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def plain(x, t):
        return (x / t).log_softmax(-1).gather(-1, index[..., None]).sum()

    ours = torch.autograd.grad(drop_in.selective_log_softmax(leaf, index, temperature=t).sum(), (leaf, t))
    assert all(torch.allclose(a, b) for a, b in zip(ours, torch.autograd.grad(plain(leaf, t), (leaf, t)), strict=True))
    single = leaf.detach().float().requires_grad_(), t.detach().float().requires_grad_()
    ours = torch.autograd.grad(drop_in.selective_log_softmax(single[0], index, temperature=single[1]).sum(), single)
    wanted = torch.autograd.grad(plain(leaf, t), (leaf, t))
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.filterwarnings("ignore:nca_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_a_gpu_is_float32(dtype):
    """On a GPU the dtype is float32, as in TRL's kernel, because sums of rounded log-probs are inexact. No GPU is needed here."""
    with FakeTensorMode():
        logits = torch.empty(2, 5, V, dtype=dtype, device="cuda")
        index = torch.empty(2, 5, dtype=torch.int64, device="cuda")
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert drop_in.selective_log_softmax(logits, index).dtype == wanted


LOGITS, INDEX = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], INDEX), TypeError, "logits: got list"),
        ((LOGITS[0, 0], INDEX[0, 0]), ValueError, "logits: got shape [5], wanted [..., V]"),
        ((LOGITS, INDEX.float()), TypeError, "index: got a tensor of torch.float32, wanted a tensor of int64 or int32"),
        ((LOGITS, INDEX[:1]), ValueError, "index: got shape [1, 3], wanted [2, 3]"),
        ((LOGITS, INDEX.to("meta")), ValueError, "index: on meta, wanted cpu, where logits is"),
        ((LOGITS, INDEX + 5), IndexError, "index: the id 5 at flat position 0 is not in [0, 5)"),
        ((LOGITS, INDEX - 100), IndexError, "index: the id -100 at flat position 0 is not in [0, 5)"),
        ((LOGITS, INDEX, {"temperature": 0.0}), ValueError, "temperature: got 0.0, wanted a finite number > 0"),
        ((LOGITS, INDEX, {"temperature": torch.tensor(-1.0)}), ValueError, "temperature: got -1.0"),
        ((LOGITS, INDEX, {"temperature": torch.ones(2)}), ValueError, "temperature: got shape [2], wanted a number or one"),
        ((LOGITS, INDEX, {"row_mask": [True]}), TypeError, "row_mask: got list, wanted a tensor"),
        ((LOGITS, INDEX, {"row_mask": INDEX[:1]}), ValueError, "row_mask: got shape [1, 3], wanted [2, 3]"),
    ],
)
@pytest.mark.parametrize("function", [drop_in.selective_log_softmax, drop_in.selective_log_softmax_and_entropy])
def test_bad_input_of_trls(function, arguments, error, message):
    options = arguments[2] if len(arguments) == 3 else {}
    with pytest.raises(error, match=re.escape(message)) as raised:
        function(*arguments[:2], **options)
    assert "labels" not in str(raised.value) and "ignore_index" not in str(raised.value)


def test_masked_ids_are_not_looked_at():
    index = torch.tensor([[-100, 1, 2], [3, 7, 4]])
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    logps, entropy = drop_in.selective_log_softmax_and_entropy(LOGITS, index, row_mask=mask)
    assert (logps[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all() and (logps[mask == 1] < 0).all()


HIDDEN, WEIGHT, LABELS = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((HIDDEN, WEIGHT, LABELS, 1.0, "max"), ValueError, "reduction: got 'max', wanted one of 'none', 'sum', 'mean'"),
        ((HIDDEN, WEIGHT, LABELS, 0.0), ValueError, "temperature: got 0.0"),
        ((HIDDEN, WEIGHT, LABELS[:1]), ValueError, "labels: got shape [1, 3] with hidden of [2, 3, 4]"),
        ((HIDDEN, WEIGHT[:, :3], LABELS), ValueError, "weight: got shape [5, 3], wanted [V, 4]"),
        ((HIDDEN, WEIGHT, LABELS - 100), IndexError, "labels: the label -100"),
        (([1.0], WEIGHT, LABELS), TypeError, "hidden: got list"),
        ((HIDDEN, WEIGHT, [0]), TypeError, "labels: got list"),
        ((HIDDEN, WEIGHT, LABELS, 1.0, "none", "tp"), TypeError, "tp_group: got str, wanted a process group"),
    ],
)
def test_bad_input_of_verls(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        drop_in.linear_cross_entropy(*arguments)


def test_reductions_and_shapes():
    each, entropy = drop_in.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, 1.5)
    assert each.shape == entropy.shape == (6,) and (each < 0).all()
    wanted = (HIDDEN.view(6, 4) @ WEIGHT.T / 1.5).log_softmax(-1)[:, 0]
    assert torch.allclose(each, wanted, atol=1e-6)
    for reduction in ("sum", "mean"):
        reduced, same = drop_in.linear_cross_entropy(HIDDEN, WEIGHT, LABELS.int(), 1.5, reduction)
        assert reduced.shape == () and torch.equal(reduced, getattr(each, reduction)()) and torch.equal(same, entropy)
    assert math.isclose(
        entropy[0].item(), nca_kernels.token_stats(HIDDEN @ WEIGHT.T / 1.5, LABELS).entropy[0, 0].item(), rel_tol=1e-5
    )
