"""The vocabulary-parallel head on 1 to 4 processes: the same numbers as on one, and the same bits on every rank."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("linear_worker.py")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks(ranks, tmp_path):
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen([*command, str(rank), str(ranks), str(tmp_path / "store")], stdout=-1, stderr=-2, text=True)
        for rank in range(ranks)
    ]
    outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
