"""One rank of test_modes: it runs a mode by its name for three steps from the same start; the main rank saves the outcome."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
from architectures import tiny
from peft import LoraConfig
from torch import nn
from training import NF4, config, make_rows, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nca_kernels.integrations.data.collator import group_logps
from nca_kernels.integrations.training.plots import PlotsCallback
from nca_kernels.integrations.training.policy import policy_of
from nca_kernels.integrations.training.trainer import NCATrainer

# As smooth as SGD where gradients vanish, and with a state, which PyTorch's sharded checkpoints want.
OPTIONS = {"optim": "adamw_torch", "adam_epsilon": 0.1, "learning_rate": 0.05, "max_grad_norm": 1e9, "num_train_epochs": 1}


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], **options})


HEAD = {"modules_to_save": ["lm_head"]}
DORA = {"use_dora": True}
FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def zero(stage, **more):
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


BF16 = {"bf16": {"enabled": "auto"}}
# Of each mode: the options of NCAConfig and, under "_", how model and reference are made.
MODES = {
    "ddp": {},
    "lora": {"_lora": {}},
    "dora": {"_lora": DORA},
    "qlora": {"_lora": {}, "_nf4": True, "optim": "paged_adamw_32bit", "activation_checkpointing": True},
    "offloaded": {"_lora": {}, "_offloaded": True},
    "offloaded_model": {"_lora": {}, "_offloaded": True, "reference": "model"},
    "offloaded_ref_model": {"_ref_offloaded": True},
    "fsdp2": {"fsdp_config": {}},
    "fsdp2_checkpointed": {"fsdp_config": {"activation_checkpointing": True}},
    "fsdp2_unsharded_forward": {"fsdp_config": {"reshard_after_forward": False}},
    "fsdp2_lora": {"fsdp_config": {}, "_lora": {}},
    "fsdp2_lora_head": {"fsdp_config": {}, "_lora": HEAD},
    "fsdp2_lora_head_model": {"fsdp_config": {}, "_lora": HEAD, "reference": "model"},
    "fsdp2_lora_checkpointed": {"fsdp_config": {"activation_checkpointing": True}, "_lora": {}},
    "fsdp2_lora_unsharded_forward": {"fsdp_config": {"reshard_after_forward": False}, "_lora": {}},
    "fsdp2_lora_unsharded_forward_model": {"fsdp_config": {"reshard_after_forward": False}, "_lora": HEAD, "reference": "model"},
    "zero2": {"deepspeed": zero(2)},
    "zero2_kto_model": {"deepspeed": zero(2), "loss": "kto", "reference": "model"},
    "zero2_bf16": {"deepspeed": zero(2, **BF16), "bf16": True},
    "zero2_bf16_model": {"deepspeed": zero(2, **BF16), "bf16": True, "reference": "model"},
    "zero3": {"deepspeed": zero(3)},
    "zero3_init": {"deepspeed": zero(3), "_by_name": True},
    "zero3_init_lora": {"deepspeed": zero(3), "_by_name": True, "_lora": {}},
    "zero3_init_model": {"deepspeed": zero(3), "_by_name": True, "reference": "model"},
    "zero3_ref_model": {"deepspeed": zero(3), "_by_name": True, "_ref_by_name": True, "reference": "model"},
    "zero3_bf16": {"deepspeed": zero(3, **BF16), "bf16": True, "_by_name": True},
}


class PlainLogits(NCATrainer):
    """The yardstick: the model's own logits, a softmax and a gather."""

    def compute_logps(self, model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:].clamp(min=0)
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        logps = nn.functional.pad(logps * (batch["labels"][:, 1:] != -100), (0, 1))
        return group_logps(logps, batch)


def made(folder, by_name, offloaded, quantised=None):
    if offloaded:
        places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
        return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "offload")
    if quantised:
        return AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=BitsAndBytesConfig(**NF4))
    if by_name:
        return str(folder / "model") if by_name is True else AutoModelForCausalLM.from_pretrained(folder / by_name)
    return tiny("llama")


def run(mode, folder, processes, plain):
    """The losses, gradient norms, first metrics and weights of three steps of 4 prompts."""
    options = {**OPTIONS, **MODES[mode]}
    how = {name: options.pop(name) for name in list(options) if name.startswith("_")}
    sharded = "fsdp_config" in options
    if plain:  # one process, no sharding, no offloading
        for name in ("fsdp_config", "deepspeed", "optim", "bf16", "activation_checkpointing"):
            options.pop(name, None)
        options["optim"] = "adamw_torch"
        how = {name: value for name, value in how.items() if name in ("_lora", "_nf4", "_ref_by_name")}
    elif sharded:
        options |= {"fsdp": True, "fsdp_config": {**FSDP, **options["fsdp_config"]}}
    options |= {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4}
    model = made(folder, how.get("_by_name"), how.get("_offloaded"), how.get("_nf4"))
    args = config(folder / ("plain" if plain else "run") / mode, **options)  # turns zero.Init on for the models after it
    ref_model = None
    if how.get("_ref_by_name"):
        ref_model = made(folder, "reference", False)
    elif how.get("_ref_offloaded"):
        ref_model = made(folder, False, True)
    peft_config = lora(**how["_lora"]) if "_lora" in how else None
    kind = PlainLogits if plain else NCATrainer
    if mode.startswith("offloaded") and peft_config:  # PEFT's own first weights depend on where the base lies
        model, peft_config = policy_of(model, peft_config, 0), None
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_A" in name:
                parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
    trainer = kind(model, args, make_rows(12), peft_config=peft_config, ref_model=ref_model)
    trainer.remove_callback(PlotsCallback)
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.deepspeed) if trainer.is_deepspeed_enabled else weights(trainer)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    state = {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in (state or {}).items()}
    state = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
    return {"logs": logs, "weights": {name.replace("._checkpoint_wrapped_module", ""): t for name, t in state.items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(int(os.environ.get("MODES_TIMEOUT", 240)), exit=True)  # a rank that waits for one that failed
    folder, modes, plain = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3] == "plain"
    if any("fsdp_config" in MODES[mode] for mode in modes) and not plain:
        from trainer_worker import fsdp_on_the_cpu

        fsdp_on_the_cpu()
    failures = {}
    for mode in modes:
        try:
            outcome = run(mode, folder, int(os.environ.get("WORLD_SIZE", 1)), plain)
        except Exception as error:
            import traceback

            traceback.print_exc()
            failures[mode] = repr(error)
            continue
        if os.environ.get("RANK", "0") == "0":
            torch.save(outcome, folder / f"{mode}.{'plain' if plain else 'run'}.pt")
    print(json.dumps({"failures": failures}))
    sys.stdout.flush()
    # The interpreter's own exit now and then aborts over gloo's threads.
    os._exit(0)
