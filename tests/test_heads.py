"""model_logps for Hugging Face models, against log-probs from each model's own ``.logits``."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, VOCAB, batch, tiny
from oracle import assert_no_worse, plain_token_logps
from torch import nn

from nca_kernels.integrations.models import heads, post_head
from nca_kernels.integrations.models.heads import logps_for_logits, model_logps, model_token_stats

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def own_logps(model, input_ids, attention_mask, labels, compute=None):
    """The log-probs from the model's own logits."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    return plain_token_logps(logits, following, compute=compute or torch.promote_types(logits.dtype, torch.float32))


def values_and_grads(function, model, inputs, upstream):
    model.zero_grad()
    logps = function(model, *inputs)
    (logps * upstream).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), grads


def assert_same(model, inputs):
    """Compare values and the gradient of every parameter with those of the model's logits in float64; float32 is the yardstick."""
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    ours, ours_grads = values_and_grads(model_logps, model, inputs, upstream)
    peer, peer_grads = values_and_grads(own_logps, model, inputs, upstream)
    true, true_grads = values_and_grads(lambda *a: own_logps(*a, compute=torch.float64), model, inputs, upstream)
    assert ours.dtype == torch.float32
    assert (ours != 0).sum() == (true != 0).sum() > 0
    assert_no_worse(ours, true, peer, 1e-6, "logps")
    assert ours_grads.keys() == true_grads.keys() and ours_grads
    for name, grad in true_grads.items():
        # The float32 layers below magnify the head's rounding, in a gradient that should be zero most of all.
        size = grad.abs().max().clamp(min=1e-3)
        assert_no_worse(ours_grads[name] / size, grad / size, peer_grads[name] / size, 3e-6, name)


@pytest.mark.parametrize(("name", "compiled"), [("llama", False), ("gemma2", False), ("granite", False), ("gemma2", True)])
def test_token_stats(name, compiled):
    """Statistics also hold with a softcap and a scale; every other label is the most probable token."""
    model, (input_ids, attention_mask, labels) = tiny(name), batch()
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.detach().double()
    likely = F.pad(logits.argmax(-1)[:, :-1], (1, 0))
    labels = torch.where((labels != -100) & (torch.arange(labels.shape[1]) % 2 == 0), likely, labels)
    inputs = input_ids, attention_mask, labels
    following = F.pad(labels[:, 1:], (0, 1), value=-100)
    ignored = following == -100
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(2))
    called = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        stats = model_token_stats(called, *inputs)
        logps = logits.log_softmax(-1)
        for ours, wanted in (
            (stats.logps, plain_token_logps(logits, following)),
            (stats.entropy, -(logps * logps.exp()).sum(-1).masked_fill(ignored, 0.0)),
            (stats.lse, logits.logsumexp(-1).masked_fill(ignored, 0.0)),
        ):
            torch.testing.assert_close(ours.detach().double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(stats.top1, (logits.argmax(-1) == following) & ~ignored) and stats.top1.any()
        assert not stats.entropy.requires_grad and not stats.lse.requires_grad
    ours, ours_grads = values_and_grads(lambda *a: model_token_stats(*a).logps, called, inputs, upstream)
    wanted, grads = values_and_grads(model_logps, called, inputs, upstream)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    assert ours_grads.keys() == grads.keys() and grads
    for key, grad in grads.items():
        assert (ours_grads[key] - grad).abs().max() <= 1e-6 * grad.abs().max(), key


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_skip_mass(frozen):
    """It reaches the head: the log-probs are the same, and gradients differ, but not by more than they should."""
    model, inputs = tiny("llama"), batch()
    model.lm_head.weight.requires_grad_(not frozen)
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    exact, exact_grads = values_and_grads(model_logps, model, inputs, upstream)
    for mass, low, high in ((1e-30, 0.0, 1e-5), (0.3, 1e-3, 0.5)):
        for function in (model_logps, lambda *a, **k: model_token_stats(*a, **k).logps):
            ours, grads = values_and_grads(partial(function, skip_mass=mass), model, inputs, upstream)
            torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
            for name, grad in exact_grads.items():
                assert low * grad.norm() <= (grads[name] - grad).norm() <= high * grad.norm(), name


def assert_restored(model):
    input_ids, attention_mask, _ = batch()
    assert model(input_ids=input_ids, attention_mask=attention_mask).logits.shape == (*input_ids.shape, VOCAB)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    """Softcapped, scaled, biased, tied, recurrent and mixture-of-experts models all work without a table of names."""
    assert_same(tiny(name), batch())


@pytest.mark.parametrize(
    "name, scale, softcap",
    [
        ("llama", 1.0, None),
        ("cohere", 0.3, None),
        ("falcon_h1", 0.6, None),
        ("granite", 1 / 3, None),
        ("gemma2", 1.0, 2.5),
        ("nanochat", 1.0, 3.0),
        ("recurrent_gemma", 1.0, 2.0),
    ],
)
def test_what_follows_the_head_is_found(name, scale, softcap):
    model = tiny(name)
    model_logps(model, *batch())
    found = heads._FOUND[model].post_head
    assert found.scale == pytest.approx(scale, rel=2e-7)
    assert found.softcap == (None if softcap is None else pytest.approx(softcap, rel=2e-7))


def test_logits_scaled_in_place():
    model, inputs = after_head(lambda x: x.mul_(0.5)), batch()
    assert_same(model, inputs)
    assert heads._FOUND[model].post_head.scale == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit(dtype):
    """The fit finds a scale and a softcap together, even if the model rounds its logits to bfloat16."""
    known = post_head.known_values(1000, torch.device("cpu"))
    for wanted in [post_head.PostHead(0.0625, 50.0), post_head.PostHead(1 / 6, None), post_head.PostHead(1.5, 2.0)]:
        found = post_head.fit_post_head(known, wanted(known).to(dtype))
        assert found.scale == pytest.approx(wanted.scale, rel=2e-7 if dtype == torch.float32 else 1e-3)
        assert found.softcap == (None if wanted.softcap is None else pytest.approx(wanted.softcap, rel=2e-7))


def test_left_padding_shift_and_ignore_index():
    model, (input_ids, attention_mask, labels) = tiny("llama"), batch(padded="left")
    assert_same(model, (input_ids, attention_mask, labels))
    wanted = own_logps(model, input_ids, attention_mask, labels)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100).masked_fill(labels.roll(-1, 1) == -100, 7)
    shifted[:, -1] = 7
    ours = model_logps(model, input_ids, attention_mask, shifted, shift=0, ignore_index=7)
    torch.testing.assert_close(ours, wanted.masked_fill(shifted == 7, 0), rtol=1e-5, atol=1e-5)


