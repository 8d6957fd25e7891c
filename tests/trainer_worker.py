"""One rank of test_trainer_ranks: it runs a case by its name, on gloo; the main rank saves the outcome."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from architectures import tiny
from peft import LoraConfig
from training import config, make_rows, trained, weights, with_ref_logps

from nca_kernels.integrations.training.trainer import NCATrainer


def fsdp_on_the_cpu():
    """Make accelerate take CPUs with gloo for accelerators, because it shards only on accelerators."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"])
# PyTorch 2.13 crashes where it saves a sharded optimizer without state, as plain SGD; Adam with this epsilon is as smooth.
FSDP = {"optim": "adamw_torch", "adam_epsilon": 0.1}
CASES = {
    "nca": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "kto": {"loss": "kto", "gradient_accumulation_steps": 2},
    # Evaluation ends a batch earlier on one of the ranks.
    "kto_uneven": {"loss": "kto", "accelerator_config": {"even_batches": False}},
    "lora": {"peft_config": LORA},
    "model": {"loss": "info_nca", "reference": "model"},
    "resumed": {"loss": "kto"},
    "fsdp": FSDP,
    "fsdp_accumulated": {**FSDP, "gradient_accumulation_steps": 2},
    "fsdp_model": {**FSDP, "loss": "kto", "reference": "model"},
    "fsdp_lora": {**FSDP, "peft_config": LORA},
    "fsdp_lora_resumed": {**FSDP, "peft_config": LORA},
    "fsdp_share_prompt": {**FSDP, "share_prompt": True},
    "fsdp_share_prompt_model": {**FSDP, "share_prompt": True, "reference": "model"},
    "fsdp_evaluated_scored": {**FSDP, "loss": "kto", "evaluated": True},
}


def run(case, folder, processes):
    """The outcome of a run on ``processes`` ranks, with 4 prompts per step whatever their number, and an uneven end."""
    options = dict(CASES[case])
    size = 4 // options.get("gradient_accumulation_steps", 1) // processes
    if case.startswith("fsdp") and processes > 1:
        options |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    options |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": 4 // processes}
    options |= {"eval_dataset": make_rows(5, seed=1), "save_strategy": "steps", "save_steps": 2}
    rows = make_rows(11)
    if case.endswith("scored"):  # so that no model is sharded for a reference pass
        rows, options["eval_dataset"] = (with_ref_logps(each, tiny("llama")) for each in (rows, options["eval_dataset"]))
    trainer = trained(folder / case, rows, **options)
    if case.endswith("resumed"):
        checkpoint = str(folder / case / "checkpoint-2")  # in the middle of an epoch
        trainer = trained(folder / case, make_rows(11), resume=checkpoint, **options | {"num_train_epochs": 2})
        assert trainer.state.global_step == 6
    metrics = trainer.evaluate()
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in weights(trainer).items()}
    rows = trainer.train_dataset.to_list()
    return {
        "weights": state,
        "log": [log for log in trainer.state.log_history if "loss" in log],
        "eval": metrics,
        "rows": rows,
    }


def refused_on_a_cpu(folder):
    """FSDP on a CPU is refused: accelerate would silently run DistributedDataParallel instead."""
    try:
        NCATrainer(tiny("llama"), config(folder, fsdp=True), make_rows(4))
    except ValueError as error:
        assert str(error).startswith("fsdp: accelerate shards no model on cpu"), error
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2].split(",")
    sharded = any(case.startswith("fsdp") for case in cases)
    if sharded:
        fsdp_on_the_cpu()
    for case in cases:
        outcome = run(case, folder / "ranks", int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            torch.save(outcome, folder / f"{case}.pt")
    if not sharded:
        refused_on_a_cpu(folder)
    dist.barrier()
    dist.destroy_process_group()
    # As in linear_worker: the interpreter's own exit now and then aborts over gloo's threads.
    sys.stdout.flush()
    os._exit(0)
