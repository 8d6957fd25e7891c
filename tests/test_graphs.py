"""How many graphs torch.compile makes of the functions of logits for a dozen lengths; torch.export with a dynamic length."""

import pytest
import torch

import nca_kernels

OLD = torch.torch_version.TorchVersion(torch.__version__) < (2, 11)
LENGTHS = (9, 3, 17, 5, 24, 2, 19, 8, 21, 40, 13, 6)
V = 19


def _token_logps(logits, labels, bounds, **options):
    return nca_kernels.token_logps(logits[None], labels[None], shift=1, softcap=9.0, **options)


def _sequence_logps(logits, labels, bounds, **options):
    return nca_kernels.sequence_logps(logits[None], labels[None], shift=1, average=True, **options)


def _packed(logits, labels, bounds, **options):
    return nca_kernels.sequence_logps(logits, labels, shift=1, average=True, cu_seqlens=bounds, **options)


def _token_stats(logits, labels, bounds, **options):
    stats = nca_kernels.token_stats(logits, labels, entropy_gradient=True, **options)
    return stats.logps + stats.lse - stats.entropy + stats.top1


def _inplace(logits, labels, bounds, **options):
    return nca_kernels.token_logps(logits * 2, labels, inplace_backward=True, **options)


def _selective(logits, labels, bounds, backend):
    return nca_kernels.selective_log_softmax(logits, labels, temperature=0.7, row_mask=labels != 3)


def _selective_of_several(logits, labels, bounds, backend):
    return nca_kernels.selective_log_softmax(logits[None], torch.stack((labels, labels), -1)[None])


FUNCTIONS = [_token_logps, _sequence_logps, _packed, _token_stats, _inplace, _selective, _selective_of_several]


@pytest.fixture(autouse=True)
def _as_a_user(request, target, monkeypatch):
    """A function without a backend argument runs on a user's default, without Triton's interpreter, so one run is enough."""
    if request.node.callspec.params["function"] in (_selective, _selective_of_several):
        if target.name != "cpu":
            pytest.skip("takes no backend, so one target is enough")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _arguments(M, target, requires_grad=True):
    torch.manual_seed(M)
    logits = torch.randn(M, V, device=target.device, requires_grad=requires_grad)
    bounds = torch.tensor(sorted({0, M // 3, M // 2, M}), device=target.device)
    return logits, torch.randint(V, (M,), device=target.device), bounds


@pytest.mark.long  # twelve compilations for each backend and function: a quarter of the time of all other tests
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_two_graphs_for_a_dozen_lengths(target, function):
    """One for the first length and one for all others."""
    if target.interpreted:
        pytest.skip("the interpreter takes minutes, and the graphs are those of the cpu kernels with another backend's name")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()

    def call(*arguments):
        return function(*arguments, backend=target.name)

    compiled = torch.compile(call, fullgraph=True, backend=count)
    for M in LENGTHS:
        arguments = _arguments(M, target)
        ours, wanted = compiled(*arguments), call(*arguments)
        assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)
        (gradient,), (same) = torch.autograd.grad(ours.sum(), arguments[0]), torch.autograd.grad(wanted.sum(), arguments[0])
        assert torch.allclose(gradient, *same, rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 2


@pytest.mark.skipif(OLD, reason="PyTorch 2.6 exports no operator of a library that is defined in Python")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_exports_with_a_dynamic_length(target, function):
    class Module(torch.nn.Module):
        def forward(self, logits, labels, bounds):
            return function(logits, labels, bounds, backend=target.name)

    M = torch.export.Dim("M", min=4, max=1 << 20)
    S = torch.export.Dim("S", min=3, max=1 << 20)
    shapes = {"logits": {0: M}, "labels": {0: M}, "bounds": {0: S}}
    program = torch.export.export(Module(), _arguments(9, target, False), dynamic_shapes=shapes)
    for length in (9, 17):
        arguments = _arguments(length, target, False)
        assert torch.allclose(program.module()(*arguments), Module()(*arguments), rtol=1e-5, atol=1e-6)
