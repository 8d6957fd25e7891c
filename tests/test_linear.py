"""linear_token_logps: values and all gradients against float64, in every case and tiling, without the logits."""

import pytest
import torch
from memory import peak_extra_bytes
from oracle import DTYPES, assert_no_worse

import nca_kernels

NEEDS = {"none": (0, 0, 0), "frozen": (1, 0, 0), "bias": (0, 0, 1), "trained": (1, 1, 0), "head": (0, 1, 1), "all": (1, 1, 1)}


@pytest.fixture(autouse=True)
def _no_interpreter(request):
    if "kernels" in request.fixturenames and request.getfixturevalue("kernels").interpreted:
        pytest.skip("minutes of interpreter: the row kernels are those that test_token_logps runs there")


def _problem(dtype, M=(3, 41), D=24, V=517):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(*M, D), 0.4 * torch.randn(V, D), torch.randn(V)
    labels = torch.randint(V, M)
    labels[0, :15] = -100
    return *(t.to(dtype) for t in (hidden, weight, bias)), labels


def _run(hidden, weight, bias, labels, needs, dtype, device="cpu", **options):
    leaves = [t.to(device, dtype).clone().requires_grad_(bool(need)) for t, need in zip((hidden, weight, bias), needs, strict=True)]
    logps = nca_kernels.linear_token_logps(leaves[0], leaves[1], labels.to(device), bias=leaves[2], **options)
    upstream = torch.linspace(-1, 2, labels.numel(), device=device).view(labels.shape)  # one of its own for every token
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return logps.detach(), *(torch.autograd.grad(logps, wanted, upstream.to(logps.dtype)) if wanted else ())


def _check(target, dtype, needs, problem=None, **options):
    problem = problem or _problem(dtype)
    truth = _run(*problem, needs, torch.float64, backend="torch", **{k: v for k, v in options.items() if k != "save_budget"})
    peer = _run(*problem, needs, dtype, backend="torch", **{k: v for k, v in options.items() if k != "save_budget"})
    ours = _run(*problem, needs, dtype, target.device, backend=target.name, **options)
    # Beside the yardstick's own largest error: a few float32 ulp for the tiles' order of summation (as in test_token_logps),
    # and one rounding to the dtype.
    tol = max(1e-6, 2 * torch.finfo(dtype).eps)
    for what, a, b, c in zip(("logps", "grad 1", "grad 2", "grad 3"), ours, truth, peer, strict=False):
        spread = torch.full_like(b, (c.double() - b).abs().max().item())
        assert_no_worse(a, b, b + spread, tol, what)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(kernels, dtype, needs):
    _check(kernels, dtype, needs, shift=1)


def test_float16(kernels):
    _check(kernels, DTYPES["float16"], (1, 1, 1))


@pytest.mark.parametrize("needs", [NEEDS["frozen"], NEEDS["all"]], ids=["frozen", "all"])
def test_scale_and_softcap(kernels, needs):
    _check(kernels, torch.float32, needs, scale=0.5, softcap=4.0)


@pytest.mark.parametrize("tile_bytes", [64 * 4, 4096, 20000, 10**7])
@pytest.mark.parametrize("needs", [NEEDS["none"], NEEDS["frozen"], NEEDS["all"]], ids=["none", "frozen", "all"])
def test_any_tile_size(kernels, monkeypatch, tile_bytes, needs):
    """Rows that are no multiple of the tile, slices of the vocabulary, down to tiles of a few numbers."""
    if kernels.interpreted and tile_bytes < 20000:
        pytest.skip("hundreds of tiles are slow in the interpreter")
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(tile_bytes))
    _check(kernels, torch.float32, needs, softcap=6.0)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_save_budget_changes_no_number(kernels, share):
    problem = _problem(torch.float32)
    budget = int(share * problem[3].numel() * len(problem[1]) * 4)
    _check(kernels, torch.float32, NEEDS["all"], problem, save_budget=budget)


@pytest.mark.parametrize("needs", [NEEDS["frozen"], NEEDS["all"]], ids=["frozen", "all"])
def test_nothing_scored(kernels, needs):
    hidden, weight, bias, labels = _problem(torch.float32)
    for empty in ((hidden, weight, bias, torch.full_like(labels, -100)), (hidden[:0], weight, bias, labels[:0])):
        logps, *gradients = _run(*empty, needs, torch.float32, kernels.device, backend=kernels.name)
        assert (logps == 0).all() and all((gradient == 0).all() for gradient in gradients)


def test_ignored_hidden_states_may_hold_anything(kernels):
    hidden, weight, bias, labels = _problem(torch.float32)
    hidden[labels == -100] = float("nan")
    _, *gradients = _run(hidden, weight, bias, labels, NEEDS["all"], torch.float32, kernels.device, backend=kernels.name)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_sequences_and_packing(kernels):
    hidden, weight, _, labels = (t.to(kernels.device) for t in _problem(torch.float32))
    options = {"shift": 1, "average": True, "backend": kernels.name}
    apart = nca_kernels.linear_sequence_logps(hidden, weight, labels, **options)
    bounds = torch.tensor([0, 41, 82, 123], device=kernels.device)
    packed = nca_kernels.linear_sequence_logps(hidden.view(123, -1), weight, labels.view(123), cu_seqlens=bounds, **options)
    wanted = nca_kernels.sequence_logps(hidden @ weight.T, labels, **options)
    assert torch.allclose(apart, wanted, atol=1e-5) and torch.allclose(packed, wanted, atol=1e-5)


