"""Batches of groups: every layout gives each response the same log-prob as a separate row, or is refused."""

import functools

import pytest
import torch
from architectures import VOCAB, tiny

from nca_kernels import token_logps
from nca_kernels.integrations.data import shared_prompt
from nca_kernels.integrations.data.collator import LAYOUTS, GroupCollator, group_logps
from nca_kernels.integrations.data.shared_prompt import check_layout, model_inputs, tree_mask

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PAD = 0
SMALL = [
    {"prompt_ids": [11, 12, 13], "response_ids": [[21, 22], [31]], "scores": [0.5, 2.0]},
    {"prompt_ids": [14], "response_ids": [[41, 42, 43]], "scores": [1.0]},
]


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def ids(generator, n):
    return torch.randint(3, VOCAB, (n,), generator=generator).tolist()


def groups():
    """Groups with ragged K, longer than the windows below; one prompt has a single token."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(9, (5, 8, 3)), (1, (2, 6)), (4, (7,))]
    return [
        {"prompt_ids": ids(generator, P), "response_ids": [ids(generator, R) for R in Rs], "scores": [0.0] * len(Rs)}
        for P, Rs in lengths
    ]


def logps(model, batch):
    logits = model(use_cache=False, **model_inputs(model, batch)).logits
    return group_logps(token_logps(logits, batch["labels"], shift=1), batch)


def one_by_one(model, rows):
    """The log-probs ``[B, K]`` of each response after its prompt, alone in a row without padding or mask."""
    made = torch.zeros(len(rows), max(len(row["response_ids"]) for row in rows), dtype=model.dtype)
    for b, row in enumerate(rows):
        for k, response in enumerate(row["response_ids"]):
            whole = torch.tensor([row["prompt_ids"] + response])
            logits = model(input_ids=whole, use_cache=False).logits[0]
            scored = logits[len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            made[b, k] = scored.gather(1, torch.tensor(response)[:, None]).sum()
    return made


# The layouts, token by token.


def test_padded():
    batch = GroupCollator(PAD)(SMALL)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22], [11, 12, 13, 31, 0], [14, 41, 42, 43, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    ignored = -100
    assert batch["labels"].tolist() == [
        [ignored, ignored, ignored, 21, 22],
        [ignored, ignored, ignored, 31, ignored],
        [ignored, 41, 42, 43, ignored],
    ]
    assert batch["mask"].tolist() == [[True, True], [True, False]]
    assert batch["scores"].tolist() == [[0.5, 2.0], [1.0, 0.0]]
    assert batch["lengths"].tolist() == [[2, 1], [3, 0]]
    assert "position_ids" not in batch and "branches" not in batch


def test_packed():
    batch = GroupCollator(PAD, "packed")(SMALL)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 11, 12, 13, 31, 14, 41, 42, 43]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert (batch["labels"] != -100).int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 5, 9, 13]
    assert "attention_mask" not in batch  # the models tell sequences apart by the position ids only without one


def test_shared():
    batch = GroupCollator(PAD, "share_prompt")(SMALL)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 13, 31], [14, 41, 42, 43, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 3, 0, 0, 0]]
    assert batch["branches"].tolist() == [[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, -1, -1, -1]]
    assert (batch["labels"] != -100).int().tolist() == [[0, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 0]]


def test_the_tree_mask():
    branches = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 0]])
    (mask,) = tree_mask(branches, positions, None, "sdpa", torch.float32)[0].int().tolist()
    assert mask[:6] == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
    ]
    assert sum(mask[6])  # a row that sees nothing would be NaN
    (windowed,) = tree_mask(branches, positions, 2, "sdpa", torch.float32)[0].int().tolist()
    assert windowed[3] == [0, 0, 1, 1, 0, 0, 0] and windowed[4] == [0, 1, 0, 0, 1, 0, 0]
    additive = tree_mask(branches, positions, None, "eager", torch.bfloat16)[0, 0]
    assert additive.dtype == torch.bfloat16 and ((additive == 0).int().tolist()) == mask
    assert additive.min() == torch.finfo(torch.bfloat16).min


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_logps_ride_along(layout):
    rows = [{**row, "ref_logps": [-1.0 - k for k, _ in enumerate(row["response_ids"])]} for row in SMALL]
    assert GroupCollator(PAD, layout)(rows)["ref_logps"].tolist() == [[-1.0, -2.0], [-1.0, 0.0]]


def test_an_unknown_layout():
    with pytest.raises(ValueError, match="layout: got 'ragged', wanted one of 'padded', 'packed', 'share_prompt'"):
        GroupCollator(PAD, "ragged")


# The same log-probs.

MODELS = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4},  # softcapped attention, every other layer with a window
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},  # all layers with a window
}


def values_and_grads(model, function):
    """The log-probs, and the gradient of every parameter for a randomly weighted sum of them."""
    model.zero_grad()
    values = function(model)
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    (values * upstream).sum().backward()
    return {"logps": values, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@functools.cache
def of_separate_responses(name, implementation, dtype):
    model = tiny(name, attn_implementation=implementation, **MODELS[name]).to(dtype)
    return values_and_grads(model, lambda model: one_by_one(model, groups()))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, how) for name in MODELS for how in ("eager", "sdpa") if (name, how) != ("gemma2", "sdpa")],  # it has no sdpa
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_logps_and_gradients(name, implementation, layout):
    model = tiny(name, attn_implementation=implementation, **MODELS[name])
    assert model.config._attn_implementation == implementation
    batch = GroupCollator(PAD, layout)(groups())
    got = values_and_grads(model, lambda model: logps(model, batch))
    truth, peer = (of_separate_responses(name, implementation, dtype) for dtype in (torch.float64, torch.float32))
    assert got.keys() == truth.keys()
    for key, wanted in truth.items():
        off, peers = ((other[key] - wanted).abs().max() for other in (got, peer))
        assert off <= peers + 2e-6 * wanted.abs().max(), f"{key}: off by {off:.2g}, a row of its own by {peers:.2g}"
    assert not got["logps"][~batch["mask"]].any()


def test_flex_attention_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here; on a CPU transformers compiles flex attention for over a minute")
    model = tiny("llama", head_dim=16).cuda()
    model.set_attn_implementation("flex_attention")
    check_layout(model, groups(), GroupCollator(PAD, "share_prompt"))


# The check on the real model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["packed", "share_prompt"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_models_that_can_pass_the_check(name, layout, dtype):
    model = tiny(name).to(dtype).train()
    model.get_output_embeddings().eval()
    check_layout(model, groups(), GroupCollator(PAD, layout))
    assert model.training and not model.get_output_embeddings().training


BROKEN = {
    "responses see each other": lambda batch: {**batch, "branches": batch["branches"].clamp(max=1)},
    "responses do not see the prompt": lambda batch: {**batch, "branches": batch["branches"] + 1},
    "positions run on": lambda batch: {**batch, "position_ids": torch.arange(batch["labels"].shape[1])[None]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", BROKEN)
def test_the_check_sees_what_is_wrong_and_gives_both_numbers(fault, dtype, monkeypatch):
    right = shared_prompt.model_inputs

    def wrong(model, batch):
        return right(model, BROKEN[fault](batch) if "branches" in batch else batch)

    monkeypatch.setattr(shared_prompt, "model_inputs", wrong)
    message = r"share_prompt: LlamaForCausalLM gives a token the log-prob -[\d.]+ in this layout and -[\d.]+ in a row of its own"
    with pytest.raises(ValueError, match=message):
        check_layout(tiny("llama", initializer_range=0.2).to(dtype), groups(), GroupCollator(PAD, "share_prompt"))


def test_a_model_that_padding_changes_is_not_taken_for_one_that_rounds(monkeypatch):
    right = shared_prompt.model_inputs

    def wrong(model, batch):
        rows, T = batch["labels"].shape
        moved = torch.arange(T)[None] + (rows > 1)
        return {**right(model, batch), **({} if "branches" in batch else {"position_ids": moved})}

    monkeypatch.setattr(shared_prompt, "model_inputs", wrong)
    with pytest.raises(ValueError, match="share_prompt: GPT2LMHeadModel gives a token the log-prob"):
        check_layout(tiny("gpt2", initializer_range=0.2), groups(), GroupCollator(PAD, "share_prompt"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "MambaForCausalLM carries a state from token to token, .*'linear_attention'"),
        ("falcon_h1", "FalconH1ForCausalLM carries a state from token to token, .*'hybrid'"),
        ("rwkv", "RwkvForCausalLM carries a state from token to token"),
        ("bloom", "BloomForCausalLM takes no position_ids"),
        ("roberta", "RobertaForCausalLM gives a token the log-prob"),  # counts its positions from the padding id
        ("openai-gpt", "OpenAIGPTLMHeadModel fails in this layout, not in separate rows: RuntimeError"),
    ],
)
def test_models_that_cannot_are_refused(name, reason):
    with pytest.raises(ValueError, match=f"share_prompt: {reason}"):
        check_layout(tiny(name), groups(), GroupCollator(PAD, "share_prompt"))


def test_layers_of_another_kind_are_refused():
    model = tiny("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="share_prompt: Lfm2ForCausalLM carries a state from token to token, .*'conv'"):
        check_layout(model, groups(), GroupCollator(PAD, "share_prompt"))


@pytest.mark.parametrize("name", ["mamba", "opt"])
def test_models_that_mix_packed_sequences_are_refused(name):
    with pytest.raises(ValueError, match="packed: .* gives a token the log-prob"):
        check_layout(tiny(name), groups(), GroupCollator(PAD, "packed"))


def test_attention_without_masks_is_refused():
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="runs attention 'flash_attention_2', which does not take a mask of a tree; wanted .*eager, sdpa"
    ):
        check_layout(model, groups(), GroupCollator(PAD, "share_prompt"))
