"""Runs the tests of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, for each instruction set.

It builds the extension with the sanitizers into a separate folder and runs the tests against that build.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
FILES = ["test_token_logps.py", "test_row_stats.py", "test_group_loss.py", "test_properties.py"]
# The longest rows add minutes under the sanitizers and no new path through the kernels.
SELECT = ["-k", "cpu and not 128256 and not 151936 and not 50257"]


def available_isas() -> list[str]:
    """The instruction sets that this machine can run and the extension has."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    wanted = {"avx512bf16": "avx512_bf16", "avx512": "avx512bw", "avx2": "avx2", "plain": "sse2", "neon": "asimd"}
    return [isa for isa, flag in wanted.items() if f" {flag} " in flags.replace("\n", " ")]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build = {**os.environ, "NCA_KERNELS_BUILD": "cpu", "CXXFLAGS": FLAGS}
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, str(ROOT)]
        subprocess.run(install, env=build, check=True)
        # The interpreter was not built with the runtime, so that must be loaded first.
        compiler = os.environ.get("CXX", "c++").split()[0]
        runtimes = [
            subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        for isa in available_isas():
            print(f"sanitize: {isa}", flush=True)
            run = {
                **os.environ,
                "PYTHONPATH": folder,
                "LD_PRELOAD": ":".join(runtimes),
                "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
                "NCA_KERNELS_ISA": isa,
            }
            tests = [str(ROOT / "tests" / name) for name in FILES]
            pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *SELECT, *tests]
            subprocess.run(pytest, env=run, cwd=folder, check=True)


if __name__ == "__main__":
    main()