def test_a_k_way_loss_through_hidden_states(kernels):
    hidden, weight, _, labels = _problem(torch.float32, M=(6, 9))
    ref_logps, scores = torch.randn(2, 2, 3)
    results = []
    for backend, device in ((kernels.name, kernels.device), ("torch", "cpu")):
        leaves = [t.to(device).clone().requires_grad_() for t in (hidden, weight)]
        logps = nca_kernels.linear_sequence_logps(*leaves, labels.to(device), shift=1, backend=backend).view(2, 3)
        loss = nca_kernels.nca_loss(logps, ref_logps.to(device) - 20, scores.to(device), backend=backend).loss
        results.append([t.cpu() for t in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    for ours, wanted in zip(*results, strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-6)


def test_autocast_runs_the_gemm_in_its_dtype(kernels):
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(torch.float32))
    with torch.autocast(kernels.device.type, dtype=torch.bfloat16):
        ours = nca_kernels.linear_token_logps(hidden, weight, labels, bias=bias, backend=kernels.name)
    low = [t.bfloat16() for t in (hidden, weight, bias)]
    wanted = nca_kernels.linear_token_logps(low[0], low[1], labels, bias=low[2], backend=kernels.name)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("needs", [NEEDS["frozen"], NEEDS["all"]], ids=["frozen", "all"])
def test_compiles_to_one_graph(kernels, needs):
    if kernels.interpreted:
        pytest.skip("the compiled graph calls the same operator: one backend on the CPU shows it")
    problem = _problem(torch.float32)
    eager = _run(*problem, needs, torch.float32, kernels.device, backend=kernels.name)
    torch._dynamo.reset()
    compiled = torch.compile(nca_kernels.linear_token_logps, fullgraph=True)
    hidden, weight, bias = (
        t.to(kernels.device).clone().requires_grad_(bool(n)) for t, n in zip(problem[:3], needs, strict=True)
    )
    logps = compiled(hidden, weight, problem[3].to(kernels.device), bias=bias, backend=kernels.name)
    assert torch.allclose(logps, eager[0], atol=1e-6)


def test_bitwise_the_same_from_run_to_run(kernels):
    problem = _problem(torch.float32)
    runs = [_run(*problem, NEEDS["all"], torch.float32, kernels.device, backend=kernels.name) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("needs", [NEEDS["none"], NEEDS["frozen"], NEEDS["trained"]], ids=["none", "frozen", "trained"])
def test_memory_is_a_tile_and_not_the_logits(kernels, monkeypatch, needs):
    """M x V would be 125 MiB; beside a tile there are a few [M, D] and, with a trained head, its gradient."""
    if kernels.interpreted:
        pytest.skip("the interpreter copies every tensor")
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(8 << 20))
    hidden, weight, bias, labels = _problem(torch.float32, M=(2, 512), D=64, V=32000)

    def call():
        return _run(hidden, weight, bias, labels, needs, torch.float32, kernels.device, backend=kernels.name)

    call()
    copies = (hidden.numel() + weight.numel() + bias.numel()) * 4  # the leaves that _run makes
    gradient = weight.numel() * 4 if needs[1] else 0
    assert peak_extra_bytes(call, kernels.device) < (8 << 20) + copies + 2 * gradient + 12 * hidden.numel() * 4 + (12 << 20)


def test_second_derivatives_are_refused(kernels):
    hidden, weight, _, labels = _problem(torch.float32)
    for needs in ((True, False), (True, True)):
        leaves = [t.to(kernels.device).requires_grad_(n) for t, n in zip((hidden, weight), needs, strict=True)]
        logps = nca_kernels.linear_token_logps(*leaves, labels.to(kernels.device), backend=kernels.name)
        with pytest.raises(NotImplementedError, match="backend='torch'"):
            torch.autograd.grad(logps.sum(), leaves[0], create_graph=True)


def test_bad_input(kernels):
    hidden, weight, bias, labels = (t.to(kernels.device) for t in _problem(torch.float32))
    for arguments, options, error, message in (
        ((hidden, weight.bfloat16(), labels), {}, TypeError, "weight: got a tensor of torch.bfloat16, wanted"),
        ((hidden, weight[:, :3], labels), {}, ValueError, r"weight: got shape \[517, 3\], wanted \[V, 24\]"),
        ((hidden, weight, labels), {"bias": bias[:5]}, ValueError, r"bias: got shape \[5\], wanted \[517\]"),
        ((hidden, weight, labels), {"save_budget": -1}, ValueError, "save_budget: got -1"),
        ((hidden, weight, labels[:, :2]), {}, ValueError, r"labels: got shape \[3, 2\], wanted \[3, 41\]"),
    ):
        with pytest.raises(error, match=message):
            nca_kernels.linear_token_logps(*arguments, **options)
    if kernels.device.type == "cpu":
        with pytest.raises(IndexError, match="labels: the label 517 at flat position 40"):
            labels[0, 40] = 517
            nca_kernels.linear_token_logps(hidden, weight, labels, backend=kernels.name)
