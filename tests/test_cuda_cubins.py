"""``csrc/cuda`` compiled for GPUs that this machine need not have: the machine code is checked wherever ``nvcc`` exists.

Spilled registers, or loads of fewer than 16 bytes, do not change any result and cost a good part of the bandwidth. Only the machine
code shows them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
ARCHS = ("75", "80", "90", "100", "120")  # of setup.py
TOKEN_LOGPS = [
    f"token_logps_{direction}_kernel<{dtype}, {softcap}, {entropy}>"
    for direction in ("fwd", "bwd")
    for dtype in ("float", "bfloat16", "half")
    for softcap in ("plain", "softcap")
    for entropy in ("alone", "entropy")
]
STEMS = {"token_logps": TOKEN_LOGPS, "group_loss": ["group_loss_fwd_kernel", "sum_losses_kernel"]}
# Atomics, whose order would change the last bits from run to run, and local memory.
FORBIDDEN = {"ATOM", "ATOMG", "ATOMS", "RED", "REDG", "LDL", "STL"}
# What uses a loaded logit: none of it may stand between the four loads, which are to be under way together.
ARITHMETIC = {"FMUL", "FADD", "FFMA", "FMNMX", "MUFU"}
CASES = [(stem, arch) for stem in STEMS for arch in ARCHS]


def test_the_wheel_holds_code_for_every_gpu_that_is_checked():
    assert f"CUDA_ARCHS = {ARCHS}".replace("'", '"') in (CSRC.parent / "setup.py").read_text()


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(cuda_home, "bin"))) if cuda_home else shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """The path of the toolkit's cuobjdump, or of the one in Triton's wheel."""
    triton = find_spec("triton")
    wheel = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=wheel)


def kernel_name(symbol: str) -> str:
    """``token_logps_fwd_kernel<float, softcap, alone>`` from a mangled symbol."""
    template = re.search(r"(token_logps_(?:fwd|bwd)_kernel)I(?:\d+__nv_|\d+__)?(f|bfloat16|half)Lb([01])ELb([01])E", symbol)
    if template is None:
        return re.search(r"[a-z_]+_kernel", symbol)[0]
    name, dtype, softcap, entropy = template.groups()
    arguments = ("float" if dtype == "f" else dtype, ("plain", "softcap")[int(softcap)], ("alone", "entropy")[int(entropy)])
    return f"{name}<{', '.join(arguments)}>"


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """For each (stem, arch), the cubin and what ptxas reports about its kernels."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither on PATH nor under CUDA_HOME/bin")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    folder = tmp_path_factory.mktemp("cubins")

    def compile(case):
        stem, arch = case
        cubin = folder / f"{stem}_{arch}.cubin"
        # The flags of setup.py.
        command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", f"-I{CSRC}"]
        run = subprocess.run([*command, CSRC / "cuda" / f"{stem}.cu", "-o", cubin], capture_output=True, text=True)
        return cubin, run.stdout + run.stderr, run.returncode

    cases = [case for case in CASES if f"compute_{case[1]}" in known]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(compile, cases), strict=True))


@pytest.fixture(params=CASES, ids="-".join)
def compiled(request, cubins):
    if request.param not in cubins:
        pytest.skip(f"this nvcc does not know sm_{request.param[1]}")
    return request.param[0], *cubins[request.param]


def test_every_kernel_fits_into_registers(compiled):
    stem, _, report, returncode = compiled
    assert returncode == 0, report
    assert "warning" not in report
    frames = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    assert sorted(kernel_name(symbol) for symbol, *_ in frames) == sorted(STEMS[stem])
    for symbol, *local_bytes in frames:
        assert local_bytes == ["0", "0", "0"], kernel_name(symbol)


def test_rows_travel_in_16_byte_words_without_atomics(compiled):
    stem, cubin, report, returncode = compiled
    assert returncode == 0, report
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton's wheel")
    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = {kernel_name(part.split()[0]): part for part in sass.split("Function : ")[1:]}
    assert sorted(kernels) == sorted(STEMS[stem])
    for name, code in kernels.items():
        operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)", code, re.M)
        assert not FORBIDDEN.intersection(op.split(".")[0] for op in operations), name
        if stem == "group_loss":
            continue
        loads = [i for i, op in enumerate(operations) if op.startswith("LDG.E.128")]
        assert len(loads) >= 4, name
        assert not ARITHMETIC.intersection(op.split(".")[0] for op in operations[loads[0] : loads[3]]), name
        # Backward stores the four packs that it has loaded, and the zeros of an ignored row.
        stores = sum(op.startswith("STG.E.128") for op in operations)
        assert stores >= 5 if "bwd" in name else stores == 0, name
