"""Adapters that were saved earlier are merged or trained further; the reference is the initial policy."""

import copy

import pytest
import torch
from architectures import tiny
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from training import assert_same_weights, config, logged, make_rows, trained, weights
from transformers import AutoModelForCausalLM

from nca_kernels.integrations.training.trainer import NCATrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], **options})


@pytest.fixture(scope="module", params=["lora", "dora", "trained head"])
def saved(request, tmp_path_factory):
    """A saved adapter that changes its base, and the model with the adapter merged."""
    base, folder = str(tmp_path_factory.mktemp("base")), str(tmp_path_factory.mktemp("adapter"))
    tiny("llama").save_pretrained(base)
    options = {"lora": {}, "dora": {"use_dora": True}, "trained head": {"modules_to_save": ["lm_head"]}}[request.param]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model.merge_and_unload().requires_grad_(True)


def zero_reward(trainer):
    """Check that at the first step the rewards are 0 and the loss is that of zero rewards."""
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(1.386294, abs=2e-5)
    assert first["kl"] == pytest.approx(0, abs=2e-5)
    assert abs(logged(trainer, "logps/best_change")[-1]) > 1e-3


@pytest.mark.parametrize("reference", ["precompute", "model"])
def test_a_saved_adapter_is_merged_under_a_new_one(saved, reference, tmp_path, capsys):
    folder, whole = saved
    trainer = trained(tmp_path / "a", make_rows(8), folder, peft_config=lora(), reference=reference)
    assert f"adapter  {folder} is merged into its base" in capsys.readouterr().out
    zero_reward(trainer)
    wanted = trained(tmp_path / "b", make_rows(8), copy.deepcopy(whole), peft_config=lora(), reference=reference)
    assert logged(trainer, "logps/best") == pytest.approx(logged(wanted, "logps/best"), rel=1e-5)


@pytest.mark.parametrize("reference", ["precompute", "model"])
def test_a_saved_adapter_goes_on_being_trained(saved, reference, tmp_path, capsys):
    folder, whole = saved
    trainer = trained(tmp_path / "a", make_rows(8), folder, reference=reference)
    assert f"adapter  {folder} of the base" in capsys.readouterr().out
    assert isinstance(trainer.model, PeftModel)
    zero_reward(trainer)
    wanted = trained(tmp_path / "b", make_rows(8), copy.deepcopy(whole), reference=reference, learning_rate=0.0)
    assert logged(trainer, "logps/best")[0] == pytest.approx(logged(wanted, "logps/best")[0], rel=1e-5)
    again = trained(tmp_path / "c", make_rows(8), PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True))
    assert logged(again, "loss") == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    start = {name: torch.zeros_like(tensor) for name, tensor in weights(again).items()}
    assert_same_weights(weights(again), weights(trainer), start)


@pytest.mark.parametrize("reference", ["precompute", "model"])
def test_prefix_tuning(reference, tmp_path):
    """The base has no PEFT layers; the reference is the policy with its initial prefix."""
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    zero_reward(trained(tmp_path, make_rows(8), peft_config=prefix, reference=reference))


def test_virtual_tokens_before_the_prompt_are_refused(tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="labels: .* no virtual tokens"):
        NCATrainer(tiny("llama"), config(tmp_path), make_rows(4), peft_config=prompt)


def test_what_trains_nothing_is_refused_before_the_reference_pass(saved, tmp_path):
    folder, _ = saved
    for model in (tiny("llama"), AutoModelForCausalLM.from_pretrained(folder)):
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="model: none of its weights is trained"):
            NCATrainer(model, config(tmp_path), make_rows(4))
    with pytest.raises(ValueError, match="peft_config: model has an adapter already"):
        NCATrainer(AutoModelForCausalLM.from_pretrained(folder), config(tmp_path), make_rows(4), peft_config=lora())
    assert not list(tmp_path.iterdir())


def test_model_init_kwargs(saved, tmp_path):
    base = saved[1].config._name_or_path
    trainer = NCATrainer(base, config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}), make_rows(4))
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="model_init_kwargs: got {'attn_implementation': 3}"):
        NCATrainer(base, config(tmp_path, model_init_kwargs={"attn_implementation": 3}), make_rows(4))
