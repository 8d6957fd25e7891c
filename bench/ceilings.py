"""The speed of reading, copying and multiplying on this machine, with which the suites compare their times."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .cases import Ceiling, Tensors, Unsupported


@cache
def _cpu_reader() -> Callable[[int, int, int], int]:
    if shutil.which("g++") is None:
        raise Unsupported("g++ is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "read.so")
        source = Path(__file__).with_name("read.cpp")
        subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_uint64
    return function


def read(name: str, tensor: Tensor) -> Ceiling:
    """One read of the problem's tensor ``name``."""

    def build() -> Callable[[Tensors], object]:
        if tensor.is_cuda:
            from . import gpu_read

            sums = torch.empty(tensor.nbytes // 4 // gpu_read.BLOCK + 1, dtype=torch.int32, device=tensor.device)
            return lambda tensors: gpu_read.read_all(tensors[name].detach(), sums)
        read_all = _cpu_reader()
        return lambda tensors: read_all(tensors[name].data_ptr(), tensor.nbytes // 8, torch.get_num_threads())

    return Ceiling(build, tensor.nbytes)


def copy(name: str, tensor: Tensor) -> Ceiling:
    """One copy of the problem's tensor ``name`` into allocated memory."""

    def build() -> Callable[[Tensors], object]:
        target = torch.zeros_like(tensor)
        return lambda tensors: target.copy_(tensors[name].detach())

    return Ceiling(build, 2 * tensor.nbytes)


def gemm(hidden: Tensor, weight: Tensor) -> Ceiling:
    """The one product ``[M, D] x [D, V]`` into allocated memory."""

    def build() -> Callable[[Tensors], object]:
        logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

        def call(tensors: Tensors) -> None:
            with torch.no_grad():
                torch.mm(tensors["hidden"], tensors["weight"].t(), out=logits)

        return call

    return Ceiling(build, 2 * hidden.numel() * len(weight))
