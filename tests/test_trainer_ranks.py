"""Two gloo processes against one: DistributedDataParallel and FSDP2 through accelerate, at the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny
from trainer_worker import CASES, run
from training import assert_same_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

WORKER = Path(__file__).with_name("trainer_worker.py")
DDP = [case for case in CASES if not case.startswith("fsdp")]
FSDP = [case for case in CASES if case.startswith("fsdp")]
REWARDS = ("rewards/accuracy", "rewards/margin", "rewards/rank_1", "rewards/rank_5")
METRICS = ("loss", *REWARDS, "logps/worst", "logps/best_change", "kl")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


@pytest.fixture(scope="module", params=[DDP, FSDP], ids=["ddp", "fsdp"])
def ranks(request, tmp_path_factory):
    """The outcomes of all cases on two processes, which are started only once."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {**address, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(WORKER), str(folder), ",".join(request.param)]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=-1, stderr=-2, text=True)
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
    return {case: torch.load(folder / f"{case}.pt") for case in request.param}


def test_same_as_one_process(ranks, tmp_path):
    """Losses, metrics, reference log-probs and weights are the same; 11 prompts, 4 per step, leave the last batches to fill up."""
    for case, ours in ranks.items():
        alone = run(case, tmp_path, 1)
        start = tiny("llama").state_dict()
        if "lora" in case:
            start = {name: torch.zeros_like(tensor) for name, tensor in alone["weights"].items()}
        assert_same_weights(ours["weights"], alone["weights"], start, rtol=2e-3)
        for our_row, row in zip(ours["rows"], alone["rows"], strict=True):
            assert our_row.get("ref_logps", []) == pytest.approx(row.get("ref_logps", []), rel=1e-5), case
        for log, wanted in zip([*ours["log"], ours["eval"]], [*alone["log"], alone["eval"]], strict=True):
            # Not at the first step, where the rewards are the rounding of zeros.
            names = ["loss"] if log.get("step") == 1 else [n for n in log if n.removeprefix("eval_") in METRICS]
            assert names
            assert [log[n] for n in names] == pytest.approx([wanted[n] for n in names], rel=2e-3, abs=1e-5), (
                case,
                names,
            )
