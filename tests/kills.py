"""Trains in child processes that are killed with SIGKILL at random moments and started again; prints the outcomes as JSON.

The parent imports everything before it forks, so that a kill hits the run and not Python's start. Arguments: ``FOLDER KILLS SEED``.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from architectures import tiny
from peft import LoraConfig
from safetensors.torch import load_file
from training import config, make_rows

from nca_kernels.integrations.training.plots import PlotsCallback
from nca_kernels.integrations.training.trainer import NCATrainer

OPTIONS = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "train_sampling_strategy": "random",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_strategy": "no",
}
CASES = {
    "whole": {},
    "lora": {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3)},
    "kto": {"loss": "kto"},
}


def train(folder, case):
    options = {**OPTIONS, **CASES[case]}
    peft_config = options.pop("peft_config", None)
    os.environ["NCA_KERNELS_CACHE"] = str(folder.parent / "cache")
    model = tiny("llama", attention_dropout=0.3)
    trainer = NCATrainer(model, config(folder, **options), make_rows(11), peft_config=peft_config)
    trainer.remove_callback(PlotsCallback)
    started = (folder / "run.yaml").exists()
    trainer.train(resume_from_checkpoint=started)
    trainer.save_model()


def child(folder, case, log):
    """Start a child that trains and writes its output to a file; return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            train(folder, case)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid):
    done, status = os.waitpid(pid, os.WNOHANG)
    return done != 0 and (os.waitstatus_to_exitcode(status),)


def chain(folder, case, draw, kills, log):
    """Kill the run ``kills`` times and let it end. Count the kills: all, before any checkpoint, and during the writing of one."""
    begin = time.perf_counter()
    alone = folder / "alone"
    assert os.waitstatus_to_exitcode(os.waitpid(child(alone, case, log), 0)[1]) == 0, log.read_text()
    length = time.perf_counter() - begin
    run = folder / "killed"
    hits = writing = early = ends = 0
    while hits < kills:
        pid = child(run, case, log)
        moment = draw.uniform(0, length)
        time.sleep(moment)
        if exit_code := ended(pid):  # the run had ended: that is no kill, and the next one starts from the beginning
            assert exit_code == (0,), log.read_text()
            assert_equal(run, alone)
            ends += 1
            os.rename(run, folder / f"ended-{ends}")
            length = min(length, moment)  # the first one took longer than it needs to, on a busy machine
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hits += 1
        writing += (run / "_unfinished").exists()
        early += not any(run.glob("checkpoint-*"))
    assert os.waitstatus_to_exitcode(os.waitpid(child(run, case, log), 0)[1]) == 0, log.read_text()
    assert_equal(run, alone)
    return {"kills": hits, "while_writing": writing, "before_a_checkpoint": early}


def assert_equal(run, alone):
    name = "adapter_model.safetensors" if (alone / "adapter_model.safetensors").exists() else "model.safetensors"
    ours, wanted = load_file(run / name), load_file(alone / name)
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(ours[key], tensor), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    outcomes = {}
    for i, case in enumerate(CASES):
        share = (kills + len(CASES) - 1 - i) // len(CASES)
        outcomes[case] = chain(folder / case, case, draw, share, folder / f"{case}.log")
    resumed = sum((folder / f"{case}.log").read_text().count("continues after step") for case in CASES)
    print(json.dumps({"outcomes": outcomes, "resumed": resumed}))
