"""model_logps of models inside PEFT: adapters below the head, a trained copy of it, and adapters on it."""

import pytest
import torch
from architectures import batch, tiny
from test_heads import assert_same, own_logps

from nca_kernels.integrations.models.heads import model_logps

pytestmark = [
    pytest.mark.usefixtures("default_dispatch"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def lora(name, **config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny(name), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(4)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(generator=generator)
    return model.eval()


def test_peft():
    model, inputs = lora("gemma2", target_modules=["q_proj", "v_proj"]), batch()
    assert_same(model, inputs)
    with model.disable_adapter(), torch.no_grad():
        reference = model_logps(model, *inputs)
        torch.testing.assert_close(reference, own_logps(model, *inputs), rtol=1e-5, atol=1e-5)
    assert (reference - model_logps(model, *inputs)).abs().max() > 0.1


def test_peft_trained_copy_of_the_head():
    model = lora("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.get_output_embeddings().modules_to_save["default"].weight.data.mul_(1.5)
    assert_same(model, batch())
    assert model.get_output_embeddings().modules_to_save["default"].weight.grad.abs().max() > 0


def test_peft_lora_on_the_head():
    """LoRA on the head is refused while it is active, also after a call without it; disabled or merged, the result is right."""
    model, inputs = lora("llama", target_modules=["q_proj", "lm_head"]), batch()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model_logps(model, *inputs), own_logps(model, *inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"LoRA on the head, leave it out of target_modules"):
        model_logps(model, *inputs)
    model.merge_adapter()
    torch.testing.assert_close(model_logps(model, *inputs), own_logps(model, *inputs), rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match=r"lora_A"):
        model_logps(model, *inputs)


def test_peft_lora_on_the_heads_parameter():
    """LoRA on the parameter changes the weight itself, which the head's forward reads."""
    assert_same(lora("llama", target_modules=["q_proj"], target_parameters=["lm_head.weight"]), batch())


@pytest.mark.parametrize(
    "config, settings",
    [
        ("IA3Config", {"target_modules": ["q_proj", "lm_head"], "feedforward_modules": []}),
        ("LoraConfig", {"target_modules": ["lm_head"], "use_dora": True}),
        ("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}}),
        ("VeraConfig", {"target_modules": ["lm_head"]}),
        ("HRAConfig", {"target_modules": ["lm_head"], "r": 4}),
    ],
)
def test_peft_other_adapters_on_the_head_are_refused(config, settings):
    """They are refused even if they do nothing yet, because the first step of training would change that unnoticed."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny("llama"), getattr(peft, config)(task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match="model: "):
        model_logps(model, *batch())


def test_peft_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"labels: got shape \[2, 9\], wanted \[2, 12\].*virtual tokens"):
        model_logps(model, *batch())
