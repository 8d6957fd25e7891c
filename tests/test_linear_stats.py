"""linear_token_stats, and logits in float32: values and all gradients against float64, in every case and tiling."""

import math
from collections import Counter

import pytest
import torch

import nca_kernels
from bench.memory import MIB, peak_extra

OPS = torch.ops.nca_kernels
D = 24
CASES = {"none": (0, 0, 0), "frozen": (1, 0, 0), "weight": (0, 1, 0), "trained": (1, 1, 1)}
cases = pytest.mark.parametrize("needs", CASES.values(), ids=CASES)
gradient_cases = pytest.mark.parametrize("needs", list(CASES.values())[1:], ids=list(CASES)[1:])
tilings = pytest.mark.parametrize("tile_bytes", [2048, 20000, 10**7])
OUTPUTS = ("logps", "entropy", "lse")


def _problem(target, dtype=torch.float32):
    torch.manual_seed(0)
    (N, T), V = ((2, 5), 131) if target.interpreted else ((3, 41), 517)
    hidden, weight, bias = torch.randn(N, T, D), 0.4 * torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, (N, T))
    labels[0, :3] = -100
    labels[1] = (hidden[1] @ weight.T + bias).argmax(-1)  # so that top1 is not always False
    return *(t.to(dtype) for t in (hidden, weight, bias)), labels


