"""Fixtures that run a test on every backend. Without a GPU, Triton's kernels run in its interpreter, on CPU tensors."""

import importlib.util
import os

# One thread, here and in the processes that tests start, unless it is set: most tests are too small for two, which then wait for
# each other, ten times as long on a busy machine. test_ops.py holds the kernels to the same bits on one to four threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined, so before any import of them
    # Else DeepSpeed prints its guess to stdout wherever accelerate imports it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
if importlib.util.find_spec("triton"):
    import triton.language  # noqa: F401  # now: its own functions are interpreted or not as the variable says at their import

    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.round_bfloat16()
        interpreter.leave_out_repeated_work()

import pytest

from nca_kernels.backends import BACKENDS


def pytest_addoption(parser):
    parser.addoption(
        "--require-backend",
        default="",
        help="comma-separated backends whose tests must run: a skip of theirs fails",
    )


def _device(name: str) -> torch.device:
    on_gpu = name == "cuda" or (name == "triton" and os.environ.get("TRITON_INTERPRET") != "1")
    return torch.device("cuda" if on_gpu else "cpu")


class Target:
    """A backend and the device that its tests run on."""

    def __init__(self, name: str):
        self.name = name
        self.device = _device(name)
        self.interpreted = name == "triton" and self.device.type == "cpu"

    def __repr__(self):
        return self.name


def _target(request, op="token_logps"):
    target = Target(request.param)
    reasons = BACKENDS[target.name].unsupported(op, target.device, torch.float32)
    if target.device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("no GPU here")
    if reasons:
        if target.name in request.config.getoption("--require-backend").split(","):
            pytest.fail(f"backend {target.name} is required and cannot run: {'; '.join(reasons)}")
        pytest.skip(f"backend {target.name}: {'; '.join(reasons)}")
    return target


@pytest.fixture(params=["triton", "cuda", "cpu", "torch"])
def target(request):
    """Every backend that runs here."""
    return _target(request)


@pytest.fixture(params=["triton", "cuda", "cpu"])
def kernels(request):
    """Every backend with its own kernels (all but ``torch``)."""
    return _target(request)


@pytest.fixture
def default_dispatch(monkeypatch):
    """The dispatch that a user gets, without Triton's interpreter."""
    if importlib.util.find_spec("triton"):
        import triton.language  # noqa: F401  # read while it is off, Triton's own functions would fail in later tests' kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
