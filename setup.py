"""Builds the two extension modules, ``nca_kernels._cpu`` and ``nca_kernels._cuda``, from ``csrc/``.

They take addresses and sizes (no PyTorch header), so the build needs pybind11 and a C++ compiler alone, and ``nvcc`` for
the second; no GPU. ``NCA_KERNELS_BUILD=auto|none|cpu|cuda``: ``auto`` builds what it can and prints why not the rest; any
other value fails loudly when it cannot be met (``cuda`` means both).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Machine code for GPUs of these compute capabilities, and those of a higher minor version. PTX for the rest: of 10.0, since
# that of 12.0 would leave out 11.0.
CUDA_ARCHS = ("75", "80", "90", "100", "120")
CUDA_PTX = "100"
COMPILER = os.environ.get("CXX", "c++").split()
CXXFLAGS = os.environ.get("CXXFLAGS", "").split()
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]  # Apple's clang has none: one thread there
# One object per instruction set, chosen at run time, so that one wheel serves every machine of its architecture.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"plain": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]},
    "aarch64": {"neon": []},
}
ISA_FLAGS["arm64"] = ISA_FLAGS["aarch64"]


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(cuda_home, "bin"))) if cuda_home else shutil.which("nvcc")


def takes(flags: list[str]) -> bool:
    """Whether the compiler knows these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.touch()
        command = [*COMPILER, *flags, "-Werror", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def known_isas() -> dict[str, list[str]]:
    """The instruction sets of this machine's architecture that the compiler knows, with their flags."""
    isas = ISA_FLAGS.get(platform.machine(), {"plain": []})
    known = {isa: flags for isa, flags in isas.items() if not flags or takes(flags)}
    for isa in isas.keys() - known:
        print(f"nca_kernels: not building for {isa}: {COMPILER[0]} does not know {' '.join(isas[isa])}")
    return known


def wanted_extensions() -> list[Extension]:
    """The extensions to build, by ``NCA_KERNELS_BUILD`` and the tools at hand."""
    wish = os.environ.get("NCA_KERNELS_BUILD", "auto")
    if wish not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"NCA_KERNELS_BUILD={wish!r}: wanted auto, none, cpu or cuda")
    names = {"auto": ["_cpu", "_cuda"], "none": [], "cpu": ["_cpu"], "cuda": ["_cpu", "_cuda"]}[wish]
    if "_cuda" in names and find_nvcc() is None:
        if wish == "cuda":
            raise SystemExit("NCA_KERNELS_BUILD=cuda: nvcc is neither on PATH nor under CUDA_HOME/bin")
        print("nca_kernels: not building _cuda: nvcc is neither on PATH nor under CUDA_HOME/bin")
        names.remove("_cuda")
    # An optional extension that fails to compile is reported and left out; an explicit wish must be met.
    return [Extension(f"nca_kernels.{name}", sources=[], optional=wish == "auto") for name in names]


class BuildKernels(build_ext):
    """Compiles ``csrc`` file by file, since each object has flags of its own."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        module = ext.name.rpartition(".")[2]
        device = module.lstrip("_")
        self.objects = Path(self.build_temp, device).absolute()
        self.objects.mkdir(parents=True, exist_ok=True)
        self.include = [f"-I{ROOT / 'csrc'}"]
        bindings = self.cxx(
            "bindings.cpp",
            "bindings",
            [f"-DNCA_MODULE={module}", f"-DNCA_DEVICE={device}", "-fvisibility=hidden", f"-I{pybind11.get_include()}"]
            + [f"-I{path}" for path in self.include_dirs],
        )
        objects = [bindings, *getattr(self, f"{device}_kernels")()]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # nvcc links the static CUDA runtime: the extension then loads on machines without CUDA, and beside PyTorch's own.
        linker = [find_nvcc(), "-cudart=static"] if device == "cuda" else [*COMPILER, *OPENMP, *CXXFLAGS]
        self.spawn([*linker, "-shared", *objects, "-o", str(target)])
        print(f"nca_kernels: built {module}")

    def cxx(self, source: str, stem: str, flags: list[str]) -> str:
        """Compile one C++ file to an object of its own name. Nobody reads errno, and expf without it is cheaper."""
        output = str(self.objects / f"{stem}.o")
        self.spawn(
            [
                *COMPILER,
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-fPIC",
                "-Wall",
                *self.include,
                *flags,
                *CXXFLAGS,
                "-c",
            ]
            + [str(ROOT / "csrc" / source), "-o", output]
        )
        return output

    def cpu_kernels(self) -> list[str]:
        isas = known_isas()
        known = [f"-DNCA_HAS_{isa.upper()}" for isa in isas]
        # The code says itself what is fused. In backward's scale * logits - max the maximum was rounded: fused with the product,
        # a row's best column would come out above it.
        strict = ["-ffp-contract=off", *OPENMP]
        objects = [
            self.cxx("cpu/token_logps.cpp", f"token_logps_{isa}", [f"-DNCA_ISA={isa}", *strict, *flags])
            for isa, flags in isas.items()
        ]
        objects += [self.cxx(f"cpu/{stem}.cpp", stem, OPENMP + known) for stem in ("dispatch", "group_loss")]
        return objects

    def cuda_kernels(self) -> list[str]:
        nvcc = find_nvcc()
        assert nvcc, "wanted_extensions() has found it"
        # A toolkit that does not know the newest chips has its last architecture's PTX serve them.
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        archs = [cc for cc in CUDA_ARCHS if f"compute_{cc}" in known]
        codes = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in archs]
        ptx = CUDA_PTX if CUDA_PTX in archs else archs[-1]
        codes.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
        objects = []
        for stem in ("token_logps", "group_loss", "unusable"):
            objects.append(str(self.objects / f"{stem}.o"))
            self.spawn(
                [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC", "--threads=0", *codes, *self.include, "-c"]
                + [f"-DNCA_CUDA_PTX={ptx}0", str(ROOT / "csrc" / "cuda" / f"{stem}.cu"), "-o", objects[-1]]
            )
        return objects


if __name__ == "__main__":
    setup(ext_modules=wanted_extensions(), cmdclass={"build_ext": BuildKernels})
