"""The results of the CUDA kernels without a GPU: they are compiled for the CPU (``tests/cuda_emulation``).

They run in a separate process, because undefined behaviour in a kernel ends the process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import build, compiler, rewrite
from sanitize import FILES, SELECT

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The folder of the emulated extension."""
    if compiler() is None:
        pytest.skip("no C++ compiler: neither CXX nor c++ is on PATH")
    return build(tmp_path_factory.mktemp("cuda_emulated")).parent


@pytest.mark.parametrize(
    "arguments", [[*SELECT, *FILES], ["cuda_emulation/cases.py"]], ids=["every backend's tests", "its own tests"]
)
def test_on_the_emulated_kernels(emulated, arguments):
    path = os.pathsep.join([str(emulated), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cuda_emulation.plugin"]
    run = subprocess.run(
        [*command, "--require-backend=cpu", *arguments],
        cwd=TESTS, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:]


def test_a_source_that_the_rewriting_misses_is_refused(monkeypatch, tmp_path):
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr("cuda_emulation.build.CSRC", tmp_path)
    for code, message in [
        ("kernel<<<1, 2>>>(p);", "nothing matches"),
        ("kernel<<<1, 2, 0, stream>>>(p); other<<<1, 2>>>(p);", "no rewrite for .*other<<<"),
        ('kernel<<<1, 2, 0, stream>>>(p); asm("bar.sync 0;");', "no rewrite for .*asm"),
    ]:
        (tmp_path / "cuda" / "group_loss.cu").write_text(code)
        with pytest.raises(ValueError, match=message):
            rewrite("group_loss")
