"""Runs that are killed at any moment, and a disk that fills up. ``make test-long`` runs these, as twenty kills take minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent


def environment():
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def test_twenty_kills(tmp_path, request):
    """SIGKILL at twenty random moments, also while a checkpoint is written: each run ends with the bits of an unkilled run."""
    command = [sys.executable, str(TESTS / "kills.py"), str(tmp_path), "20", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert sum(outcome["kills"] for outcome in told["outcomes"].values()) == 20
    assert sum(outcome["while_writing"] for outcome in told["outcomes"].values()) >= 1
    assert told["resumed"] >= 3


FULL = """
import sys
from architectures import tiny
from training import config, make_rows, trained
folder, steps, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3, "num_train_epochs": steps // 2}
trainer = trained(folder, make_rows(8), tiny("llama", hidden_size=64), resume=resume, **options)
trainer.save_model()
print("ended at step", trainer.state.global_step)
"""


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk, tmp_path):
    """The run stops and names the last good checkpoint. With free space it resumes, to the same bits as an undisturbed run."""

    def train(folder, resume):
        command = [sys.executable, "-c", FULL, str(folder), "12", resume]
        return subprocess.run(command, env={**environment(), "PYTHONPATH": str(TESTS)}, capture_output=True, text=True)

    stopped = train(small_disk / "run", "anew")
    assert stopped.returncode != 0
    last = stopped.stderr.splitlines()[-1]
    assert "cannot be written" in last and "the last good checkpoint is" in last, stopped.stderr[-2000:]
    named = Path(last.split("the last good checkpoint is ")[1])
    assert (named / "checkpoint.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = train(small_disk / "run", "resume")
    assert resumed.returncode == 0 and f"{named}: continues after step" in resumed.stdout, resumed.stderr[-2000:]
    alone = train(tmp_path / "alone", "anew")
    assert alone.returncode == 0, alone.stderr[-2000:]
    ours, wanted = (load_file(folder / "model.safetensors") for folder in (small_disk / "run", tmp_path / "alone"))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
