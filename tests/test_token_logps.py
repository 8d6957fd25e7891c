"""token_logps, sequence_logps and selective_log_softmax: values and gradients against float64, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_no_worse, plain_token_logps, value_and_grad

import nca_kernels
from nca_kernels import _compat
from nca_kernels.segments import sequence_sums

TOL = 1e-6  # beside the yardstick: a few float32 ulp, since peers round differently, not better

# Why each: a single class; two; just below and above a vector; a power-of-two's neighbour; the usual and odd vocabularies
# of real models (Llama 2, GPT-2, Llama 3, Qwen, Gemma), whose rows are 2-byte aligned only when the row stride is odd.
VOCABS = [1, 2, 31, 33, 1000, 4097, 32000, 50257, 128256, 151936, 262144]


def _rows(V, interpreted):
    """Few rows if they are long, and even fewer in the interpreter."""
    return 2 if V > 4096 or interpreted else 7


def _check(target, logits, labels, dtype, tol=TOL, **options):
    upstream = torch.randn(labels.shape)
    truth = value_and_grad(lambda x: plain_token_logps(x, labels, compute=torch.float64, **options), logits, upstream)
    peer = value_and_grad(lambda x: plain_token_logps(x, labels, **options), logits, upstream)
    ours = value_and_grad(
        lambda x: nca_kernels.token_logps(x, labels.to(target.device), backend=target.name, **options),
        logits.to(target.device),
        upstream.to(target.device),
    )
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    # The gradient is rounded to the logits' dtype once: half an ulp of it beside the yardstick's own error.
    assert_no_worse(ours[0], truth[0], peer[0], tol, "logps")
    assert_no_worse(ours[1], truth[1], peer[1], max(tol, torch.finfo(dtype).eps / 2), "dlogits")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("V", VOCABS)
def test_values_and_gradients(target, V, dtype):
    if target.interpreted and V > 50257 and dtype != torch.bfloat16:
        pytest.skip("the interpreter is slow: the longest rows run there in bfloat16 only")
    torch.manual_seed(V)
    rows = _rows(V, target.interpreted)
    logits = (3 * torch.randn(2, rows, V)).to(dtype)
    labels = torch.randint(V, (2, rows))
    labels[0, 0], labels[0, 1], labels[1, 0] = 0, V - 1, -100
    _check(target, logits, labels, dtype)


@pytest.mark.parametrize("scale, softcap", [(0.5, None), (2.0, 5.0), (1.0, 30.0), (1.0, 0.25)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_and_softcap(target, dtype, scale, softcap):
    torch.manual_seed(0)
    logits = (8 * torch.randn(3, 4, 517)).to(dtype)  # 517: the tail's padded lanes must not become -softcap
    labels = torch.randint(517, (3, 4))
    labels[1, 2] = -100
    _check(target, logits, labels, dtype, scale=scale, softcap=softcap)


@pytest.mark.parametrize(
    "function", [nca_kernels.token_logps, nca_kernels.token_stats, nca_kernels.linear_token_logps, nca_kernels.linear_token_stats]
)
def test_a_temperature_beside_a_softcap(function):
    """The softcap belongs to the model and comes first: the documented arguments give ``c tanh(z / c) / t``."""
    assert "scale = 1 / t, softcap = c / t" in nca_kernels.token_logps.__doc__, "the other functions refer to it"
    t, c, hidden, weight = 0.5, 3.0, 4 * torch.eye(7), 2 * torch.randn(7, 7)
    logits, labels = hidden @ weight.T, torch.randint(7, (7,))
    wanted = (c * (logits / c).tanh() / t).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    inputs = (hidden, weight) if function.__name__.startswith("linear") else (logits,)
    ours = function(*inputs, labels, scale=1 / t, softcap=c / t)
    torch.testing.assert_close(getattr(ours, "logps", ours), wanted)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_large_logits(target, dtype):
    """With rows scaled by 1e4, a float32 log-sum-exp is off by 1e-3, but a separate maximum and sum are exact."""
    torch.manual_seed(1)
    logits = (1e4 * torch.randn(2, 3, 999).clamp(-6, 6)).to(dtype)
    _check(target, logits, logits.argmax(-1), dtype)
    _check(target, logits, torch.randint(999, (2, 3)), dtype)


def test_close_calls_at_large_logits(target):
    """The two top logits are close together at 1e4, so that the probabilities depend on the last bits."""
    logits = torch.full((1, 4, 130), -1e4)
    logits[0, :, 64] = 1e4
    logits[0, :, 7] = 1e4 + torch.tensor([0.0, 0.5, 1.0, -2.0])
    _check(target, logits, torch.tensor([[7, 7, 64, 64]]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_near_the_largest_numbers(target, dtype):
    """Masks use such logits: their products with log2(e) overflow, and their differences do not."""
    least, most = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits = torch.full((1, 6, 3000), least, dtype=dtype)
    logits[0, 1, 5] = 3.0
    logits[0, 2, 5] = most
    logits[0, 3] = torch.linspace(1e9, 1e12, 3000).to(dtype)
    logits[0, 4] = -torch.linspace(1e7, 1e8, 3000).to(dtype)
    logits[0, 5] = -most / 2
    _check(target, logits, torch.tensor([[7, 5, 5, 2999, 0, 2]]), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("offset", [-60.0, 0.0, 60.0])
def test_all_of_one_sign(target, dtype, offset):
    """A kernel may compare 16-bit numbers by their bits, which fall as negative numbers grow."""
    torch.manual_seed(11)
    logits = (torch.rand(2, 3, 2100) * torch.tensor([1.0, 20.0])[:, None, None] + offset - 20 * (offset < 0)).to(dtype)
    _check(target, logits, logits.argmax(-1), dtype, scale=0.7)


def test_equal_logits(target):
    """In a row of equal logits every probability is exactly 1 / V."""
    logits = torch.full((1, 2, 4096), 3.25, device=target.device, requires_grad=True)
    labels = torch.tensor([[5, 4095]], device=target.device)
    logps = nca_kernels.token_logps(logits, labels, backend=target.name)
    assert torch.allclose(logps, torch.full_like(logps, -math.log(4096)), rtol=1e-7, atol=0)


def test_confident_label_in_bfloat16(target):
    """Near p = 1 the gradient p - 1 is computed before rounding: in bfloat16, rounding p first is 20% off at p = 0.99."""
    logits = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    logits[0, 0, 1] = 4.59375
    logits = logits.to(target.device).requires_grad_()
    nca_kernels.token_logps(logits, torch.tensor([[1]], device=target.device), backend=target.name).sum().backward()
    exact = 1 / (1 + math.exp(4.59375))
    assert logits.grad[0, 0, 1].item() == pytest.approx(exact, rel=2**-8)
    assert logits.grad[0, 0, 0].item() == pytest.approx(-exact, rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minus_infinity_is_legal(target, dtype):
    torch.manual_seed(2)
    logits = torch.randn(2, 3, 300, dtype=dtype)
    logits[..., 40:290] = -math.inf
    logits[1, 0, :299] = -math.inf  # one finite logit left: log-prob 0
    labels = torch.tensor([[0, 39, 292], [299, 295, 50]])  # the last label is masked itself: -inf
    _check(target, logits, labels, dtype)
    _check(target, logits, torch.full_like(labels, 299), dtype, softcap=4.0)


def test_minus_infinity_in_a_whole_leading_block(target):
    """The first thousands of columns are not finite: the running maximum is -inf there and must not give NaN."""
    logits = torch.full((1, 2, 20000), -math.inf)
    logits[..., -3:] = torch.tensor([1.0, 2.0, 3.0])
    _check(target, logits, torch.tensor([[19999, 19997]]), torch.float32)


def test_nan_stays_in_its_row(target):
    torch.manual_seed(3)
    logits = torch.randn(1, 5, 4099, device=target.device)
    clean = logits.clone()
    logits[0, 1, 4098] = math.nan
    logits[0, 2, 0] = math.nan
    logits[0, 3] = -math.inf  # nothing left to be the label: NaN, as in log_softmax
    labels = torch.randint(4099, (1, 5), device=target.device)
    bad = torch.tensor([False, True, True, True, False], device=target.device)
    for rows, wanted in ((logits, True), (clean, False)):
        leaf = rows.clone().requires_grad_()
        logps = nca_kernels.token_logps(leaf, labels, backend=target.name)
        logps.sum().backward()
        assert torch.equal(torch.isnan(logps[0]), bad & wanted)
        assert torch.equal(torch.isnan(leaf.grad[0]).all(-1), bad & wanted)
        assert torch.equal(torch.isnan(leaf.grad[0]).any(-1), bad & wanted)


def test_ignored_rows_are_not_read(target):
    """Whatever the logits of ignored rows are, log-prob and gradient are 0."""
    logits = torch.randn(2, 4, 64, device=target.device)
    logits[0, 1:], logits[1, :2] = math.nan, math.inf
    labels = torch.full((2, 4), -100, device=target.device)
    labels[0, 0], labels[1, 2], labels[1, 3] = 3, 63, 0
    leaf = logits.requires_grad_()
    logps = nca_kernels.token_logps(leaf, labels, backend=target.name)
    logps.sum().backward()
    ignored = labels == -100
    assert (logps[ignored] == 0).all() and (leaf.grad[ignored] == 0).all()
    assert torch.isfinite(leaf.grad).all() and (logps[~ignored] < 0).all()


def test_ignore_index_is_free(target):
    logits = torch.randn(1, 3, 8, device=target.device)
    labels = torch.tensor([[2, 5, 2]], device=target.device)
    logps = nca_kernels.token_logps(logits, labels, ignore_index=2, backend=target.name)
    assert logps[0, 0] == 0 and logps[0, 2] == 0 and logps[0, 1] < 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_row_stride(target, dtype):
    """Slices of larger tensors with odd strides and odd offsets, as ``logits[:, :-1]`` and similar views have them."""
    torch.manual_seed(4)
    V = 515
    store = torch.randn(4, 4, V + 2).to(dtype).to(target.device)
    for view in (store[:3, :-1, :V], store[1::2, 1:3, 1 : V + 1], store[:3, ::3, 2:], store.transpose(0, 1)[:2, :, 1:]):
        labels = torch.randint(view.shape[-1], view.shape[:2], device=target.device)
        options = {"backend": target.name}
        upstream = torch.randn(labels.shape, device=target.device)
        ours = value_and_grad(lambda x: nca_kernels.token_logps(x, labels, **options), view.contiguous(), upstream)  # noqa: B023
        leaf = store.clone().requires_grad_()
        offset = view.storage_offset()
        value = nca_kernels.token_logps(leaf.as_strided(view.shape, view.stride(), offset), labels, **options)
        (grad,) = torch.autograd.grad(value, leaf, upstream)
        assert torch.allclose(value, ours[0], rtol=1e-6, atol=1e-6)
        dlogits = grad.as_strided(view.shape, view.stride(), offset)
        rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert torch.allclose(dlogits.float(), ours[1].float(), rtol=rtol, atol=1e-6)


def test_odd_label_offsets(target):
    """int64 labels may not be 16-byte aligned, and some compilers load such labels wrongly."""
    store = torch.randint(50, (41,), device=target.device)
    logits = torch.randn(4, 10, 50, device=target.device)
    wanted = nca_kernels.token_logps(logits, store[1:].clone().view(4, 10), backend="torch")
    assert torch.allclose(nca_kernels.token_logps(logits, store[1:].view(4, 10), backend=target.name), wanted, rtol=1e-6, atol=1e-6)


def test_shift_scores_the_next_token_of_the_same_sequence(target):
    torch.manual_seed(5)
    logits = torch.randn(3, 6, 20, device=target.device)
    labels = torch.randint(20, (3, 6), device=target.device)
    for shift in (1, 2, 6, 9):
        ours = nca_kernels.token_logps(logits, labels, shift=shift, backend=target.name)
        assert ours.shape == (3, 6) and (ours[:, max(6 - shift, 0) :] == 0).all()
        if shift < 6:
            wanted = F.log_softmax(logits, -1)[:, :-shift].gather(-1, labels[:, shift:, None]).squeeze(-1)
            assert torch.allclose(ours[:, :-shift], wanted, atol=1e-5)


def test_two_and_more_dimensions(target):
    logits = torch.randn(2, 3, 4, 16, device=target.device)
    labels = torch.randint(16, (2, 3, 4), device=target.device)
    deep = nca_kernels.token_logps(logits, labels, backend=target.name)
    flat = nca_kernels.token_logps(logits.view(24, 16), labels.view(24), backend=target.name)
    assert deep.shape == (2, 3, 4) and torch.equal(deep.flatten(), flat)


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (0, 7), (2, 2, 0, 5)])
def test_empty_batches(target, shape):
    logits = torch.randn(shape, device=target.device, requires_grad=True)
    labels = torch.empty(shape[:-1], dtype=torch.int64, device=target.device)
    logps = nca_kernels.token_logps(logits, labels, backend=target.name)
    logps.sum().backward()
    assert logps.shape == shape[:-1] and logits.grad.shape == shape


def test_sequence_logps(target):
    torch.manual_seed(6)
    logits = torch.randn(3, 5, 40, device=target.device)
    labels = torch.randint(40, (3, 5), device=target.device)
    labels[0, :2], labels[2] = -100, -100
    tokens = nca_kernels.token_logps(logits, labels, shift=1, backend=target.name)
    counts = torch.tensor([3, 4, 0], device=target.device)
    sums = nca_kernels.sequence_logps(logits, labels, shift=1, backend=target.name)
    averages = nca_kernels.sequence_logps(logits, labels, shift=1, average=True, backend=target.name)
    assert torch.allclose(sums, tokens.sum(-1)) and torch.allclose(averages, sums / counts.clamp(min=1))
    assert averages[2] == 0


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64])
def test_packed_sequences_equal_separate_ones(target, bounds_dtype):
    """Sequences, one of them empty, are packed in one row; ``shift`` must not cross a boundary."""
    torch.manual_seed(7)
    lengths = [4, 0, 1, 7]
    bounds = torch.tensor([0, 4, 4, 5, 12], dtype=bounds_dtype, device=target.device)
    logits = torch.randn(12, 30, device=target.device, requires_grad=True)
    labels = torch.randint(30, (12,), device=target.device)
    labels[7] = -100
    for shape in ((12,), (1, 12)):
        for average in (False, True):
            options = {"shift": 1, "average": average, "backend": target.name}
            packed = nca_kernels.sequence_logps(logits.view(*shape, 30), labels.view(shape), cu_seqlens=bounds, **options)
            apart = [
                nca_kernels.sequence_logps(x[None], y[None], **options)[0]
                for x, y in zip(logits.split(lengths), labels.split(lengths), strict=True)
            ]
            weights = torch.randn(4, device=target.device)
            assert torch.allclose(packed, torch.stack(apart), atol=1e-6)
            ours = torch.autograd.grad((packed * weights).sum(), logits)[0]
            wanted = torch.autograd.grad((torch.stack(apart) * weights).sum(), logits)[0]
            assert torch.allclose(ours, wanted, atol=1e-6)


def test_packed_sums_of_many_tokens_keep_their_digits():
    """Adding 8192 tokens in order in float32 is off by ten ulp or more."""
    torch.manual_seed(10)
    logps = -12 * torch.rand(3 * 8192)
    bounds = torch.tensor([0, 8192, 3 * 8192])
    truth = torch.stack([part.double().sum() for part in logps.split([8192, 2 * 8192])])
    assert ((sequence_sums(logps, bounds) - truth).abs() <= 2**-24 * truth.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inplace_backward_writes_into_the_logits(kernels, dtype):
    torch.manual_seed(8)
    store = torch.randn(2, 5, 700).to(dtype).to(kernels.device)
    labels = torch.randint(700, (2, 4), device=kernels.device)
    labels[0, 3] = -100
    upstream = torch.randn(2, 4, device=kernels.device)
    _, wanted = value_and_grad(lambda x: nca_kernels.token_logps(x[:, :-1], labels, backend=kernels.name), store, upstream)
    leaf = store.clone().requires_grad_()
    logits = leaf * 1  # what a model's head would have computed
    logps = nca_kernels.token_logps(logits[:, :-1], labels, inplace_backward=True, backend=kernels.name)
    (grad,) = torch.autograd.grad(logps, leaf, upstream)
    assert torch.equal(grad, wanted)
    # PyTorch before 2.8 does not tell who else reads the logits.
    assert torch.equal(logits[:, :-1], wanted[:, :-1]) == _compat.counts_storage_users, "the gradient is not where the logits were"


def test_selective_log_softmax_is_trls(default_dispatch):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    torch.manual_seed(9)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(2, 5, 33, dtype=dtype)
        for index in (torch.randint(33, (2, 5)), torch.randint(33, (2, 5, 3))):
            mask = torch.rand(index.shape) < 0.5
            for options in ({}, {"temperature": 0.7}, {"row_mask": mask} if index.ndim == 2 else {}):
                ours = nca_kernels.selective_log_softmax(logits, index, **options)
                theirs = utils.selective_log_softmax(logits, index, **options)
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                truth = utils.selective_log_softmax(logits.double(), index, **options)
                assert_no_worse(ours, truth, theirs, max(TOL, torch.finfo(dtype).eps / 2))
            none = torch.randint(33, (2, 5, 0))
            assert nca_kernels.selective_log_softmax(logits, none).shape == (2, 5, 0)
    with pytest.raises(IndexError, match=r"index: the id -100 at flat position 0 is not in \[0, 33\)"):
        nca_kernels.selective_log_softmax(logits, torch.full((2, 5), -100))
