"""``inplace_backward``: the gradient overwrites the logits, and no other use of the logits gets a wrong gradient."""

import contextlib
import functools
import re

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import nca_kernels
from nca_kernels import _compat, memory


def _keep(saved):
    return saved


def _hooks(how):
    if how == "nested":
        stack = contextlib.ExitStack()
        for context in (saved_tensors_hooks(_keep, _keep), save_on_cpu(), saved_tensors_hooks(_keep, _keep)):
            stack.enter_context(context)
        return stack
    return {
        "identity": lambda: saved_tensors_hooks(_keep, _keep),
        "detached": lambda: saved_tensors_hooks(torch.Tensor.detach, _keep),
        "copied": lambda: saved_tensors_hooks(torch.clone, torch.clone),
        "numpy": lambda: saved_tensors_hooks(lambda t: t.detach().cpu().numpy(), torch.from_numpy),
        "save_on_cpu": save_on_cpu,
    }[how]()


HOOKS = ["identity", "detached", "copied", "numpy", "save_on_cpu", "nested"]

# What makes the logits: with its own output saved, or its input, or nothing; as they are, as a view, as a row.
MAKERS = {
    "tanh": torch.tanh,
    "softmax": lambda x: torch.softmax(x, -1),
    "product": lambda x: x * 1.5,
    "exp of a view": lambda x: torch.exp(x)[:, :-1],
    "tanh, flat": lambda x: torch.tanh(x).view(-1, x.shape[-1]),
}


def _problem(device):
    torch.manual_seed(0)
    return torch.randn(2, 4, 65, device=device, requires_grad=True), torch.randint(65, (2, 4), device=device)


def _loss(logits, labels, inplace, backend):
    labels = labels[:, : logits.shape[1]] if logits.ndim == 3 else labels.flatten()
    logps = nca_kernels.token_logps(logits, labels, inplace_backward=inplace, backend=backend)
    return (logps * torch.linspace(0.5, 1.5, logps.numel(), device=logits.device).view_as(logps)).sum()


@functools.cache
def _wanted(name, backend, device):
    """The gradient without overwriting, for the logits that ``name`` makes."""
    leaf, labels = _problem(device)
    return torch.autograd.grad(_loss(MAKERS[name](leaf), labels, False, backend), leaf)[0]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", [*HOOKS, "checkpoint", "checkpoint in hooks", "hooks in checkpoint"])
def test_saved_tensor_hooks_get_the_right_gradient(kernels, how, name):
    """PyTorch compares no versions where hooks unpack a tensor, so an overwritten one would go unnoticed."""
    if how == "numpy" and kernels.device.type != "cpu":
        pytest.skip("NumPy has no memory of a GPU")
    leaf, labels = _problem(kernels.device)

    def function(x):
        return _loss(MAKERS[name](x), labels, True, kernels.name)

    def hooked(x):
        if how == "checkpoint":
            return checkpoint(function, x, use_reentrant=False)
        if how == "checkpoint in hooks":
            with _hooks("identity"):
                return checkpoint(function, x, use_reentrant=False)
        if how == "hooks in checkpoint":

            def inner(x):
                with _hooks("identity"):
                    return function(x)

            return checkpoint(inner, x, use_reentrant=False)
        with _hooks(how):
            return function(x)

    (got,) = torch.autograd.grad(hooked(leaf), leaf)
    assert torch.equal(got, _wanted(name, kernels.name, kernels.device))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("how", HOOKS)
def test_logits_made_under_hooks(kernels, how, name):
    """The hooks hold the logits for the operator that made them, and the call itself is outside of the hooks."""
    if how == "numpy" and kernels.device.type != "cpu":
        pytest.skip("NumPy has no memory of a GPU")
    leaf, labels = _problem(kernels.device)
    with _hooks(how):
        logits = MAKERS[name](leaf)
    (got,) = torch.autograd.grad(_loss(logits, labels, True, kernels.name), leaf)
    assert torch.equal(got, _wanted(name, kernels.name, kernels.device))


def test_what_else_reads_the_logits_under_hooks(kernels):
    """Hooks that return a detached tensor or an array share the memory, which is detected."""
    leaf, labels = _problem(kernels.device)
    for how in ("detached", "copied", "numpy") if kernels.device.type == "cpu" else ("detached", "copied"):
        gradients = []
        for inplace in (False, True):
            logits = leaf * 1
            with _hooks(how):
                beside = logits.square().sum()
            gradients.append(torch.autograd.grad(beside + _loss(logits, labels, inplace, kernels.name), leaf)[0])
        assert torch.equal(*gradients), how


class _Silent:
    """A saved tensor of PyTorch before 2.10, which does not tell its hooks."""

    def __init__(self, saved):
        self.register_hooks = saved.register_hooks