def _run(problem, needs, dtype, device="cpu", upstream=OUTPUTS, **options):
    """The statistics, and the gradients of the inputs that need one, from the outputs named in ``upstream``."""
    *tensors, labels = problem
    leaves = [t.to(device, dtype).clone().requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True)]
    hidden, weight, bias = leaves
    options = {"entropy_gradient": "entropy" in upstream, **options}
    stats = nca_kernels.linear_token_stats(hidden, weight, labels.to(device), bias=bias, **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanted:
        return stats, []
    factors = {name: torch.linspace(-1, 2 + i, labels.numel()).view(labels.shape) for i, name in enumerate(OUTPUTS)}
    total = sum((getattr(stats, name) * factors[name].to(stats.logps)).sum() for name in upstream)
    return stats, list(torch.autograd.grad(total, wanted))


def _rms(error):
    return error.double().square().mean().sqrt().item()


def _check(target, dtype, needs, problem=None, upstream=OUTPUTS, peer_dtype=None, **options):
    """Errors over a tensor are at most those of same-dtype PyTorch; single entries differ with the order of sums."""
    problem = problem or _problem(target, dtype)
    wide = {name: value for name, value in options.items() if name not in ("logits_dtype", "save_budget")}
    truth, true_grads = _run(problem, needs, torch.float64, upstream=upstream, backend="torch", **wide)
    peer, peer_grads = _run(problem, needs, dtype, target.device, upstream, backend="torch", **wide)
    ours, our_grads = _run(problem, needs, dtype, target.device, upstream, backend=target.name, **options)
    for name, mine, exact, others in zip(truth._fields[:3], ours, truth, peer, strict=False):
        assert mine.dtype == torch.float32 and mine.shape == exact.shape
        eps = 2.0**-23 * (4 if target.interpreted else 1)
        assert _rms(mine.cpu() - exact) <= 1.5 * _rms(others.cpu() - exact) + eps * (1 + _rms(exact)), name
    assert torch.equal(ours.top1, peer.top1) or dtype != torch.float32
    for mine, exact, others in zip(our_grads, true_grads, peer_grads, strict=True):
        assert mine.dtype == dtype
        eps = torch.finfo(dtype).eps
        assert _rms(mine.cpu() - exact) <= 1.2 * _rms(others.cpu() - exact) + eps / 2 * _rms(exact)


@cases
@tilings
def test_values_and_gradients(kernels, monkeypatch, tile_bytes, needs):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    _check(kernels, torch.float32, needs)
    _check(kernels, torch.float32, needs, scale=0.5, softcap=4.0, shift=1)
    _check(kernels, torch.bfloat16, needs)


@gradient_cases
@pytest.mark.parametrize("upstream", [("logps",), ("lse",), ("entropy",), ("logps", "lse")], ids="-".join)
def test_each_output_alone(kernels, monkeypatch, upstream, needs):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", "20000")
    _check(kernels, torch.float32, needs, upstream=upstream)
    _check(kernels, torch.float16, needs, upstream=upstream, softcap=9.0)


@gradient_cases
def test_lse_is_target_minus_logp(kernels, needs):
    stats, _ = _run(_problem(kernels), needs, torch.float32, kernels.device, backend=kernels.name)
    hidden, weight, bias, labels = _problem(kernels)
    at_label = (hidden * weight[labels.clamp(min=0)]).sum(-1) + bias[labels.clamp(min=0)]
    wanted = (at_label - stats.logps.cpu()).masked_fill(labels == -100, 0.0)
    torch.testing.assert_close(stats.lse.cpu(), wanted, rtol=1e-5, atol=1e-5)


@gradient_cases
@pytest.mark.parametrize("tile_bytes", [2048, 10**7])
def test_columns_of_minus_infinity_and_likely_labels(kernels, monkeypatch, tile_bytes, needs):
    """Whole slices without probability add no entropy and no gradient, and never 0 * inf."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    hidden, weight, bias, labels = _problem(kernels)
    bias[:70], bias[-5:] = -math.inf, -math.inf
    labels = torch.where(labels == -100, labels, 70 + labels % (len(bias) - 75))
    hidden = hidden + 4 * weight[labels.clamp(min=0)]
    _check(kernels, torch.float32, needs, (hidden, weight, bias, labels))


@gradient_cases
def test_nan_and_ignored_rows(kernels, monkeypatch, needs):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", "20000")
    hidden, weight, bias, labels = _problem(kernels)
    clean, clean_grads = _run((hidden, weight, bias, labels), needs, torch.float32, kernels.device, backend=kernels.name)
    hidden[1, 2] = math.nan
    hidden[0, :2] = math.nan  # ignored
    stats, grads = _run((hidden, weight, bias, labels), needs, torch.float32, kernels.device, backend=kernels.name)
    assert all(getattr(stats, name)[1, 2].isnan() for name in OUTPUTS) and not stats.top1[1, 2]
    assert all((value[0, :3] == 0).all() for value in stats)
    other = torch.ones_like(stats.top1)
    other[1, 2] = False
    assert all(torch.equal(a[other], b[other]) for a, b in zip(stats, clean, strict=True))
    if needs[0]:
        assert grads[0][1, 2].isnan().all() and torch.equal(grads[0][other], clean_grads[0][other])


def test_entropy_is_detached_unless_asked_for(kernels):
    *tensors, labels = (t.to(kernels.device) for t in _problem(kernels))
    hidden, weight, bias = (t.requires_grad_() for t in tensors)
    for gradient in (False, True):
        stats = nca_kernels.linear_token_stats(hidden, weight, labels, bias=bias, entropy_gradient=gradient, backend=kernels.name)
        assert stats.entropy.requires_grad == gradient
        assert stats.logps.requires_grad and stats.lse.requires_grad and not stats.top1.requires_grad


def test_log_probs_are_those_of_linear_token_logps(kernels):
    problem = _problem(kernels, torch.bfloat16)
    *tensors, labels = (t.to(kernels.device) for t in problem)
    hidden, weight, bias = tensors
    stats = nca_kernels.linear_token_stats(hidden, weight, labels, bias=bias, backend=kernels.name)
    logps = nca_kernels.linear_token_logps(hidden, weight, labels, bias=bias, backend=kernels.name)
    torch.testing.assert_close(stats.logps, logps, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "needs, entropy_gradient, gemms",
    [((0, 0, 0), False, 1), ((1, 0, 0), False, 2), ((1, 0, 0), True, 3), ((1, 1, 0), False, 4), ((1, 1, 0), True, 4)],
)
def test_gemms(needs, entropy_gradient, gemms):
    """lse costs no GEMM; an entropy with a gradient costs one if the head is frozen."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D, requires_grad=bool(need)) for n, need in zip((8, 100), needs, strict=False))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stats = nca_kernels.linear_token_stats(hidden, weight, torch.arange(8), entropy_gradient=entropy_gradient, backend="cpu")
        if any(needs):
            (stats.logps + stats.lse + stats.entropy).sum().backward()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    assert counts["aten::mm"] + counts["aten::addmm"] == gemms


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_save_budget_changes_no_number(kernels, share):
    problem = _problem(kernels)
    budget = int(share * problem[3].numel() * len(problem[1]) * 4)
    _check(kernels, torch.float32, CASES["trained"], problem, save_budget=budget)


@pytest.mark.parametrize("mode, entropy_gradient", [("none", False), ("frozen", False), ("frozen", True), ("trained", True)])
def test_opcheck(kernels, mode, entropy_gradient):
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(kernels))
    hidden, weight, bias, labels = hidden[1, :5], weight[:128], bias[:128], labels[1, :5] % 128
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip((hidden, weight, bias), CASES[mode], strict=True)]
    settings = (-100, 0.5, 3.0, kernels.name, hidden.dtype, 0, len(weight), "", mode, 5 * len(weight) * 4, 0.0)
    torch.library.opcheck(OPS.linear_token_stats, (*leaves, labels, entropy_gradient, *settings))


