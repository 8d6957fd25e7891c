"""linear_token_logps: values and all gradients against float64, in every case and tiling, and its memory."""

import math

import pytest
import torch
from oracle import DTYPES

import nca_kernels
from bench.memory import MIB, peak_extra
from nca_kernels import linear
from nca_kernels.tiles import ProductSum, split, tile_shape

OPS = torch.ops.nca_kernels
D = 24

# Which of hidden, weight and bias need a gradient.
NEEDS = {
    "none": (0, 0, 0),
    "hidden": (1, 0, 0),
    "weight": (0, 1, 0),
    "bias": (0, 0, 1),
    "hidden_weight": (1, 1, 0),
    "hidden_bias": (1, 0, 1),
    "all": (1, 1, 1),
}
MAIN = {"none": NEEDS["none"], "frozen": NEEDS["hidden"], "trained": NEEDS["all"]}
main_cases = pytest.mark.parametrize("needs", MAIN.values(), ids=MAIN)
gradient_cases = pytest.mark.parametrize("needs", list(MAIN.values())[1:], ids=list(MAIN)[1:])


def _problem(target, dtype=torch.float32):
    """Inputs with an odd vocabulary and an odd number of rows, some ignored; a small size in the slow interpreter."""
    torch.manual_seed(0)
    (N, T), V = ((2, 7), 131) if target.interpreted else ((3, 41), 517)
    hidden, weight, bias = torch.randn(N, T, D), 0.4 * torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, (N, T))
    labels[0, :3] = -100
    return *(t.to(dtype) for t in (hidden, weight, bias)), labels


def _run(problem, needs, dtype, device="cpu", order=slice(None), **options):
    """The log-probs, and the gradients of the inputs that need one; ``order`` is the order of the GEMM's sums."""
    *tensors, labels = problem
    leaves = [t.to(device, dtype).clone().requires_grad_(bool(n)) for t, n in zip(tensors, needs, strict=True)]
    hidden, weight, bias = leaves
    logps = nca_kernels.linear_token_logps(hidden[..., order], weight[:, order], labels.to(device), bias=bias, **options)
    upstream = torch.linspace(-1, 2, labels.numel()).view(labels.shape).to(logps)  # one of its own for every token
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return logps.detach(), *(torch.autograd.grad(logps, wanted, upstream) if wanted else ())


def _rms(errors):
    return errors.square().mean().sqrt().item()


def _check(target, dtype, needs, problem=None, save_budget=0, **options):
    """Errors are at most those of same-dtype PyTorch, plus the rounding of the result.

    Errors are compared over a tensor, not entry by entry: sums of hundreds of terms in another order have errors of the same size,
    but not the same errors. PyTorch with four orders of the GEMM's sums gives that size. On a GPU, where a tile and the whole use
    different GEMM kernels, four times as much is allowed: a CPU with a tile's sums in random order gave up to 2.6 times.
    """
    slack = 4 if target.device.type == "cuda" else 1
    problem = problem or _problem(target, dtype)
    truth = _run(problem, needs, torch.float64, backend="torch", **options)
    orders = [slice(None), *(torch.randperm(D) for _ in range(3))]
    peers = [_run(problem, needs, dtype, target.device, order, backend="torch", **options) for order in orders]
    ours = _run(problem, needs, dtype, target.device, backend=target.name, save_budget=save_budget, **options)
    for i, (a, exact, *others) in enumerate(zip(ours, truth, *peers, strict=True)):
        assert a.dtype == others[0].dtype and a.shape == others[0].shape
        eps = torch.finfo(a.dtype).eps
        error, *errors = ((x.cpu().double() - exact) for x in (a, *others))
        rms, largest = max(map(_rms, errors)), max(e.abs().max() for e in errors)
        assert _rms(error) <= slack * rms + eps * _rms(exact), f"result {i}: rms error {_rms(error):.3g}, peers {rms:.3g}"
        most = error.abs().max()
        assert most <= 2 * slack * largest + eps * exact.abs().max(), f"result {i}: largest error {most}, peers {largest}"


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(kernels, dtype, needs):
    _check(kernels, dtype, needs, shift=1)


def test_float16(kernels):
    _check(kernels, DTYPES["float16"], NEEDS["all"])


@gradient_cases
def test_scale_and_softcap(kernels, needs):
    _check(kernels, torch.float32, needs, scale=0.5, softcap=4.0)