@pytest.mark.parametrize("version", ["2.6", "2.8"])
def test_older_versions_of_pytorch(kernels, version, monkeypatch):
    """2.6 does not count who uses a storage, so nothing is overwritten; 2.8 and 2.9 do not tell the hooks of a saved tensor."""
    if version == "2.8" and not _compat.counts_storage_users:
        pytest.skip("this PyTorch is older than 2.8")
    tells_hooks = _compat._has_hooks
    monkeypatch.setattr(_compat, "_has_hooks", lambda saved: tells_hooks(_Silent(saved)))
    if version == "2.6":
        monkeypatch.setattr(_compat, "counts_storage_users", False)
    leaf, labels = _problem(kernels.device)
    for how in ("identity", "copied"):
        for outside in (False, True):
            with _hooks(how):
                logits = torch.tanh(leaf)
                loss = None if outside else _loss(logits, labels, True, kernels.name)
            loss = _loss(logits, labels, True, kernels.name) if outside else loss
            (got,) = torch.autograd.grad(loss, leaf)
            assert torch.equal(got, _wanted("tanh", kernels.name, kernels.device)), (how, outside)
    logits = leaf * 1.5
    before, loss = logits.detach().clone(), _loss(logits, labels, True, kernels.name)
    (got,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(got, _wanted("product", kernels.name, kernels.device))
    assert torch.equal(logits, before) == (version == "2.6")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
    for made in (torch.tanh(leaf), torch.softmax(leaf, -1)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(_loss(made, labels, True, kernels.name), leaf)


def test_overlapping_rows_are_refused(kernels):
    labels = torch.zeros(4, dtype=torch.int64, device=kernels.device)
    store = torch.randn(200, device=kernels.device)
    overlapping = {
        "unfold": store.unfold(0, 20, 5)[:4],
        "stride 1": store.as_strided((4, 20), (1, 1)),
        "one number": store.as_strided((4, 20), (19, 1)),
        "rows and columns": store.as_strided((2, 2, 20), (20, 30, 1)),
    }
    for name, logits in overlapping.items():
        message = f"inplace_backward: logits of shape {list(logits.shape)} has strides {list(logits.stride())}, rows that overlap"
        with pytest.raises(ValueError, match=re.escape(message)):
            nca_kernels.token_logps(logits, labels.view(logits.shape[:-1]), inplace_backward=True, backend=kernels.name)
        assert memory.rows_overlap(logits), name
        leaf = store.clone().requires_grad_()
        view = leaf.as_strided(logits.shape, logits.stride(), logits.storage_offset())
        y = labels.view(logits.shape[:-1])
        (grad,) = torch.autograd.grad(nca_kernels.token_logps(view, y, backend=kernels.name).sum(), leaf)
        (wanted,) = torch.autograd.grad(nca_kernels.token_logps(view, y, backend="torch").sum(), leaf)
        assert torch.allclose(grad, wanted, atol=1e-6), name


def test_rows_that_lie_between_each_other_do_not_overlap(kernels):
    store = torch.randn(500, device=kernels.device)
    apart = {
        "interleaved": ((3, 2, 10), (20, 10, 1)),
        "transposed": ((2, 3, 10), (10, 20, 1)),
        "crossed": ((2, 4, 5), (15, 10, 1)),  # 0, 10, 20, 30 and 15, 25, 35, 45
        "one row": ((1, 1, 10), (0, 0, 1)),
        "a single class": ((2, 3, 1), (3, 1, 1)),
    }
    for name, (shape, strides) in apart.items():
        logits = store.as_strided(shape, strides)
        assert not memory.rows_overlap(logits), name
        labels = torch.zeros(shape[:-1], dtype=torch.int64, device=kernels.device)
        leaf = store.clone().requires_grad_()
        gradients = []
        for inplace in (False, True):
            view = (leaf * 1).as_strided(shape, strides)
            gradients.append(torch.autograd.grad(_loss(view, labels, inplace, kernels.name), leaf)[0])
        assert torch.allclose(*gradients, atol=1e-7), name


def test_rows_that_no_kernel_reads_are_not_refused():
    """If the vocabulary is not the innermost dimension, backend torch runs, which never overwrites."""
    leaf = torch.randn(2, 10, 3, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    gradients = []
    for inplace in (False, True):
        logps = nca_kernels.token_logps(leaf.mT, labels, inplace_backward=inplace, backend="torch")
        gradients.append(torch.autograd.grad(logps.sum(), leaf)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("returned", ["logits", "view", "beside"])
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager", "eager"])
def test_a_compiled_function_may_return_its_logits(kernels, compiler, returned):
    """A compiled graph plans its own memory, so it never overwrites what it returns."""
    if compiler == "inductor" and (returned != "logits" or kernels.interpreted):
        pytest.skip("seconds each: the graph is the one that aot_eager runs, and calls the same operator on every backend")
    leaf, labels = _problem(kernels.device)

    def function(x):
        logits = x * 1.5
        logps = nca_kernels.token_logps(logits, labels, inplace_backward=True, backend=kernels.name)
        return logps, {"logits": logits, "view": logits[:, 1:], "beside": logits + 1}[returned]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    logps, logits = compiled(leaf)
    before = logits.detach().clone()
    (got,) = torch.autograd.grad(logps.sum(), leaf)
    (wanted,) = torch.autograd.grad(nca_kernels.token_logps(leaf * 1.5, labels, backend=kernels.name).sum(), leaf)
    assert torch.allclose(got, wanted, atol=1e-6)
    if compiler != "eager":  # which runs every operator as it stands, and overwrites
        assert torch.equal(logits, before)
