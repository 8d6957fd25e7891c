"""Tests that need a GPU, not an interpreter or an emulator: sizes past 32 bits, launches, streams, devices, compilers."""

import json
import warnings

import pytest
import torch
from oracle import assert_no_worse, plain_token_logps, value_and_grad

import nca_kernels
from nca_kernels.loss_table import LOSSES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture
def gpu(kernels):
    if kernels.device.type != "cuda":
        pytest.skip("a CPU backend")
    yield kernels
    torch.cuda.empty_cache()  # gigabytes, which the next test wants


def _needs(gib):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{gib} GiB of GPU memory are needed, {free:.0f} are free")


def _assert_rows_right(backend, logits, labels, rows, tol=1e-6):
    """Check values and gradients of these rows, which were computed together with all other rows."""
    upstream = torch.randn(labels.shape, device="cuda")
    leaf = logits.requires_grad_()
    logps = nca_kernels.token_logps(leaf, labels, backend=backend)
    (grad,) = torch.autograd.grad(logps, leaf, upstream)
    few, few_labels, few_upstream = logits.detach()[rows], labels[rows], upstream[rows]
    truth = value_and_grad(lambda x: plain_token_logps(x, few_labels, compute=torch.float64), few, few_upstream)
    peer = value_and_grad(lambda x: plain_token_logps(x, few_labels), few, few_upstream)
    assert_no_worse(logps.detach()[rows], truth[0], peer[0], tol, "logps")
    assert_no_worse(grad[rows], truth[1], peer[1], max(tol, torch.finfo(logits.dtype).eps / 2), "dlogits")


def _plain_entropy(logits):
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _assert_statistics_right(backend, logits, labels, rows):
    """Check log-sum-exp, entropy, top-1 and the gradient of their sum for these rows, computed together with all other rows."""
    leaf = logits.requires_grad_()
    stats = nca_kernels.token_stats(leaf, labels, entropy_gradient=True, backend=backend)
    (grad,) = torch.autograd.grad((stats.logps + stats.lse + stats.entropy).sum(), leaf)
    few = logits.detach()[rows].double().requires_grad_()
    lse, entropy = few.logsumexp(-1), _plain_entropy(few)
    (truth,) = torch.autograd.grad((plain_token_logps(few, labels[rows]) + lse + entropy).sum(), few)
    torch.testing.assert_close(stats.lse[rows].double(), lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy[rows].double(), entropy, rtol=2e-6, atol=2e-6)
    assert torch.equal(stats.top1[rows], few.gather(-1, labels[rows, None])[:, 0] == few.amax(-1))
    torch.testing.assert_close(grad[rows].double(), truth, rtol=torch.finfo(logits.dtype).eps, atol=1e-6)


