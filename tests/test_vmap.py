"""Per-sample values and gradients: ``vmap`` and ``vmap(grad)`` on backend ``torch``, and the errors of the kernels."""

import pytest
import torch

import nca_kernels

OLD = torch.torch_version.TorchVersion(torch.__version__) < (2, 11)
pytestmark = [
    pytest.mark.skipif(OLD, reason="PyTorch 2.6 cannot read the bounds inside a transform; 2.11 can"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
B, T, V = 3, 6, 11


def _token_logps(logits, labels, bounds):
    return nca_kernels.token_logps(logits, labels, softcap=3.0, backend="torch").sum()


def _sequence_logps(logits, labels, bounds):
    return nca_kernels.sequence_logps(logits[None], labels[None], shift=1, average=True, backend="torch").sum()


def _packed(logits, labels, bounds):
    options = {"shift": 1, "average": True, "backend": "torch"}
    return nca_kernels.sequence_logps(logits, labels, cu_seqlens=bounds, **options).square().sum()


def _token_stats(logits, labels, bounds):
    stats = nca_kernels.token_stats(logits, labels, entropy_gradient=True, backend="torch")
    return stats.logps.sum() + stats.lse.square().sum() - stats.entropy.sum() + stats.top1.sum()


def _selective(logits, labels, bounds):
    labels = labels.clamp(min=0)
    return nca_kernels.selective_log_softmax(logits, torch.stack((labels, labels), -1), temperature=0.7).square().sum()


FUNCTIONS = [_token_logps, _sequence_logps, _packed, _token_stats, _selective]


@pytest.fixture
def samples():
    torch.manual_seed(0)
    labels = torch.randint(V, (B, T))
    labels[1, 2] = -100
    return torch.randn(B, T, V, dtype=torch.float64), labels, torch.tensor([[0, 2, T], [0, 5, T], [0, 0, T]])


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (0, 0, None), (0, None, 0), (None, 0, 0)])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_argument_may_be_mapped(samples, function, mapped):
    arguments = [values if dim == 0 else values[0] for values, dim in zip(samples, mapped, strict=True)]
    one_by_one = [[values[b] if dim == 0 else values for values, dim in zip(arguments, mapped, strict=True)] for b in range(B)]
    values = torch.vmap(function, in_dims=mapped)(*arguments)
    gradients = torch.vmap(torch.func.grad(function), in_dims=mapped)(*arguments)
    for b, own in enumerate(one_by_one):
        leaf = own[0].clone().requires_grad_()
        wanted = function(leaf, *own[1:])
        assert torch.allclose(values[b], wanted)
        assert torch.allclose(gradients[b], torch.autograd.grad(wanted, leaf)[0])


def test_what_is_not_mapped_is_checked_as_ever(samples):
    logits, labels, _ = samples
    with pytest.raises(IndexError, match="labels: the label 11"):
        torch.vmap(lambda x: nca_kernels.token_logps(x, torch.full_like(labels[0], V), backend="torch"))(logits)
    labels[1, 0] = V
    mapped = torch.vmap(lambda x, y: nca_kernels.token_logps(x, y, backend="torch"))(logits, labels)
    assert mapped.isnan().nonzero().tolist() == [[1, 0]]  # as on a GPU


def test_the_kernels_name_the_backend_that_can(kernels, samples):
    logits, labels, _ = (values.to(kernels.device) for values in samples)
    with pytest.raises(NotImplementedError, match="backend='torch'"):
        torch.vmap(torch.func.grad(lambda x, y: nca_kernels.token_logps(x, y, backend=kernels.name).sum()))(logits.float(), labels)
