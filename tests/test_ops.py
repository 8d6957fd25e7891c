"""The operators under PyTorch's own checks, torch.compile, and repeated runs."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import nca_kernels

OPS = torch.ops.nca_kernels


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
    torch.library.opcheck(OPS.token_logps, (logits, labels, -100, 1.0, None, False, kernels.name))
    torch.library.opcheck(OPS.token_logps, (logits, labels, -100, 0.5, 3.0, False, kernels.name))
    _, stats = OPS.token_logps(logits.detach(), labels, -100, 1.0, None, False, kernels.name)
    backward = (torch.randn(2, 3, device=kernels.device), logits.detach(), labels, stats, -100, 1.0, None, kernels.name)
    torch.library.opcheck(OPS.token_logps_bwd, backward)
    torch.library.opcheck(OPS.token_logps_bwd_, backward)


def test_opcheck_group_loss(kernels):
    logps, ref_logps, scores = _group_arguments(kernels)
    for reduction in ("mean", "none"):
        torch.library.opcheck(
            OPS.group_loss,
            (logps, ref_logps, scores, None, None, None, None, "nca", 0.1, 1.0, "all", reduction, kernels.name),
        )


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(target, inplace):
    """No graph break, the same numbers."""
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
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(logits, labels)
        results.append((value.detach(), *torch.autograd.grad(value, logits)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_compiles_packed_sequences(target):
    logits, labels = _token_arguments(target)
    bounds = torch.tensor([0, 2, 6], device=target.device)

    def loss(logits):
        return nca_kernels.sequence_logps(
            logits.view(6, 65), labels.view(6), shift=1, cu_seqlens=bounds, backend=target.name
        )

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(loss, fullgraph=True)(logits), loss(logits), rtol=1e-6)


def test_tracing_below_the_derivative_meets_the_operators(kernels):
    """Fake tensors and make_fx: eager calls go to the derivative at once, and the operators must show all the same."""
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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_maps_the_operators(kernels):
    logits, labels = _token_arguments(kernels, requires_grad=False)
    stacked = torch.stack([logits, 2 * logits])
    tokens = torch.func.vmap(lambda x: nca_kernels.token_logps(x, labels, backend=kernels.name))(stacked)
    assert torch.equal(tokens[1], nca_kernels.token_logps(2 * logits, labels, backend=kernels.name))


def test_second_derivatives_are_refused(kernels):
    """A clear error where a kernel has none, never a silent wrong number."""
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
    """Ten runs, on one to four threads: no atomics, a row belongs to one thread, losses are added in order."""
    torch.manual_seed(3)
    logits = torch.randn(3, 17, 5003, device=kernels.device)
    labels = torch.randint(5003, (3, 17), device=kernels.device)
    leaf, ref_logps, scores = torch.randn(3, 1100, 4, device=kernels.device)  # enough for several threads
    leaf.requires_grad_()
    outcomes = set()
    for run in range(3 if kernels.interpreted else 10):
        torch.set_num_threads(1 + run % 4)
        x = logits.clone().requires_grad_()
        logps = nca_kernels.token_logps(x, labels, backend=kernels.name)
        logps.sum().backward()
        loss = nca_kernels.nca_loss(leaf, ref_logps, scores, backend=kernels.name).loss
        (dlogps,) = torch.autograd.grad(loss, leaf)
        outcomes.add(tuple(t.detach().cpu().numpy().tobytes() for t in (logps, x.grad, loss, dlogps)))
    torch.set_num_threads(2)
    assert len(outcomes) == 1