def test_statistics_of_more_than_2_31_elements(gpu):
    _needs(12)
    V = 128256
    M = 2**31 // V + 100
    logits = torch.randn(M, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(V, (M,), device="cuda")
    _assert_statistics_right(gpu.name, logits, labels, torch.tensor([0, M // 2, M - 1], device="cuda"))


@pytest.mark.parametrize("V", [1000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_statistics(gpu, dtype, V):
    """The device's own division and exponential round in a way that the interpreter and the emulator do not."""
    logits = (3 * torch.randn(64, V, device="cuda")).to(dtype)
    labels = torch.where(torch.rand(64, device="cuda") < 0.5, logits.argmax(-1), torch.randint(V, (64,), device="cuda"))
    _assert_statistics_right(gpu.name, logits, labels, torch.arange(64, device="cuda"))


def test_more_than_2_31_elements(gpu):
    _needs(12)
    V = 128256
    M = 2**31 // V + 100  # the last rows begin past element 2^31
    logits = torch.randn(M, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(V, (M,), device="cuda")
    _assert_rows_right(gpu.name, logits, labels, torch.tensor([0, M // 2, M - 2, M - 1], device="cuda"))


def test_strides_past_2_31_elements(gpu):
    _needs(10)
    V = 1000
    storage = torch.empty(2**31 + 2 * V, device="cuda", dtype=torch.bfloat16)
    logits = storage.as_strided((2, V), (2**31, 1)).normal_()
    labels = torch.randint(V, (2,), device="cuda")
    truth = plain_token_logps(logits, labels, compute=torch.float64)
    ours = nca_kernels.token_logps(logits, labels, backend=gpu.name)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)


def test_more_rows_than_a_grids_second_dimension(gpu):
    M, V = 70_000, 1000
    logits = torch.randn(M, V, device="cuda")
    labels = torch.randint(V, (M,), device="cuda")
    _assert_rows_right(gpu.name, logits, labels, torch.tensor([0, 65534, 65535, 65536, M - 1], device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sequences_of_8192_tokens_at_a_large_vocabulary(gpu, dtype):
    """Against float64: a sum of 8192 log-probs of about -14 keeps 7 digits in float32."""
    _needs(16)
    T, V = 8192, 151936
    logits = (2 * torch.randn(1, T, V, device="cuda", dtype=torch.float32)).to(dtype)
    labels = torch.randint(V, (1, T), device="cuda")
    ours = nca_kernels.sequence_logps(logits, labels, backend=gpu.name)
    parts = zip(logits[0].split(512), labels[0].split(512), strict=True)  # float64 logits of all are 10 GB
    truth = sum(plain_token_logps(x, y, compute=torch.float64).sum() for x, y in parts)
    assert abs(ours.item() - truth.item()) < 1e-6 * abs(truth.item())
    _assert_rows_right(gpu.name, logits[0], labels[0], torch.arange(0, T, 1000, device="cuda"))


def test_work_goes_to_the_current_stream(gpu):
    """The call runs on another stream after a delayed write; on the wrong stream it would read the old inputs."""
    side = torch.cuda.Stream()

    @torch.no_grad()
    def after_a_late_write(call, *new):
        inputs = [torch.zeros_like(value) for value in new]
        call(*inputs)  # compiles, which takes longer than the sleep
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            for value, late in zip(inputs, new, strict=True):
                value.copy_(late)
            result = call(*inputs)
        torch.cuda.synchronize()
        return result

    labels = torch.zeros(64, dtype=torch.int64, device="cuda")
    logits = torch.randn(64, 32000, device="cuda")
    ours = after_a_late_write(lambda x: nca_kernels.token_logps(x, labels, backend=gpu.name), logits)
    torch.testing.assert_close(ours, plain_token_logps(logits, labels), rtol=1e-5, atol=1e-5)
    hidden, weight = torch.randn(64, 32, device="cuda"), torch.randn(32000, 32, device="cuda")
    ours = after_a_late_write(lambda *x: nca_kernels.linear_token_logps(*x, labels, backend=gpu.name), hidden, weight)
    torch.testing.assert_close(ours, plain_token_logps(hidden @ weight.T, labels), rtol=1e-2, atol=1e-2)  # TF32 may be on
    groups = torch.randn(3, 16, 4, device="cuda").unbind()
    ours = after_a_late_write(lambda *x: nca_kernels.nca_loss(*x, backend=gpu.name).loss, *groups)
    torch.testing.assert_close(ours, nca_kernels.nca_loss(*groups, backend="torch").loss, rtol=1e-5, atol=1e-6)


def test_the_tensors_device_is_used_not_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here, two are needed")
    logits = torch.randn(8, 1000, device="cuda:1", requires_grad=True)
    labels = torch.randint(1000, (8,), device="cuda:1")
    with torch.cuda.device(0):
        logps = nca_kernels.token_logps(logits, labels, backend=gpu.name)
        logps.sum().backward()
        loss = nca_kernels.nca_loss(logps.detach().view(2, 4), logps.detach().view(2, 4), backend=gpu.name).loss
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(logps.detach(), plain_token_logps(logits.detach(), labels), rtol=1e-5, atol=1e-5)
    assert logits.grad.device == loss.device == torch.device("cuda:1")


def _replayed(step, leaf):
    """Capture the step, replay it on new values of ``leaf``, and compute it from them without a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    return zip(captured, step(), strict=True)


def test_a_cuda_graph_captures_forward_and_backward(gpu):
    """Nothing syncs with the host, so capture succeeds, and a replay on new values gives the new results."""
    logits = torch.randn(8, 33, 1000, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (8, 33), device="cuda")
    labels[0, :4] = -100
    ref_logps, scores = torch.randn(2, 2, 4, device="cuda")

    def step():
        logps = nca_kernels.sequence_logps(logits, labels, shift=1, backend=gpu.name)
        loss = nca_kernels.nca_loss(logps.view(2, 4), ref_logps, scores, backend=gpu.name).loss
        return loss.detach(), *torch.autograd.grad(loss, logits)

    for replayed, wanted in _replayed(step, logits):
        assert torch.equal(replayed, wanted)


def test_a_cuda_graph_captures_the_statistics(gpu):
    logits = torch.randn(8, 33, 1000, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (8, 33), device="cuda")
    labels[0, :4] = -100

    def step():
        stats = nca_kernels.token_stats(logits, labels, shift=1, entropy_gradient=True, backend=gpu.name)
        loss = (stats.logps - 0.1 * stats.lse + 0.01 * stats.entropy).sum()
        return loss.detach(), stats.top1.clone(), *torch.autograd.grad(loss, logits)

    for replayed, wanted in _replayed(step, logits):
        assert torch.equal(replayed, wanted)


def test_a_cuda_graph_captures_a_gradient_in_place(gpu):
    """At every replay forward fills the memory of the logits again, and then the gradient overwrites it."""
    hidden = torch.randn(8, 33, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda") / 8
    labels = torch.randint(1000, (8, 33), device="cuda")

    def step():
        logps = nca_kernels.token_logps(hidden @ weight.T, labels, inplace_backward=True, backend=gpu.name)
        return logps.detach(), *torch.autograd.grad(logps.sum(), hidden)

    for replayed, wanted in _replayed(step, hidden):
        torch.testing.assert_close(replayed, wanted, rtol=1e-5, atol=1e-5)


def test_a_cuda_graph_captures_the_linear_statistics(gpu):
    hidden = torch.randn(2, 9, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1001, 64, device="cuda", requires_grad=True)
    labels = torch.randint(1001, (2, 9), device="cuda")
    labels[0, :4] = -100

    def step():
        stats = nca_kernels.linear_token_stats(hidden, weight, labels, shift=1, entropy_gradient=True, backend=gpu.name)
        loss = (stats.logps - 0.1 * stats.lse + 0.01 * stats.entropy).sum()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    for replayed, wanted in _replayed(step, hidden):
        torch.testing.assert_close(replayed, wanted, rtol=1e-4, atol=1e-4)


def test_a_cuda_graph_captures_the_linear_family(gpu):
    """Under capture nothing may wait for the number of labelled rows, so all rows are kept and the kernels skip ignored ones."""
    hidden = torch.randn(2, 9, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (2, 9), device="cuda")
    labels[0, :4] = -100

    def step():
        logps = nca_kernels.linear_sequence_logps(hidden, weight, labels, shift=1, backend=gpu.name)
        return logps.detach(), *torch.autograd.grad(logps.sum(), (hidden, weight))

    for replayed, wanted in _replayed(step, hidden):
        torch.testing.assert_close(replayed, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_torch_compile(gpu, mode):
    """``max-autotune`` puts the compiled step into a CUDA graph of its own."""
    logits = torch.randn(8, 33, 4097, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(4097, (8, 33), device="cuda")
    ref_logps, scores = torch.randn(2, 2, 4, device="cuda")

    def loss(logits):
        logps = nca_kernels.sequence_logps(logits * 1.5, labels, shift=1, average=True, backend=gpu.name)
        return nca_kernels.nca_loss(logps.view(2, 4), ref_logps, scores, backend=gpu.name).loss

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True, mode=mode)
    wanted = loss(logits)
    (wanted_grad,) = torch.autograd.grad(wanted, logits)
    for _ in range(3):  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        value = function(logits)
        (grad,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, wanted_grad, rtol=2**-7, atol=1e-7)


@pytest.fixture
def launched(tmp_path):
    """The names of the kernels that a warm step launches; copies and fills by the driver do not count."""

    def names(step):
        step()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
        return kernels or pytest.skip("the profiler sees no kernels here")

    return names


@pytest.mark.parametrize("name", LOSSES)
def test_group_loss_is_one_launch_and_its_gradient_one_more(gpu, launched, name):
    """Backward multiplies the upstream gradient with the derivative that forward has computed."""
    logps = torch.randn(64, 4, device="cuda", requires_grad=True)
    ref_logps, scores = torch.randn(2, 64, 4, device="cuda")
    one = torch.ones((), device="cuda")

    def forward():
        return nca_kernels.group_loss(name, logps, ref_logps, scores, backend=gpu.name).loss

    (ours,) = launched(forward)
    assert "group_loss_fwd_kernel" in ours
    both = launched(lambda: torch.autograd.grad(forward(), logps, one))
    assert len(both) == 2 and ours in both


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_token_logps_is_one_launch_each_way(gpu, launched, inplace):
    """There is no copy of the logits, no pass over the labels and no fill of the gradient."""
    logits = torch.randn(64, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(32000, (64,), device="cuda")
    labels[::2] = -100
    upstream = torch.randn(64, device="cuda")

    def forward():
        return nca_kernels.token_logps(logits, labels, inplace_backward=inplace, backend=gpu.name)

    (ours,) = launched(forward)
    assert "token_logps_fwd_kernel" in ours
    both = launched(lambda: torch.autograd.grad(forward(), logits, upstream))
    assert len(both) == 2 and ours in both and any("token_logps_bwd_kernel" in each for each in both)


def _row_kernels(names):
    return [name for name in names if "token_logps" in name]


def test_statistics_are_one_read_and_one_write(gpu, launched):
    """All further work is on one number per row."""
    logits = torch.randn(64, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(32000, (64,), device="cuda")

    def step():
        stats = nca_kernels.token_stats(logits, labels, entropy_gradient=True, backend=gpu.name)
        return torch.autograd.grad((stats.logps + stats.lse + stats.entropy).sum(), logits)

    fwd, bwd = _row_kernels(launched(step))
    assert "token_logps_fwd_kernel" in fwd and "token_logps_bwd_kernel" in bwd


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_peak_memory_is_one_gradient_or_none(gpu, inplace):
    logits = torch.randn(512, 32000, device="cuda", dtype=torch.bfloat16, requires_grad=True) * 1
    labels = torch.randint(32000, (512,), device="cuda")
    logps = nca_kernels.token_logps(logits, labels, inplace_backward=inplace, backend=gpu.name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(logps.sum(), logits)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (0 if inplace else logits.nbytes) + 2**20


def _waits(call):
    """How often the CPU waits for the GPU in a warm call."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in found)


def test_nothing_but_the_linear_family_waits_for_the_gpu(gpu):
    """The linear functions wait once, for the number of labelled rows."""
    logits = torch.randn(4, 33, 1000, device="cuda", requires_grad=True)
    hidden = torch.randn(4, 33, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (4, 33), device="cuda")
    labels[:, :9] = -100
    ref_logps, scores = torch.randn(2, 1, 4, device="cuda")

    def of_logits():
        stats = nca_kernels.token_stats(logits, labels, shift=1, backend=gpu.name)
        loss = nca_kernels.nca_loss(stats.logps.sum(-1)[None], ref_logps, scores, backend=gpu.name).loss
        torch.autograd.grad(loss, logits)

    def of_hidden():
        logps = nca_kernels.linear_token_logps(hidden, weight, labels, shift=1, backend=gpu.name)
        torch.autograd.grad(logps.sum(), (hidden, weight))

    assert _waits(of_logits) == 0 and _waits(of_hidden) == 1


@pytest.mark.parametrize("V", [1001, 50257])
def test_a_linear_head_of_odd_v_in_one_tile(gpu, V):
    """The tile's rows are padded to whole 16-byte words, and the padding affects neither sums nor gradients."""
    hidden = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, 64, device="cuda") / 8).bfloat16().requires_grad_()
    labels = torch.randint(V, (40,), device="cuda")
    labels[0], labels[1], labels[2] = V - 1, 0, -100
    upstream = torch.randn(40, device="cuda")
    for budget in (0, 2**40):
        logps = nca_kernels.linear_token_logps(hidden, weight, labels, save_budget=budget, backend=gpu.name)
        ours = torch.autograd.grad(logps, (hidden, weight), upstream)
        plain = plain_token_logps(hidden @ weight.T, labels, compute=torch.float32)
        peer = torch.autograd.grad(plain, (hidden, weight), upstream)
        torch.testing.assert_close(logps, plain, rtol=1e-5, atol=1e-5)
        for a, b in zip(ours, peer, strict=True):
            assert (a - b).float().norm() < 2e-2 * b.float().norm()
