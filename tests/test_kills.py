"""Runs that are killed at any moment, and a disk that fills up; of ``make test-long``, since twenty kills take minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent


def environment():
    return {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def test_twenty_kills(tmp_path, request):
    """SIGKILL at twenty random moments, checkpoints being written among them: each run ends with the bits of one never killed."""
    command = [sys.executable, str(TESTS / "kills.py"), str(tmp_path), "20", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert sum(outcome["kills"] for outcome in told["outcomes"].values()) == 20
    assert sum(outcome["while_writing"] for outcome in told["outcomes"].values()) >= 2
    assert told["resumed"] >= 10