def test_no_row_is_labelled():
    """A rank without labelled tokens must do the same forwards as the other ranks."""
    model, (input_ids, attention_mask, labels) = tiny("gemma2"), batch()
    logps = model_logps(model, input_ids, attention_mask, torch.full_like(labels, -100))
    assert torch.equal(logps, torch.zeros(labels.shape))
    assert model in heads._FOUND


def test_inspected_once_and_without_a_trace():
    model, inputs = tiny("gptj", attn_pdrop=0.3, resid_pdrop=0.3).train(), batch()
    forwards = []
    model.transformer.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(model_logps(model, *inputs).detach())
    assert forwards == [False, False, True, True]
    assert torch.equal(*runs)
    torch.manual_seed(3)
    torch.testing.assert_close(runs[0], own_logps(model, *inputs).detach(), rtol=1e-5, atol=1e-5)


def test_patch_for_a_trainer():
    model, (input_ids, attention_mask, labels) = tiny("cohere"), batch()
    outputs = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: outputs.append(tuple(output.shape)))
    with logps_for_logits(model, labels):
        logps = model(input_ids, attention_mask=attention_mask).logits
    assert outputs[-1] == (*labels.shape, 1)  # the head itself gave no logits
    torch.testing.assert_close(logps, own_logps(model, input_ids, attention_mask, labels), rtol=1e-5, atol=1e-5)
    assert_restored(model)


def test_head_runs_inside_its_hooks():
    """With FSDP, ZeRO-3 and accelerate, weights exist only between the head's own hooks."""
    model, inputs = tiny("llama"), batch()
    wanted = own_logps(model, *inputs).detach()
    head = model.lm_head
    whole = head.weight.data.clone()

    def gather(*_):
        head.weight.data = whole

    def release(*_):
        head.weight.data = torch.empty(0)

    release()
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    with torch.no_grad():
        torch.testing.assert_close(model_logps(model, *inputs), wanted, rtol=1e-5, atol=1e-5)