@pytest.mark.parametrize("tile_bytes", [2048, 20000, 10**7])
@main_cases
def test_any_tile(kernels, monkeypatch, tile_bytes, needs):
    """Even and uneven blocks of rows and slices of the vocabulary, down to tiles of a few hundred numbers."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    _check(kernels, torch.float32, needs, softcap=6.0)
    _check(kernels, torch.bfloat16, needs)


@pytest.mark.parametrize("tile_bytes", [2048, 10**7])
@gradient_cases
def test_a_likely_label(kernels, monkeypatch, tile_bytes, needs):
    """With p >= 0.999 at the label, the remainder of ``onehot - p`` must not be lost in the rounding of p."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, bias, labels = _problem(kernels)
        hidden = hidden + 8 * weight[labels.clamp(min=0)]
        problem = (hidden.to(dtype), weight.to(dtype), torch.zeros_like(bias, dtype=dtype), labels)
        logps, *_ = _run(problem, NEEDS["none"], torch.float64, backend="torch")
        assert logps[labels != -100].median() > -1e-3
        _check(kernels, dtype, needs, problem)


@pytest.mark.parametrize("tile_bytes", [2048, 10**7])
@main_cases
def test_columns_of_minus_infinity(kernels, monkeypatch, tile_bytes, needs):
    """In a padded vocabulary, whole slices may have no finite logit, also the first slice."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    hidden, weight, bias, labels = _problem(kernels)
    bias[:70], bias[-5:] = -math.inf, -math.inf
    labels = torch.where(labels == -100, labels, 70 + labels % (len(bias) - 75))
    _check(kernels, torch.float32, needs, (hidden, weight, bias, labels))


@gradient_cases
def test_nan_stays_in_its_row(kernels, monkeypatch, needs):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", "20000")
    hidden, weight, bias, labels = _problem(kernels)
    clean = _run((hidden, weight, bias, labels), needs, torch.float32, kernels.device, backend=kernels.name)
    hidden[1, 2] = math.nan
    logps, dhidden, *_ = _run((hidden, weight, bias, labels), needs, torch.float32, kernels.device, backend=kernels.name)
    other = torch.ones_like(logps, dtype=torch.bool)
    other[1, 2] = False
    assert logps[1, 2].isnan() and dhidden[1, 2].isnan().all()
    assert torch.equal(logps[other], clean[0][other]) and torch.equal(dhidden[other], clean[1][other])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_save_budget_changes_no_number(kernels, monkeypatch, share):
    """A second backward gives the same numbers too, because the kept logits still exist."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", "20000")
    *tensors, labels = problem = _problem(kernels)
    budget = int(share * labels.numel() * len(tensors[1]) * 4)
    _check(kernels, torch.float32, NEEDS["all"], problem, save_budget=budget)
    leaves = [t.to(kernels.device).requires_grad_() for t in tensors]
    logps = nca_kernels.linear_token_logps(
        leaves[0], leaves[1], labels.to(kernels.device), bias=leaves[2], save_budget=budget, backend=kernels.name
    )
    first, second = (torch.autograd.grad(logps.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("captured", [(True, False), (False, True), (True, True)], ids=["forward", "backward", "both"])
def test_kept_logits_and_cuda_graphs(kernels, monkeypatch, captured):
    """A graph keeps all rows and a call outside of a graph only the labelled rows, so neither may use the other's logits."""
    *tensors, labels = _problem(kernels)
    leaves = [t.to(kernels.device).requires_grad_() for t in tensors]
    labels = labels.to(kernels.device)
    budget = labels.numel() * len(tensors[1]) * 4 // 2

    def gradients(*graph):
        with monkeypatch.context() as patch:
            patch.setattr(linear, "is_captured", lambda _: graph[0])
            logps = nca_kernels.linear_token_logps(
                leaves[0], leaves[1], labels, bias=leaves[2], save_budget=budget, backend=kernels.name
            )
            patch.setattr(linear, "is_captured", lambda _: graph[1])
            return torch.autograd.grad(logps.square().sum(), leaves)

    for ours, wanted in zip(gradients(*captured), gradients(False, False), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@gradient_cases
def test_no_row_is_labelled(kernels, needs):
    hidden, weight, bias, labels = _problem(kernels)
    for empty in ((hidden, weight, bias, torch.full_like(labels, -100)), (hidden[:0], weight, bias, labels[:0])):
        logps, *gradients = _run(empty, needs, torch.float32, kernels.device, backend=kernels.name)
        assert (logps == 0).all() and all((gradient == 0).all() for gradient in gradients)


@gradient_cases
def test_ignored_positions_may_hold_anything(kernels, needs):
    """NaN in the hidden states and in the upstream gradient of ignored positions has no effect."""
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(kernels))
    ignored = labels == -100
    hidden[ignored] = math.nan
    leaves = [t.requires_grad_(bool(n)) for t, n in zip((hidden, weight, bias), needs, strict=True)]
    logps = nca_kernels.linear_token_logps(*leaves[:2], labels, bias=leaves[2], backend=kernels.name)
    logps.backward(torch.where(ignored, math.nan, 1.0))
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.requires_grad)
    assert (hidden.grad[ignored] == 0).all()


def test_sequences_and_packing(kernels):
    hidden, weight, _, labels = (t.to(kernels.device) for t in _problem(kernels))
    M, T = labels.numel(), labels.shape[1]
    options = {"shift": 1, "average": True, "backend": kernels.name}
    apart = nca_kernels.linear_sequence_logps(hidden, weight, labels, **options)
    bounds = torch.arange(0, M + 1, T, device=kernels.device)
    packed = nca_kernels.linear_sequence_logps(hidden.view(M, D), weight, labels.view(M), cu_seqlens=bounds, **options)
    wanted = nca_kernels.sequence_logps(hidden @ weight.T, labels, **options)
    assert torch.allclose(apart, wanted, atol=1e-5) and torch.allclose(packed, wanted, atol=1e-5)


def test_a_k_way_loss_through_hidden_states(kernels):
    hidden, weight, _, labels = _problem(kernels)
    hidden, labels = hidden[:2, :6].reshape(6, 2, D), labels[:2, :6].reshape(6, 2)
    ref_logps, scores = torch.randn(2, 2, 3)
    results = []
    for backend, device, dtype in ((kernels.name, kernels.device, torch.float32), ("torch", "cpu", torch.float64)):
        leaves = [t.to(device, dtype).clone().requires_grad_() for t in (hidden, weight)]
        logps = nca_kernels.linear_sequence_logps(*leaves, labels.to(device), shift=1, backend=backend).view(2, 3)
        loss = nca_kernels.nca_loss(logps, ref_logps.to(logps) - 8, scores.to(logps), backend=backend).loss
        results.append([t.cpu().double() for t in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    for ours, truth in zip(*results, strict=True):
        assert torch.allclose(ours, truth, rtol=1e-5, atol=1e-7)


def test_autocast_runs_the_gemm_in_its_dtype(kernels):
    """The gradients have the dtype of the parameters."""
    *tensors, labels = problem = _problem(kernels)
    with torch.autocast(kernels.device.type, dtype=torch.bfloat16):
        ours = _run(problem, NEEDS["all"], torch.float32, kernels.device, backend=kernels.name)
    low = (*(t.bfloat16() for t in tensors), labels)
    wanted = _run(low, NEEDS["all"], torch.bfloat16, kernels.device, backend=kernels.name)
    assert all(torch.equal(a, b.float()) and a.dtype == torch.float32 for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("mode", MAIN)
def test_opcheck(kernels, mode):
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(kernels))
    # 128 columns: the padding of kept rows, which holds anything, is then empty.
    hidden, weight, bias, labels = hidden[1, :5], weight[:128], bias[:128], labels[1, :5] % 128
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip((hidden, weight, bias), MAIN[mode], strict=True)]
    budget = 5 * len(weight) * 4  # all of the logits, for the same reason
    options = (-100, 0.5, 3.0, kernels.name, hidden.dtype, 0, len(weight), "", mode, budget, 0.0)
    torch.library.opcheck(OPS.linear_token_logps, (*leaves, labels, *options))


@gradient_cases
def test_compiles_to_one_graph(kernels, needs, monkeypatch):
    if kernels.interpreted:
        pytest.skip("the compiled graph calls the same operator: one backend on the CPU shows it")
    problem = _problem(kernels)
    eager = _run(problem, needs, torch.float32, kernels.device, backend=kernels.name)
    torch._dynamo.reset()
    compiled = torch.compile(nca_kernels.linear_token_logps, fullgraph=True)
    monkeypatch.setattr(nca_kernels, "linear_token_logps", compiled)
    ours = _run(problem, needs, torch.float32, kernels.device, backend=kernels.name)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(ours, eager, strict=True))


@gradient_cases
def test_bitwise_the_same_from_run_to_run(kernels, monkeypatch, needs):
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", "20000")
    problem = _problem(kernels)
    runs = [_run(problem, needs, torch.float32, kernels.device, backend=kernels.name) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@main_cases
def test_memory_is_a_tile_and_not_the_logits(kernels, monkeypatch, dtype, needs):
    """The logits would take 64 or 128 MiB. A bfloat16 gradient of the weight has no float32 copy."""
    if kernels.interpreted:
        pytest.skip("the interpreter copies every tensor: its memory says nothing about the tiles")
    tile = 4 * MIB
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile))
    M, V, width = 1024, 32768, 64
    hidden, weight = (
        torch.randn(size, width, device=kernels.device).to(dtype).requires_grad_(bool(need))
        for size, need in zip((M, V), needs, strict=False)
    )
    labels = torch.randint(V, (M,), device=kernels.device)

    def call():
        logps = nca_kernels.linear_token_logps(hidden, weight, labels, backend=kernels.name)
        if logps.requires_grad:
            torch.autograd.grad(logps.sum(), [leaf for leaf in (hidden, weight) if leaf.requires_grad])

    call()  # what the first call loads is not the call's
    gradient = weight.numel() * weight.itemsize if needs[1] else 0
    rows = 5 * M * width * 4  # a few [M, D] in float32
    slack = 6 * MIB  # allocator granularity, thread stacks, the GEMM's packed operands
    assert peak_extra(call, kernels.device.type)[1] * MIB < tile + gradient + rows + slack


