"""The types of the public functions, as a user's type checker reads them from the installed package."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytest.importorskip("mypy", reason="mypy is not installed")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """What mypy reports for a user's lines, in an environment with the package as a wheel installs it."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "env")
    site = next((folder / "env").glob("lib*/python*/site-packages"))
    environment = {**os.environ, "NCA_KERNELS_BUILD": "none"}
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "build"), "--build-lib", str(site)]
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    # Their own files are of no interest here and take mypy a minute.
    skipped = ",".join(
        f"mypy-{package}.*" for package in ("torch", "transformers", "datasets", "accelerate", "peft", "numpy", "pyarrow")
    )
    (folder / "mypy.ini").write_text(f"[mypy]\n[{skipped}]\nfollow_imports = skip\nignore_missing_imports = true\n")

    def run(*lines):
        header = ["import nca_kernels, torch", "x = torch.zeros(1, 2, 3)", "y = torch.zeros(1, 2, dtype=torch.int64)"]
        (folder / "user.py").write_text("\n".join([*header, *lines]) + "\n")
        command = [sys.executable, "-m", "mypy", "--python-executable", str(folder / "env" / "bin" / "python"), "user.py"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout

    return run


def test_right_calls_pass(check):
    printed = check(
        "nca_kernels.token_logps(x, y, shift=1)",
        "nca_kernels.linear_token_logps(x, x[0], y, shift=1)",
        "loss, rewards = nca_kernels.group_loss('nca', x[0], x[0], x[0], beta=0.1)",
    )
    assert printed.startswith("Success"), printed


WRONG = {
    "token_logps(x, y, shft=1)": 'Unexpected keyword argument "shft" for "token_logps"',
    "token_logps(x, y, shift='1')": 'Argument "shift" to "token_logps" has incompatible type "str"; expected "int"',
    "linear_token_logps(x, y)": 'Missing positional argument "labels" in call to "linear_token_logps"',
    "group_loss('nca', x, x, x, beta='0.1')": 'Argument "beta" to "group_loss" has incompatible type "str"; expected "float"',
}


def test_wrong_calls_are_caught(check):
    printed = check(*(f"nca_kernels.{call}" for call in WRONG))
    errors = [line for line in printed.splitlines() if ": error: " in line]
    assert len(errors) == len(WRONG), printed
    for error, (call, message) in zip(errors, WRONG.items(), strict=True):
        assert message in error, call