def test_backward_reaches_the_hooks_of_the_models_output():
    """FSDP and ZeRO-3 make the weights whole for the backward when a gradient arrives at a module's output."""
    model, inputs = tiny("gemma2"), batch()
    model_logps(model, *inputs)
    order = []
    model.lm_head.register_full_backward_hook(lambda *_: order.append("head"))
    model.register_forward_hook(lambda _m, _i, output: output.logits.register_hook(lambda grad: order.append(grad)) and None)
    model_logps(model, *inputs).sum().backward()
    assert order[1] == "head"
    assert torch.equal(order[0], torch.zeros(2, 9, 1))


def test_gradient_checkpointing():
    model = tiny("llama")
    model.train()
    model.gradient_checkpointing_enable()
    assert_same(model, batch())


def test_autocast():
    """Also at first use: older autocast reuses weights that were cast without gradients in the next forward (pytorch#158232)."""
    model, inputs = tiny("gemma2"), batch()
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    true, true_grads = values_and_grads(lambda *a: own_logps(*a, compute=torch.float64), model, inputs, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        ours, ours_grads = values_and_grads(model_logps, model, inputs, upstream)
        peer, peer_grads = values_and_grads(own_logps, model, inputs, upstream)
    assert_no_worse(ours, true, peer, 2.0**-9, "logps")
    assert ours_grads.keys() == true_grads.keys()

    def flat(grads):
        return torch.cat([grads[name].flatten() for name in true_grads])

    error, yardstick = (flat(grads) - flat(true_grads) for grads in (ours_grads, peer_grads))
    assert error.norm() <= yardstick.norm() + 2.0**-9 * flat(true_grads).norm()


def test_bfloat16_model():
    model, inputs = tiny("llama").bfloat16(), batch()
    ours, peer = model_logps(model, *inputs), own_logps(model, *inputs)
    assert ours.dtype == torch.float32
    assert_no_worse(ours, own_logps(model, *inputs, compute=torch.float64), peer, 1e-6)


def test_accelerate_offloaded_weights():
    """The weights are on the meta device except during each layer's forward, and accelerate replaces `forward` itself."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, inputs = tiny("granite"), batch()
    wanted = own_logps(model, *inputs).detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model_logps(model, *inputs), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_logps(model, *inputs), wanted, rtol=1e-5, atol=1e-5)


def test_accelerate_split_over_devices():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny("llama")
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    for module in (model, *model.model.layers, model.lm_head):
        accelerate.hooks.add_hook_to_module(module, copy.copy(hook))
    assert_same(model, batch())


@pytest.mark.parametrize("way", ["whole", "in place", "body"])
def test_torch_compile(way):
    model, inputs = tiny("granite"), batch()
    wanted = own_logps(model, *inputs).detach()
    compiled = torch.compile(model, backend="eager") if way == "whole" else model
    if way == "in place":
        model.compile(backend="eager")
    if way == "body":
        model.model = torch.compile(model.model, backend="eager")
    counts = torch._dynamo.utils.counters["stats"]
    for call in range(5):
        model_logps(compiled, *inputs)
        if call == 2:
            frames = counts["unique_graphs"]
    torch.testing.assert_close(model_logps(compiled, *inputs), wanted, rtol=1e-5, atol=1e-5)
    assert counts["unique_graphs"] == frames  # the patch of each call is not a new program


class Quantised(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight.round(), self.bias)


class TwoHeads(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.first, self.second = head, copy.deepcopy(head)

    def forward(self, input):
        return self.first(input) + self.second(input)


def with_head(wrap):
    model = tiny("llama")
    model.lm_head = wrap(model.lm_head)
    return model


def quantised(head):
    layer = Quantised(head.in_features, head.out_features, bias=False)
    layer.weight = head.weight
    return layer


def own_forward(head):
    head.forward = lambda x: F.linear(x, head.weight)
    return head


class WithoutCalling(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, input):
        return F.linear(input, self.head.weight)


@pytest.mark.parametrize(
    "wrap, message",
    [
        (quantised, r"head of LlamaForCausalLM, a test_heads.Quantised, has no plain nn.Linear"),
        (own_forward, r"has no plain nn.Linear"),
        (TwoHeads, r"is not one linear map, \['first', 'second'\]"),
        (WithoutCalling, r"none of its linear layers \['head'\] ran"),
        (lambda head: nn.Sequential(head, nn.Tanh(), nn.Softplus()), r"not softcap \* tanh"),
    ],
)
def test_refused_heads(wrap, message):
    model = with_head(wrap)
    with pytest.raises(ValueError, match=message):
        model_logps(model, *batch())
    assert model not in heads._FOUND


def after_head(function):
    """A Llama that applies ``function`` to the output of its head."""
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _m, _i, logits: function(logits))
    return model


def masked_column(logits):
    masked = torch.zeros(VOCAB, dtype=torch.bool)
    masked[5] = True
    return logits.masked_fill(masked, -1e4)


@pytest.mark.parametrize(
    "function, message",
    [
        (masked_column, r"in column 5, the model -10000"),
        (lambda x: x + 0.5, r"not softcap \* tanh\(scale \* x / softcap\)"),
        (lambda x: x.clamp(-20, 20), r"not softcap \* tanh"),
        (lambda x: -x, r"not softcap \* tanh"),
        (lambda x: 30 * torch.erf(x / 30), r"not softcap \* tanh"),
        (lambda x: x.log_softmax(-1), r"not softcap \* tanh"),
        (lambda x: x[..., :90], r"\.logits of shape \[1, 1, 90\] from a head output of \[1, 1, 99\]"),
    ],
)
def test_refused_maps(function, message):
    with pytest.raises(ValueError, match=message):
        model_logps(after_head(function), *batch())


def test_a_map_that_widens_later_is_refused():
    """A bias that is still zero is not seen when the map is fitted, but its shape shows later."""
    model = after_head(lambda x: x + torch.zeros(VOCAB))
    with pytest.raises(ValueError, match=r"its output \[2, 9, 1\] became \[2, 9, 99\]"):
        model_logps(model, *batch())


def test_mismatch_names_both_numbers(monkeypatch):
    model, inputs = tiny("llama"), batch()
    exact = post_head.linear_token_logps
    with monkeypatch.context() as patch:
        patch.setattr(post_head, "linear_token_logps", lambda *a, **k: exact(*a, **k) - 0.01)
        with pytest.raises(ValueError, match=r"log-prob (-[0-9.]+); the model's own .logits give (-[0-9.]+)") as error:
            model_logps(model, *inputs)
    ours, own = (float(word.strip(".;")) for word in str(error.value).split() if word.startswith("-"))
    assert ours == pytest.approx(own - 0.01, abs=1e-5)
    model_logps(model, *inputs)  # not remembered as good or bad


def test_several_predicting_heads_are_refused():
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "decoder_ffn_dim": 48, "ngram": 2, "is_encoder_decoder": False}
    sizes |= {
        "num_decoder_layers": 2,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 64,
        "is_decoder": True,
    }
    prophetnet = pytest.importorskip("transformers.models.prophetnet", reason="transformers without ProphetNet")
    model = prophetnet.ProphetNetForCausalLM(prophetnet.ProphetNetConfig(**sizes, add_cross_attention=False)).eval()
    with pytest.raises(ValueError, match="model: "):
        model_logps(model, *batch())


def test_bad_arguments():
    model, (input_ids, attention_mask, labels) = tiny("llama"), batch()
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 8\], wanted \[2, 9\]"):
        model_logps(model, input_ids, attention_mask, labels[:, 1:])
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 9\], wanted \[2, 4\].*logits_to_keep"):
        model_logps(model, input_ids, attention_mask, labels, logits_to_keep=4)
    with pytest.raises(ValueError, match="past_key_values"):
        model_logps(model, input_ids, attention_mask, labels, past_key_values=object())
    with pytest.raises(ValueError, match="wanted an output with .logits"):
        model_logps(model, input_ids, attention_mask, labels, return_dict=False)
    with pytest.raises(TypeError, match="got Linear, wanted a transformers causal LM"):
        model_logps(nn.Linear(2, 2), input_ids, attention_mask, labels)
    with pytest.raises(TypeError, match="nn.DataParallel"):
        model_logps(nn.DataParallel(model), input_ids, attention_mask, labels)
    with pytest.raises(ValueError, match="names no head|has no plain"):
        model_logps(model.model, input_ids, attention_mask, labels)
    with pytest.raises(IndexError):
        model_logps(model, input_ids, attention_mask, labels.masked_fill(labels > 0, VOCAB))
    outer = nn.Module()
    outer.module = model
    with pytest.raises(RuntimeError, match="wanted a call of that module"), logps_for_logits(outer, labels):
        model(input_ids)
    assert_restored(model)
