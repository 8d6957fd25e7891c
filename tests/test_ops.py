"""The operators under PyTorch's own checks, torch.compile, and repeated runs."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nca_kernels
from nca_kernels.segments import sequence_sums

OPS = torch.ops.nca_kernels
VERSION = torch.torch_version.TorchVersion(torch.__version__)
OLD = VERSION < (2, 11)


def _token_arguments(target, dtype=torch.float32, requires_grad=True):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 65, device=target.device).to(dtype).requires_grad_(requires_grad)
    labels = torch.tensor([[0, 64, -100], [3, 2, 1]], device=target.device)
    return logits, labels


def _group_arguments(target):
    torch.manual_seed(1)
    logps = torch.randn(5, 4, device=target.device, requires_grad=True)
    ref_logps, scores = torch.randn(2, 5, 4, device=target.device)
    return logps, ref_logps, scores


def test_opcheck_token_logps(kernels):
    logits, labels = _token_arguments(kernels)
    for inplace_backward in (False, True):
        torch.library.opcheck(OPS.token_logps, (logits, labels, inplace_backward, -100, 1.0, None, kernels.name))
    torch.library.opcheck(OPS.token_logps, (logits, labels, False, -100, 0.5, 3.0, kernels.name))
    _, stats = OPS.token_logps(logits.detach(), labels, False, -100, 1.0, None, kernels.name)
    upstream = (torch.randn(2, 3, device=kernels.device), None, None)
    torch.library.opcheck(OPS.token_logps_bwd, (*upstream, logits.detach(), labels, stats, -100, 1.0, None, kernels.name))


def test_opcheck_group_loss(kernels):
    logps, ref_logps, scores = _group_arguments(kernels)
    lengths = torch.full_like(scores, 3.0)
    for name, reduction in (("nca", "mean"), ("plackett_luce", "none")):
        torch.library.opcheck(
            OPS.group_loss,
            (logps, ref_logps, scores, None, lengths, None, None, name, 0.1, 1.0, "all", 0.0, 0.2, reduction, kernels.name),
        )


def _compiler(target):
    """The default, except where PyTorch 2.6 has no code for the gradient of ``gather`` on a CPU."""
    return "aot_eager" if target.name == "torch" and VERSION < (2, 7) else "inductor"


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(target, inplace):
    """There is no graph break, and the numbers are the same."""
    logits, labels = _token_arguments(target)
    _, ref_logps, scores = _group_arguments(target)
    ref_logps, scores = ref_logps[:2, :1].contiguous(), scores[:2, :1].contiguous()

    def loss(logits, labels):
        logps = nca_kernels.sequence_logps(
            logits * 1.5, labels, shift=1, average=True, inplace_backward=inplace, backend=target.name
        )
        return nca_kernels.nca_loss(logps.view(2, 1), ref_logps, scores, backend=target.name).loss

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=_compiler(target))):
        value = function(logits, labels)
        results.append((value.detach(), *torch.autograd.grad(value, logits)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_compiles_once_for_numbers_and_sizes_that_change(target):
    """One graph serves dynamic shapes and settings that change (a schedule of beta, say)."""

    scores = torch.tensor([[0.3, 0.9]], device=target.device)

    def loss(logits, labels, ref_logps, beta, scale, softcap):
        logps = nca_kernels.sequence_logps(logits, labels, shift=1, scale=scale, softcap=softcap, backend=target.name)
        return nca_kernels.info_nca_loss(logps.view(-1, 2), ref_logps, scores, beta=beta, alpha=beta, backend=target.name).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=_compiler(target))
    for T, V, *settings in ((3, 65, 0.1, 1.0, 5.0), (4, 40, 0.2, 0.5, 7.0), (5, 33, 0.3, 0.7, 9.0)):
        logits = torch.randn(2, T, V, device=target.device, requires_grad=True)
        labels = torch.randint(V, (2, T), device=target.device)
        ref_logps = torch.randn(1, 2, device=target.device)
        results = []
        for function in (loss, compiled):
            value = function(logits, labels, ref_logps, *settings)
            results.append((value.detach(), *torch.autograd.grad(value, logits)))
        assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_compiles_packed_sequences(target):
    logits, labels = _token_arguments(target)
    bounds = torch.tensor([0, 2, 6], device=target.device)

    def loss(logits):
        return nca_kernels.sequence_logps(logits.view(6, 65), labels.view(6), shift=1, cu_seqlens=bounds, backend=target.name)

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(loss, fullgraph=True)(logits), loss(logits), rtol=1e-6)


@pytest.mark.skipif(OLD, reason="PyTorch 2.6 drops the assertion from the graph; 2.11 does not")
@pytest.mark.parametrize("bounds", [[0, 2, 10**9], [1, 6], [0, 2, 5], [0, 4, 2, 6]])
def test_compiled_segment_bounds_are_checked(bounds):
    """A compiled graph cannot raise a ValueError that depends on a tensor, but it must not read out of bounds either."""
    logits, labels = torch.randn(6, 5), torch.zeros(6, dtype=torch.int64)
    bounds = torch.tensor(bounds)

    def logps(logits, bounds):
        return nca_kernels.sequence_logps(logits, labels, shift=1, cu_seqlens=bounds)

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="cu_seqlens: wanted bounds that rise from 0"):
        torch.compile(logps, fullgraph=True)(logits, bounds)


def test_unchecked_segment_bounds_stay_inside():
    """On a GPU bounds are not checked, but nothing outside of the row may be read."""
    sums = sequence_sums(torch.ones(6), torch.tensor([-(10**12), 2, 10**12]))
    assert sums.tolist() == [2, 4]


def test_tracing_below_the_derivative_meets_the_operators(kernels):
    """Eager calls go to the autograd function directly, but fake tensors and make_fx must still see the operators."""
    inputs = [x.detach() for x in (*_token_arguments(kernels), *_group_arguments(kernels))]

    def gradients(logits, labels, logps, *constants):
        logits, logps = (x.detach().requires_grad_() for x in (logits, logps))
        tokens = nca_kernels.token_logps(logits, labels, backend=kernels.name)
        loss = nca_kernels.nca_loss(logps, *constants, backend=kernels.name).loss
        return torch.autograd.grad(tokens.sum() + loss, (logits, logps))

    traced = make_fx(gradients, tracing_mode="fake")(*inputs)
    targets = [node.target for node in traced.graph.nodes]
    for op in (OPS.token_logps, OPS.token_logps_bwd, OPS.group_loss):
        assert targets.count(op.default) == 1
    for ours, wanted in zip(traced(*inputs), gradients(*inputs), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("mode, backend", [("meta", "torch"), ("fake", "torch"), ("fake", "cpu")])
def test_shapes_without_numbers(mode, backend):
    """On meta and fake tensors nothing reads values, which do not exist."""
    with torch.device("meta") if mode == "meta" else FakeTensorMode():
        logits, hidden, weight = (torch.zeros(shape) for shape in ((2, 3, 5), (2, 3, 4), (5, 4)))
        labels, bounds = (torch.zeros(shape, dtype=torch.int64) for shape in ((2, 3), (3,)))
        assert nca_kernels.token_logps(logits, labels, backend=backend).shape == (2, 3)
        assert nca_kernels.linear_token_logps(hidden, weight, labels, backend=backend).shape == (2, 3)
        packed = nca_kernels.sequence_logps(logits.view(6, 5), labels.view(6), cu_seqlens=bounds, backend=backend)
        assert packed.shape == (2,)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps_the_operators(kernels):
    logits, labels = _token_arguments(kernels, requires_grad=False)
    stacked = torch.stack([logits, 2 * logits])
    tokens = torch.func.vmap(lambda x: nca_kernels.token_logps(x, labels, backend=kernels.name))(stacked)
    assert torch.equal(tokens[1], nca_kernels.token_logps(2 * logits, labels, backend=kernels.name))


@pytest.mark.skipif(OLD, reason="PyTorch 2.6 cannot read the bounds inside a transform; 2.11 can")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_are_refused_or_exact(kernels):
    """torch.func.grad and similar transforms give a clear error on kernels and exact results on ``torch``, also when packed."""
    logits, labels = _token_arguments(kernels, requires_grad=False)
    bounds = torch.tensor([0, 2, 6], device=kernels.device)

    def packed(logits, backend):
        return nca_kernels.sequence_logps(
            logits.view(6, 65), labels.view(6), shift=1, cu_seqlens=bounds, backend=backend
        ).square().sum()  # fmt: skip

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="torch.func.grad, vjp, jvp and what is made of them: .*backend='torch'"):
            transform(packed)(logits, kernels.name)
        leaf = logits.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(packed(leaf, "torch"), leaf)
        assert torch.allclose(transform(packed)(logits, "torch"), wanted, rtol=1e-5, atol=1e-7)


def test_inplace_backward_is_seen_by_autograd(kernels):
    """An operator that needs the logits after the gradient has overwritten them gets PyTorch's error, not a wrong number."""
    logits, labels = _token_arguments(kernels)

    def logps(x):
        return nca_kernels.token_logps(x, labels, inplace_backward=True, backend=kernels.name).sum()

    again, twice, beside = (logits * 1 for _ in range(3))
    total = logps(again)
    total.backward(retain_graph=True)
    activated = torch.tanh(logits)  # its backward reads its own output
    for later in (total, logps(twice) + logps(twice), beside.square().sum() + logps(beside), logps(activated)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()


def test_second_derivatives_are_refused(kernels):
    """Without a second derivative a kernel raises a clear error and never returns a wrong number."""
    logits, labels = _token_arguments(kernels)
    logps = nca_kernels.token_logps(logits, labels, backend=kernels.name)
    (grad,) = torch.autograd.grad(logps.sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        grad.square().sum().backward()
    logps = nca_kernels.token_logps(logits * 1, labels, inplace_backward=True, backend=kernels.name)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        torch.autograd.grad(logps.sum(), logits, create_graph=True)
    leaf, ref_logps, scores = _group_arguments(kernels)
    loss = nca_kernels.nca_loss(leaf, ref_logps, scores, backend=kernels.name).loss
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_second_derivatives_are_exact_on_torch():
    torch.manual_seed(2)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 4, -100], [3, 2, 1]])
    ref_logps, scores = torch.randn(2, 1, 2, dtype=torch.float64)

    def loss(logits):
        logps = nca_kernels.sequence_logps(logits, labels, shift=1, softcap=3.0, backend="torch")
        return nca_kernels.nca_loss(logps.view(1, 2), ref_logps, scores, backend="torch").loss

    assert torch.autograd.gradgradcheck(loss, logits)

    def packed(logits):
        return nca_kernels.sequence_logps(
            logits.view(6, 5), labels.view(6), cu_seqlens=torch.tensor([0, 4, 6]), average=True, backend="torch"
        ).square()

    assert torch.autograd.gradgradcheck(packed, logits)


def test_bitwise_the_same_from_run_to_run(kernels):
    """Ten runs on one to four threads agree: there are no atomics, one thread computes a row, and losses are added in order."""
    torch.manual_seed(3)
    logits = torch.randn(3, 17, 5003, device=kernels.device)
    labels = torch.randint(5003, (3, 17), device=kernels.device)
    leaf, ref_logps, scores = torch.randn(3, 1100, 4, device=kernels.device)  # enough for several threads
    leaf.requires_grad_()
    outcomes, threads = set(), torch.get_num_threads()
    for run in range(3 if kernels.interpreted else 10):
        torch.set_num_threads(1 + run % 4)
        x = logits.clone().requires_grad_()
        logps = nca_kernels.token_logps(x, labels, backend=kernels.name)
        logps.sum().backward()
        loss = nca_kernels.nca_loss(leaf, ref_logps, scores, backend=kernels.name).loss
        (dlogps,) = torch.autograd.grad(loss, leaf)
        outcomes.add(tuple(t.detach().cpu().numpy().tobytes() for t in (logps, x.grad, loss, dlogps)))
    torch.set_num_threads(threads)
    assert len(outcomes) == 1
