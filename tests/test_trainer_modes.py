"""LoRA, gradient checkpointing, bfloat16, checkpoints and resuming."""

import pytest
import torch
from architectures import tiny
from peft import LoraConfig, PeftModel
from training import NF4, assert_same_weights, logged, make_rows, trained, weights, with_ref_logps
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], **options)


def test_lora(tmp_path):
    """The base does not change and is the reference, cached or at every step; only the adapter is saved."""
    rows, model = make_rows(8), tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cached = trained(tmp_path / "a", rows, model, peft_config=lora(), save_strategy="epoch")
    assert cached.state.log_history[0]["logps/best_change"] == pytest.approx(0, abs=1e-5)
    assert abs(logged(cached, "logps/best_change")[1]) > 1e-3
    for name, tensor in cached.model.get_base_model().state_dict().items():
        assert "lora" in name or torch.equal(tensor, before[name.replace(".base_layer", "")])
    at_every_step = trained(tmp_path / "b", rows, peft_config=lora(), reference="model")
    assert logged(at_every_step, "loss") == pytest.approx(logged(cached, "loss"), rel=1e-5)
    start = {name: torch.zeros_like(tensor) for name, tensor in weights(cached).items()}
    assert_same_weights(weights(at_every_step), weights(cached), start, rtol=2e-3)
    (saved,) = (tmp_path / "a").glob("checkpoint-*")
    assert (saved / "adapter_model.safetensors").exists() and not list(saved.glob("model*"))
    loaded = PeftModel.from_pretrained(tiny("llama"), saved)
    for name, tensor in cached.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["whole", "lora"])
def test_gradient_checkpointing(peft_config, tmp_path):
    """The steps are the same although each layer is recomputed in the backward."""
    rows = with_ref_logps(make_rows(8), tiny("llama"))
    outcomes, calls = [], []
    for checkpointing in (False, True):
        model = tiny("llama")
        count = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        outcomes.append(trained(tmp_path, rows, model, gradient_checkpointing=checkpointing, peft_config=peft_config))
        calls.append(len(count))
    once, again = outcomes
    assert calls[1] - calls[0] == 2  # steps
    assert logged(again, "loss") == pytest.approx(logged(once, "loss"), rel=1e-6)
    assert_same_weights(weights(again), weights(once))


def test_bfloat16(tmp_path):
    """Autocast computes in bfloat16; weights and steps stay float32, and the reference has the precision of the policy."""
    rows = make_rows(8)
    dtypes = set()
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    low = trained(tmp_path, rows, model, bf16=True)
    high = trained(tmp_path, rows)
    assert dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in low.model.parameters())
    assert low.state.log_history[0]["kl"] == pytest.approx(0, abs=0.05)
    assert logged(low, "loss") == pytest.approx(logged(high, "loss"), rel=0.02)


@pytest.mark.parametrize("peft_config", [None, lora(lora_dropout=0.3)], ids=["whole", "lora"])
@pytest.mark.parametrize("loss", ["nca", "kto"])
def test_resume(loss, peft_config, tmp_path):
    """A run that stops in the middle of the second epoch and resumes has the same bits as without a stop, also with dropout."""
    rows = make_rows(11)
    options = {
        "loss": loss,
        "peft_config": peft_config,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    model = {"attention_dropout": 0.3}
    through = trained(tmp_path, rows, tiny("llama", **model), **options)
    assert through.state.global_step == 6
    for stopped in (2, 4):
        resumed = trained(tmp_path, rows, tiny("llama", **model), resume=str(tmp_path / f"checkpoint-{stopped}"), **options)
        assert resumed.state.global_step == 6
        assert logged(resumed, "loss") == logged(through, "loss")
        assert_same_weights(weights(resumed), weights(through))


def test_qlora_resumes(tmp_path):
    """Like :func:`test_resume`, with a base that is quantised again at every start and an optimizer in paged memory."""
    pytest.importorskip("bitsandbytes")
    tiny("llama").save_pretrained(tmp_path / "base")

    def run(**options):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=BitsAndBytesConfig(**NF4))
        options |= {"peft_config": lora(lora_dropout=0.3), "optim": "paged_adamw_32bit", "learning_rate": 1e-3}
        return trained(tmp_path, make_rows(11), base, save_strategy="steps", save_steps=1, **options)

    through = run()
    assert through.state.global_step == 3
    resumed = run(resume=str(tmp_path / "checkpoint-1"))
    assert logged(resumed, "loss") == logged(through, "loss")
    assert any(tensor.dtype == torch.uint8 for tensor in weights(resumed).values())
    assert_same_weights(weights(resumed), weights(through))


def test_checkpoints_load_as_they_are(tmp_path):
    trainer = trained(tmp_path, make_rows(4), save_strategy="epoch")
    (saved,) = tmp_path.glob("checkpoint-*")
    assert (saved / "model.safetensors").exists() and not list(saved.glob("pytorch_model*"))
    assert_same_weights(dict(AutoModelForCausalLM.from_pretrained(saved).state_dict()), weights(trainer))
