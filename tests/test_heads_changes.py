"""model_logps when the model changes: learned scales, changed configurations, compiled and deleted models, changed outputs."""

import copy
import gc

import pytest
import torch
from architectures import batch, tiny
from test_heads import own_logps
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import nca_kernels
from nca_kernels.integrations.models.heads import model_logps

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def same(model, inputs, called=None):
    ours, own = model_logps(model if called is None else called, *inputs), own_logps(model, *inputs)
    torch.testing.assert_close(ours.detach(), own.detach(), rtol=1e-5, atol=1e-5)


def with_scale(value=0.5, trained=True, divide=False):
    model = tiny("llama")
    model.logit_scale = nn.Parameter(torch.tensor(value), requires_grad=trained)

    def scaled(_module, _inputs, logits):
        return logits / model.logit_scale if divide else logits * model.logit_scale

    model.lm_head.register_forward_hook(scaled)
    return model


# --- learned and changed maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_learned_scale_is_refused_by_name(divide, compiled):
    model = with_scale(divide=divide)
    called = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        with pytest.raises(ValueError, match=r"head of LlamaForCausalLM.* its logits depend on logit_scale, which would get no"):
            model_logps(called, *batch())


def test_a_learned_softcap_is_refused_by_name():
    model = tiny("llama")
    model.cap = nn.Parameter(torch.tensor(3.0))
    model.lm_head.register_forward_hook(lambda _m, _i, logits: model.cap * torch.tanh(logits / model.cap))
    with pytest.raises(ValueError, match="depend on cap,"):
        model_logps(model, *batch())


def test_a_learned_scale_is_followed_where_it_needs_no_gradient():
    """A changed scale is used if it is frozen or gradients are off, and refused as soon as it is trained."""
    model, inputs = with_scale(), batch()
    for value in (0.5, 0.7, 0.7, 2.0):
        with torch.no_grad():
            model.logit_scale.fill_(value)
            same(model, inputs)
    model.logit_scale.requires_grad_(False)
    same(model, inputs)
    model.logit_scale.fill_(0.25)
    same(model, inputs)
    model.logit_scale.requires_grad_(True)
    with pytest.raises(ValueError, match="depend on logit_scale"):
        model_logps(model, *inputs)
    with torch.no_grad():
        same(model, inputs)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("granite", [("config", "logits_scaling", 1.0), ("config", "logits_scaling", 8.0)]),
        ("gemma2", [("config", "final_logit_softcapping", 5.0), ("config", "final_logit_softcapping", None)]),
        ("cohere", [("", "logit_scale", 1.0), ("", "logit_scale", 0.3003)]),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_configuration_changed_after_first_use_is_followed(name, changes, compiled):
    model, inputs = tiny(name), batch()
    called = torch.compile(model, backend="eager") if compiled else model
    same(model, inputs, called)
    for owner, attribute, value in changes:
        setattr(model.config if owner else model, attribute, value)
        same(model, inputs, called)
        same(model, inputs, called)


def test_gradients_after_a_change():
    model, inputs = tiny("granite"), batch()
    model_logps(model, *inputs)
    model.config.logits_scaling = 1.0
    gradients = []
    for logps in (model_logps, own_logps):
        model.zero_grad()
        logps(model, *inputs).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, ours in gradients[0].items():
        torch.testing.assert_close(ours, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_a_map_that_changes_at_every_call_is_refused():
    model = tiny("llama")
    calls = iter(range(1, 100))
    model.lm_head.register_forward_hook(lambda _m, _i, logits: logits * (1 + next(calls) // 3))
    with pytest.raises(ValueError, match="model: "):
        for _ in range(4):
            model_logps(model, *batch())


def test_one_token():
    model = tiny("gemma2")
    input_ids = torch.tensor([[7, 9]])
    same(model, (input_ids, torch.ones_like(input_ids), input_ids))
    model.config.final_logit_softcapping = 4.0
    same(model, (input_ids, torch.ones_like(input_ids), input_ids))


# --- outputs changed in place ----------------------------------------------------------------------------------------


def _changes():
    def scaled(logps):
        logps *= 2
        return logps

    def filled(logps):
        return logps.masked_fill_(torch.arange(logps.numel()).view(logps.shape) % 3 == 0, 0.0)

    def assigned(logps):
        logps[..., -1] = 0
        return logps

    return [scaled, filled, assigned]


def _linear(function, trained):
    torch.manual_seed(0)
    leaves = torch.randn(2, 7, 8, requires_grad=True), torch.randn(31, 8, requires_grad=trained)
    labels = torch.randint(31, (2, 7))
    results = function(*leaves, labels, backend="cpu")
    return [results] if isinstance(results, torch.Tensor) else [results.logps, results.lse], [x for x in leaves if x.requires_grad]


def _of_model(_trained):
    model = tiny("llama")
    return [model_logps(model, *batch())], [model.lm_head.weight]


PRODUCERS = {
    "linear_token_logps": lambda trained: _linear(nca_kernels.linear_token_logps, trained),
    "linear_sequence_logps": lambda trained: _linear(nca_kernels.linear_sequence_logps, trained),
    "linear_token_stats": lambda trained: _linear(nca_kernels.linear_token_stats, trained),
    "model_logps": _of_model,
}


@pytest.mark.parametrize("change", _changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("producer", PRODUCERS.values(), ids=PRODUCERS)
def test_outputs_may_be_changed_in_place(producer, trained, change):
    changed, leaves = producer(trained)
    kept, other_leaves = producer(trained)
    ours = torch.autograd.grad(sum(change(values).square().sum() for values in changed), leaves)
    wanted = torch.autograd.grad(sum(change(values.clone()).square().sum() for values in kept), other_leaves)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


# --- compiled models -------------------------------------------------------------------------------------------------


def test_models_are_compiled_scored_and_dropped():
    """A further model neither breaks the guards of another one nor recompiles it."""
    torch._dynamo.reset()
    first, inputs = tiny("llama"), batch()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(first, backend=counter)
    for _ in range(3):
        same(first, inputs, compiled)
    frames = counter.frame_count
    for name in ("granite", "gemma2", "llama"):
        other = tiny(name)
        same(other, inputs, torch.compile(other, backend="eager"))
        same(first, inputs, compiled)
        del other
        gc.collect()
        same(first, inputs, compiled)
    copied = copy.deepcopy(first)
    same(copied, inputs)
    same(first, inputs, compiled)
    assert counter.frame_count == frames


@pytest.mark.parametrize("way", ["whole", "in place"])
def test_graphs_over_a_dozen_lengths(way):
    torch._dynamo.reset()
    model = tiny("llama")
    counter = CompileCounterWithBackend("eager")
    called = torch.compile(model, backend=counter) if way == "whole" else model
    if way == "in place":
        model.compile(backend=counter)
    counts = []
    for T in (5, 7, 8, 9, 12, 15, 17, 20, 23, 27, 31, 34):
        input_ids = torch.randint(1, 90, (2, T))
        model_logps(called, input_ids, torch.ones_like(input_ids), input_ids).sum().backward()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1], counts  # the first length, then all of them


def test_float32_logits_of_a_bfloat16_model():
    model, inputs = tiny("llama").bfloat16(), batch()
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    logps = model_logps(model, *inputs, logits_dtype=torch.float32)
    exact = nca_kernels.linear_token_logps(hidden[-1].double(), model.lm_head.weight.double(), inputs[2], shift=1, backend="torch")
    assert (logps - exact).abs().max() <= 1e-5
