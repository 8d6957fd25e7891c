"""``nca-kernels doctor``: what is installed, what was built, which backend runs where, and whether each computes correctly."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, explain, selfcheck
from .backends import native

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft")


def examine() -> bool:
    """Print all of this; false if a backend that runs here gives wrong numbers or fails."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    print(f"nca_kernels   {__version__}\npython        {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:<13} {_version(package)}")
    print(f"CUDA          {torch.version.cuda or 'none in this build of PyTorch'}")
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        print(f"{device!s:<13} {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}")
    for backend in (native.cpu, native.cuda):
        print(f"{f'nca_kernels._{backend.NAME}':<18} {backend.description()}")
    for device in devices:
        print(f"\n{explain(device)}")
    print("\nSelf-check against float64: the largest error, as a share of the largest number")
    sound = True
    for outcome in selfcheck.run(devices):
        print(outcome)
        sound = sound and outcome.passed
    return sound


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