def test_tiles_cover_everything_once():
    for total in (0, 1, 63, 64, 65, 517, 4099):
        for most in (1, 7, 63, 64, 65, 200, 5000):
            for multiple in (1, 64):
                parts = split(total, most, multiple)
                assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
                assert all(part.stop - part.start <= most for part in parts)
                assert all(part.start % multiple == 0 for part in parts) or most < multiple


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("V", [1, 65, 32000, 262144])
def test_a_tile_keeps_to_its_bytes(monkeypatch, V, frozen):
    for tile_bytes in (4096, 32 * MIB):
        monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
        for M in (0, 1, 100, 8192):
            rows, columns = tile_shape(M, V, torch.bfloat16, torch.device("cpu"), frozen)
            assert 1 <= rows <= max(M, 1) and 1 <= columns <= V and rows * columns * 2 <= tile_bytes


def test_sums_over_tiles_are_float32():
    """In bfloat16 the sum would stop growing, because 256 + 1 = 256."""
    out, one = torch.empty(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    total = ProductSum(out, terms=1000)
    for _ in range(1000):
        total.add(one, one)
    assert out.item() == 1000


@gradient_cases
def test_second_derivatives_are_refused(kernels, needs):
    hidden, weight, _, labels = (t.to(kernels.device) for t in _problem(kernels))
    leaves = [t.requires_grad_(bool(n)) for t, n in zip((hidden, weight), needs, strict=False)]
    logps = nca_kernels.linear_token_logps(*leaves, labels, backend=kernels.name)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


def test_bad_input(kernels):
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(kernels))
    (N, T), V = labels.shape, len(weight)
    for arguments, options, error, message in (
        ((hidden, weight.bfloat16(), labels), {}, TypeError, "weight: got a tensor of torch.bfloat16, wanted"),
        ((hidden, weight[:, :3], labels), {}, ValueError, rf"weight: got shape \[{V}, 3\], wanted \[V, 24\]"),
        ((hidden, weight[:0], labels), {}, ValueError, r"weight: got shape \[0, 24\], wanted \[V, 24\] with V >= 1"),
        ((hidden, weight, labels), {"bias": bias[:5]}, ValueError, rf"bias: got shape \[5\], wanted \[{V}\]"),
        ((hidden, weight, labels), {"save_budget": -1}, ValueError, "save_budget: got -1"),
        ((hidden, weight, labels[:, :2]), {}, ValueError, rf"labels: got shape \[{N}, 2\], wanted \[{N}, {T}\]"),
    ):
        with pytest.raises(error, match=message):
            nca_kernels.linear_token_logps(*arguments, **options)
    labels[0, 5] = V
    if kernels.device.type == "cpu":
        with pytest.raises(IndexError, match=f"labels: the label {V} of the logits at flat position 5"):
            nca_kernels.linear_token_logps(hidden, weight, labels, backend=kernels.name)
    else:
        logps = nca_kernels.linear_token_logps(hidden, weight, labels, backend=kernels.name)
        assert logps[0, 5].isnan() and logps.isnan().sum() == 1
