"""Compiles ``csrc/cuda`` for the CPU, against the stand-ins of ``include/``, into an extension module ``_cuda``.

The kernels are the repository's own: rewritten are only launches and inline assembly, for which C++ has no syntax.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

LAUNCH = (r"(\w+)<<<(\w+), (\w+), 0, [^;]+>>>\((\w+)\);", r"emulated::launch(\2, \3, \1, \4);")
EX2 = (
    r'asm\("ex2\.approx\.ftz\.f32 %0, %1;" : "=f"\((\w+)\) : "f"\((.+)\)\);',
    r"\1 = emulated::ex2_approx_ftz(\2);",
)
REWRITES = {"group_loss": [LAUNCH], "token_logps": [LAUNCH, EX2], "unusable": []}

# The kernels view a row's elements as words, which CUDA allows and C++ does not.
# The architectures that nvcc would define, as setup.py asks for them.
ARCHITECTURES = ["-D__CUDA_ARCH_LIST__=750,800,900,1000,1200", "-DNCA_CUDA_PTX=1000"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
# As traps, undefined behaviour needs no runtime library; a misaligned 16-byte word is one.
SANITIZER = ["-g", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def rewrite(stem: str) -> str:
    """The C++ of ``csrc/cuda/{stem}.cu``."""
    path = CSRC / "cuda" / f"{stem}.cu"
    code = path.read_text()
    for pattern, replacement in REWRITES[stem]:
        code, count = re.subn(pattern, replacement, code)
        if count == 0:
            raise ValueError(f"{path}: nothing matches {pattern}")
    left = re.search(r".*(<<<|\basm\b).*", code)
    if left:
        raise ValueError(f"{path}: no rewrite for {left[0].strip()!r}")
    return f'#line 1 "{path}"\n{code}'


def build(folder: Path) -> Path:
    """Build ``_cuda`` in ``folder`` and return its path."""
    stems = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
    if stems != sorted(REWRITES):
        raise ValueError(f"csrc/cuda has {stems}, the rewrites are for {sorted(REWRITES)}")
    include = [HERE / "include", CSRC, CSRC / "cuda", pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS, *ARCHITECTURES, *(f"-I{path}" for path in include)]

    def compile(source, *more):
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler(), *flags, *more, "-c", source, "-o", target], check=True)
        return target

    def kernels(stem):
        source = folder / f"{stem}.cpp"
        source.write_text(rewrite(stem))
        return compile(source, *SANITIZER)

    with ThreadPoolExecutor(2) as pool:
        bindings = pool.submit(compile, CSRC / "bindings.cpp", "-DNCA_MODULE=_cuda", "-DNCA_DEVICE=cuda")
        objects = [*pool.map(kernels, stems), bindings.result()]
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler(), "-shared", *objects, "-o", module], check=True)
    return module