@gradient_cases
def test_compiles_to_one_graph(kernels, needs, monkeypatch):
    if kernels.interpreted:
        pytest.skip("the compiled graph calls the same operator: one backend on the CPU shows it")
    problem = _problem(kernels)
    eager, eager_grads = _run(problem, needs, torch.float32, kernels.device, backend=kernels.name)
    torch._dynamo.reset()
    monkeypatch.setattr(nca_kernels, "linear_token_stats", torch.compile(nca_kernels.linear_token_stats, fullgraph=True))
    ours, our_grads = _run(problem, needs, torch.float32, kernels.device, backend=kernels.name)
    for a, b in zip((*ours, *our_grads), (*eager, *eager_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_second_derivatives_are_refused(kernels):
    hidden, weight, _, labels = (t.to(kernels.device) for t in _problem(kernels))
    lse = nca_kernels.linear_token_stats(hidden.requires_grad_(), weight, labels, backend=kernels.name).lse
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        torch.autograd.grad(lse.sum(), hidden, create_graph=True)


# --- logits in float32 -----------------------------------------------------------------------------------------------


# Each two of dtype, tile and case once: the logits are float32 before they are cut into tiles, whatever they are made from.
FLOAT32_LOGITS = [
    ((torch.bfloat16, torch.float16)[(i + j) % 2], tile_bytes, needs)
    for i, tile_bytes in enumerate((2048, 20000, 10**7))
    for j, needs in enumerate(CASES.values())
]


@pytest.mark.parametrize("dtype, tile_bytes, needs", FLOAT32_LOGITS, ids=str)
def test_float32_logits(kernels, monkeypatch, dtype, tile_bytes, needs):
    """The log-prob of 16-bit inputs is right to 1e-5; gradients are no worse than those of PyTorch's own 16-bit products."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    hidden, weight, bias, labels = _problem(kernels)
    problem = tuple(t.to(dtype) for t in (2 * hidden, weight, bias)) + (labels,)
    truth, _ = _run(problem, CASES["none"], torch.float64, backend="torch")
    for backend in (kernels.name, "torch"):
        stats, _ = _run(problem, CASES["none"], dtype, kernels.device, backend=backend, logits_dtype=torch.float32)
        for ours, exact in zip(stats[:3], truth, strict=False):
            assert (ours.cpu() - exact).abs().max() <= 1e-5
    _check(kernels, dtype, needs, problem, logits_dtype=torch.float32)


@pytest.mark.parametrize("function", [nca_kernels.linear_token_logps, nca_kernels.linear_sequence_logps])
@pytest.mark.parametrize("trained", [False, True])
def test_float32_logits_of_log_probs(kernels, function, trained):
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(kernels, torch.bfloat16))
    exact = function(hidden.double(), weight.double(), labels, bias=bias.double(), backend="torch")
    leaves = hidden.requires_grad_(), weight.requires_grad_(trained)
    budget = labels.numel() * len(weight) * 4
    logps = function(*leaves, labels, bias=bias, logits_dtype=torch.float32, save_budget=budget, backend=kernels.name)
    assert (logps.cpu() - exact.cpu()).abs().max() <= 1e-5 * (1 if logps.ndim > 1 else labels.shape[1])
    logps.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_logits_dtype_of_the_inputs_changes_nothing(kernels):
    hidden, weight, _, labels = (t.to(kernels.device) for t in _problem(kernels, torch.bfloat16))
    a, b = (
        nca_kernels.linear_token_logps(hidden, weight, labels, logits_dtype=dtype, backend=kernels.name)
        for dtype in (None, torch.bfloat16)
    )
    assert torch.equal(a, b)


def test_logits_dtype_is_checked():
    hidden, weight, labels = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    for dtype, bad, message in (
        (
            torch.bfloat16,
            torch.float16,
            "logits_dtype: got torch.float16 with hidden of torch.bfloat16, wanted None or torch.float32",
        ),
        (torch.float32, torch.bfloat16, "logits_dtype: got torch.bfloat16 with hidden of torch.float32"),
        (torch.float64, torch.float32, "logits_dtype: got torch.float32 with hidden of torch.float64, wanted None"),
        (torch.float32, "float32", "logits_dtype: got 'float32'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nca_kernels.linear_token_logps(hidden.to(dtype), weight.to(dtype), labels, logits_dtype=bad)


def test_float32_logits_make_no_float32_copy_of_the_head():
    M, V, width = 64, 16384, 512
    hidden, weight = torch.randn(M, width).bfloat16().requires_grad_(), torch.randn(V, width).bfloat16()
    labels = torch.randint(V, (M,))

    def call():
        nca_kernels.linear_token_logps(hidden, weight, labels, logits_dtype=torch.float32, backend="cpu").sum().backward()

    call()
    tile = M * V * 6  # the float32 logits and their 16-bit gradient
    pieces = 8 * MIB  # of the head in float32, at a time; the whole would be 32
    assert peak_extra(call, "cpu")[1] * MIB < tile + pieces + 6 * MIB
