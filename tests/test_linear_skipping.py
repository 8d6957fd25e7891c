"""``skip_mass``: exact values, gradients within the bound of docs/math.md, and the products that it saves."""

import itertools
import math

import pytest
import torch
from test_linear import NEEDS, OPS, _check
from test_linear_tiles import SYNCS, counted, recorded_tiles

import nca_kernels
from bench.memory import MIB, peak_extra
from nca_kernels import linear
from nca_kernels.skipping import slice_width

D = 24
ROWS = 12
MASSES = (2.0**-4, 2.0**-10)
OUTPUTS = ("logps", "entropy", "lse")


def _size(target):
    return 323 if target.interpreted else 1111


def _rows(kind, V):
    """Hidden states, weight, bias and labels of rows that are hard for a bound."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(ROWS, D), torch.randn(V, D), torch.zeros(V)
    labels = torch.randint(V, (ROWS,))
    if kind == "uniform":
        hidden = torch.zeros_like(hidden)
    elif kind == "two peaks":
        pairs = torch.randint(V, (2, ROWS))
        hidden = weight[pairs[0]] + weight[pairs[1]]
        labels = pairs[0]
    elif kind == "masked":
        bias[: V // 2], bias[-9:] = -math.inf, -math.inf
        labels = V // 2 + labels % (V // 2 - 9)
    elif kind == "unlikely label":
        labels = (hidden @ weight.T).argmin(-1)
    elif kind == "bias":
        bias = 3 * torch.randn(V)
    elif kind == "sure":
        hidden = hidden + weight[labels]
    return hidden, weight, bias, labels


KINDS = ("random", "uniform", "two peaks", "masked", "unlikely label", "bias", "sure")


def _gradients(problem, device, upstream, **options):
    """``dhidden``, ``dweight`` and ``dbias`` from upstream gradients of log-probs, entropy and log-sum-exp, in float64."""
    leaves = [values.to(device).requires_grad_() for values in problem[:3]]
    stats = nca_kernels.linear_token_stats(*leaves[:2], problem[3].to(device), bias=leaves[2], entropy_gradient=True, **options)
    outputs = [getattr(stats, name) for name in OUTPUTS]
    gradients = torch.autograd.grad(outputs, leaves, [values.to(output) for values, output in zip(upstream, outputs, strict=True)])
    return [output.detach().cpu().double() for output in outputs], [gradient.cpu().double() for gradient in gradients]


def _distances(a, b):
    """The distance of each row of dhidden, and the sums of the distances of the rows of dweight and of dbias."""
    return (a[0] - b[0]).norm(dim=-1), (a[1] - b[1]).norm(dim=-1).sum(), (a[2] - b[2]).abs().sum()


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 4.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_within_the_bound(kernels, kind, options, mass):
    """docs/math.md, section 4: with ``factor = |g - e| + |h| (log(V / mass) + H)`` for the upstream gradients g, e and h."""
    if kernels.interpreted and kind not in ("random", "masked"):
        pytest.skip("the interpreter is slow, and its row kernels cannot tell these kinds apart")
    V = _size(kernels)
    hidden, weight, bias, labels = _rows(kind, V)
    g, of_entropy, e = torch.randn(3, ROWS)
    for dtype, entropy_too in itertools.product((torch.float32, torch.bfloat16, torch.float16), (0.0, 1.0)):
        h = entropy_too * of_entropy
        problem = (*(values.to(dtype) for values in (hidden, weight, bias)), labels)
        wide = (*(values.double() for values in problem[:3]), labels)
        upstream = (g, h, e)
        values, exact = _gradients(wide, "cpu", upstream, backend="torch", **options)
        _, peer = _gradients(problem, kernels.device, upstream, backend=kernels.name, **options)
        ours_values, ours = _gradients(problem, kernels.device, upstream, backend=kernels.name, skip_mass=mass, **options)
        factor = (g - e).abs() + h.abs() * (math.log(V / mass) + values[1])
        unit = options.get("scale", 1.0) * mass
        longest = wide[1].norm(dim=-1).max()
        bounds = (
            unit * factor.double() * longest,
            unit * (factor * wide[0].norm(dim=-1)).sum(),
            unit * factor.sum(),
        )
        rounding, distances = _distances(peer, exact), _distances(ours, exact)
        norms = exact[0].norm(dim=-1), exact[1].norm(dim=-1).sum(), exact[2].abs().sum()
        eps = torch.finfo(dtype).eps
        for distance, bound, other, norm in zip(distances, bounds, rounding, norms, strict=True):
            # Sums over more slices round more often: a CPU rounds each addend to 16 bits.
            assert (distance <= bound + 2 * other + 2 * eps * norm).all(), (dtype, distance / bound)
        for mine, true in zip(ours_values, values, strict=True):
            torch.testing.assert_close(mine, true, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else _loose(dtype)))


def _loose(dtype):
    """The spacing of 16-bit logits, whose errors a log-prob has."""
    return {"rtol": 0.0, "atol": 100 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_next_to_no_mass_is_exact(kernels, dtype, needs):
    """As accurate as PyTorch in the same dtype, as without it."""
    if kernels.interpreted and needs not in (NEEDS["hidden"], NEEDS["all"]):
        pytest.skip("the interpreter is slow, and its row kernels do the same for all of these")
    _check(kernels, dtype, needs, shift=1, skip_mass=1e-30)
    _check(kernels, dtype, needs, scale=0.5, softcap=4.0, skip_mass=1e-30)


def _sure_rows(V, M=40):
    """Rows with next to all of their probability at one column, and labels there."""
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(V, D), dim=-1)
    labels = torch.randint(V, (M,))
    return 60 * weight[labels], weight, labels


def _call(hidden, weight, labels, trained=True, **options):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
    logps = nca_kernels.linear_token_logps(*leaves, labels, backend="cpu", **options)
    return torch.autograd.grad(logps.sum(), leaves if trained else leaves[:1])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("budget", [0, 10**9])
def test_a_sure_row_costs_one_slice(monkeypatch, trained, budget):
    V = 2000
    hidden, weight, labels = _sure_rows(V)
    with recorded_tiles(monkeypatch) as tiles:
        _call(hidden, weight, labels, trained, skip_mass=2.0**-10, save_budget=budget)
    computed = sum(rows * columns for name, (rows, columns), *_ in tiles if name == "token_logps_bwd")
    assert computed <= len(labels) * slice_width(V)
    assert sum(rows * columns for name, (rows, columns), *_ in tiles if name == "token_logps_fwd") == len(labels) * V


def test_the_order_of_the_columns_saves_slices(monkeypatch):
    """A text that uses every 40th column has its columns in few slices."""
    torch.manual_seed(0)
    V = 4000
    weight = torch.randn(V, D)
    weight[:, 0] = torch.where(torch.arange(V) % 40 == 0, 4.0, -4.0)
    hidden = torch.randn(50, D)
    hidden[:, 0] = 3.0
    with recorded_tiles(monkeypatch) as tiles:
        _call(hidden, weight, torch.arange(0, V, V // 50), skip_mass=2.0**-10)
    computed = sum(rows * columns for name, (rows, columns), *_ in tiles if name == "token_logps_bwd")
    assert computed <= 50 * V / 10


def test_zero_takes_the_usual_path():
    hidden, weight, labels = _sure_rows(1000)
    with counted() as counts:
        ours = _call(hidden, weight, labels, skip_mass=0.0)
    assert counts["aten::sort"] == 0
    assert all(torch.equal(a, b) for a, b in zip(ours, _call(hidden, weight, labels), strict=True))


@pytest.mark.parametrize("budget", [0, 20_000, 10**9])
def test_bitwise_the_same_from_run_to_run(kernels, budget):
    V = _size(kernels)
    hidden, weight, bias, labels = (values.to(kernels.device) for values in _rows("random", V))
    leaves = [values.requires_grad_() for values in (hidden, weight, bias)]
    options = {"bias": leaves[2], "skip_mass": 0.05, "save_budget": budget, "backend": kernels.name}
    runs = []
    for _ in range(2):
        logps = nca_kernels.linear_token_logps(*leaves[:2], labels, **options)
        # The second backward has what the first one had, the kept logits too.
        runs += [torch.autograd.grad(logps.sum(), leaves, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_budget_changes_no_number(kernels):
    V = _size(kernels)
    *tensors, labels = (values.to(kernels.device) for values in _rows("random", V))
    leaves = [values.requires_grad_() for values in tensors]
    runs = []
    for budget in (0, 20_000, 10**9):
        options = {"bias": leaves[2], "skip_mass": 0.05, "save_budget": budget, "backend": kernels.name}
        logps = nca_kernels.linear_token_logps(*leaves[:2], labels, **options)
        runs.append(torch.autograd.grad(logps.sum(), leaves))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("captured", [(True, False), (False, True), (True, True)], ids=["forward", "backward", "both"])
def test_cuda_graphs(monkeypatch, captured):
    """A captured backward knows no numbers of rows, so it leaves out nothing; forward and backward agree on the rows."""
    hidden, weight, bias, labels = _rows("random", 1111)
    labels[:3] = -100
    leaves = [values.requires_grad_() for values in (hidden, weight, bias)]

    def gradients(forward, backward, **options):
        with monkeypatch.context() as patch:
            patch.setattr(linear, "is_captured", lambda _: forward)
            logps = nca_kernels.linear_token_logps(*leaves[:2], labels, bias=leaves[2], backend="cpu", **options)
            patch.setattr(linear, "is_captured", lambda _: backward)
            with counted() as counts:
                results = torch.autograd.grad(logps.square().sum(), leaves)
        assert not backward or sum(counts[name] for name in SYNCS) == 0
        return results

    wanted = gradients(False, False) if captured[1] else gradients(False, False, skip_mass=0.05)
    for ours, other in zip(gradients(*captured, skip_mass=0.05), wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 if captured[1] else 0.02 * other.abs().max().item())


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_ignored_and_invalid_rows(kernels, ignore_index):
    """Labels become places in the order of the columns, and no place may be taken for an ignored label."""
    V = _size(kernels)
    hidden, weight, bias, labels = _rows("random", V)
    labels = torch.where(labels == ignore_index, ignore_index + 1, labels)
    ignored = torch.arange(ROWS) < 4
    labels = labels.masked_fill(ignored, ignore_index)
    clean = hidden.clone()
    hidden[:4] = math.nan
    results = []
    for states in (clean, hidden):
        leaves = [values.to(kernels.device).clone().requires_grad_() for values in (states, weight, bias)]
        logps = nca_kernels.linear_token_logps(
            *leaves[:2], labels.to(kernels.device), bias=leaves[2], ignore_index=ignore_index, skip_mass=0.01, backend=kernels.name
        )
        results.append((logps.detach(), *torch.autograd.grad(logps.sum(), leaves)))
    assert (results[0][0] != 0).sum() == ROWS - 4 and (results[0][1][:4] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ignore_index", [0, 7, 100])
def test_every_column_is_a_label(ignore_index):
    """One of them has the number of the ignored label as its place in the order."""
    V = 300
    hidden, weight, *_ = _rows("random", V)
    hidden = hidden[torch.arange(V) % ROWS]
    logps, exact = (
        nca_kernels.linear_token_logps(
            hidden, weight.requires_grad_(), torch.arange(V), ignore_index=ignore_index, skip_mass=mass, backend="cpu"
        ).detach()
        for mass in (0.1, 0.0)
    )
    torch.testing.assert_close(logps, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [-1, -2, 1111])
def test_a_label_that_is_no_column_is_found(monkeypatch, label):
    """By the row kernels, too, which alone look at labels on a GPU."""
    monkeypatch.setattr("nca_kernels.checks.are_read", lambda _: False)
    hidden, weight, _, labels = _rows("random", 1111)
    labels[5] = label
    with pytest.raises(IndexError, match="label"):
        nca_kernels.linear_token_logps(hidden, weight.requires_grad_(), labels, skip_mass=0.01, backend="cpu")


def test_nan_reaches_all_of_its_row_and_of_the_head(kernels):
    """Where the probabilities are NaN, nothing is left out: the gradient of the head shows it, as it does without skip_mass."""
    V = _size(kernels)
    hidden, weight, bias, labels = _rows("random", V)
    hidden[3] = math.nan
    for problem in ((hidden, weight, bias, labels), (*_rows("random", V)[:2], torch.full((V,), -math.inf), labels)):
        leaves = [values.to(kernels.device).clone().requires_grad_() for values in problem[:3]]
        logps = nca_kernels.linear_token_logps(
            *leaves[:2], labels.to(kernels.device), bias=leaves[2], skip_mass=0.5, backend=kernels.name
        )
        dhidden, dweight, _ = torch.autograd.grad(logps.sum(), leaves)
        rows = [3] if torch.isfinite(problem[2]).all() else range(ROWS)
        assert [row for row in range(ROWS) if dhidden[row].isnan().all()] == list(rows)
        assert dweight.isnan().all()


def test_no_row_is_labelled(kernels):
    hidden, weight, bias, labels = (values.to(kernels.device) for values in _rows("random", _size(kernels)))
    leaves = [values.requires_grad_() for values in (hidden, weight, bias)]
    for some in (slice(0, 0), slice(None)):
        logps = nca_kernels.linear_token_logps(
            leaves[0][some], leaves[1], torch.full_like(labels, -100)[some], bias=leaves[2], skip_mass=0.01, backend=kernels.name
        )
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(logps.sum(), leaves))


def test_opcheck(kernels):
    V = 320  # no padding of kept rows, which may hold anything
    hidden, weight, bias, labels = (values.to(kernels.device) for values in _rows("random", V))
    leaves = [values.requires_grad_() for values in (hidden, weight, bias)]
    options = (-100, 0.5, 3.0, kernels.name, hidden.dtype, 0, V, "", "trained", ROWS * V * 4, 0.05)
    torch.library.opcheck(OPS.linear_token_logps, (*leaves, labels, *options))


def test_one_sync_more_than_without_it(monkeypatch):
    """In backward, for the numbers of all slices together."""
    monkeypatch.setattr("nca_kernels.checks.are_read", lambda _: False)  # of labels: on a CPU alone
    hidden, weight, labels = _sure_rows(1000)
    labels[:3] = -100
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda values: reads.append(values.shape) or tolist(values))
    with counted() as counts:
        _call(hidden, weight, labels, skip_mass=0.01)
    assert sum(counts[name] for name in SYNCS) == 1  # the number of labelled rows
    on_cpu_anyway = torch.Size([1])
    assert [shape for shape in reads if shape != on_cpu_anyway] == [torch.Size([-(-1000 // slice_width(1000))])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory(monkeypatch, dtype):
    """A tile, a slice of the head and one of its gradient, and neither the logits nor a second head."""
    monkeypatch.setenv("NCA_KERNELS_TILE_BYTES", str(4 * MIB))
    M, V, width = 1024, 65536, 256
    hidden, weight = (torch.randn(size, width).to(dtype).requires_grad_() for size in (M, V))
    labels = torch.randint(V, (M,))

    def call():
        logps = nca_kernels.linear_token_logps(hidden, weight, labels, backend="cpu", skip_mass=2.0**-10)
        torch.autograd.grad(logps.sum(), (hidden, weight))

    call()  # what the first call loads is not the call's
    pieces = slice_width(V) * width * (weight.itemsize + 4 + weight.itemsize)
    rows = 6 * M * width * 4 + 32 * M * 20
    slack = 6 * MIB  # allocator granularity, thread stacks, the GEMM's packed operands
    bound = 4 * MIB + weight.numel() * weight.itemsize + pieces + rows + slack
    assert peak_extra(call, "cpu")[1] * MIB < bound
    # So is the sum of all large allocations: memory of its own for each slice would leave holes, which malloc may keep.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert sum(size for size in allocated if size >= MIB // 4) < bound


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, ValueError, "skip_mass: got 1.0, wanted a number >= 0 and < 1"),
        (-0.1, ValueError, "skip_mass: got -0.1, wanted a number >= 0 and < 1"),
        (math.nan, ValueError, "skip_mass: got nan, wanted a number >= 0 and < 1"),
        ("a little", TypeError, "skip_mass: got str, wanted a number >= 0 and < 1"),
        (True, TypeError, "skip_mass: got bool, wanted a number >= 0 and < 1"),
    ],
)
def test_bad_values(value, error, message):
    for function in (nca_kernels.linear_token_logps, nca_kernels.linear_sequence_logps, nca_kernels.linear_token_stats):
        with pytest.raises(error, match=message):
            function(torch.randn(2, 3, 4), torch.randn(5, 4), torch.ones(2, 3, dtype=torch.int64), skip_mass=value)
