"""What the build produces for each value of NCA_KERNELS_BUILD, and without PyTorch."""

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
_PORTABLE = next(iter(SETUP["ISA_FLAGS"].get(platform.machine(), {"plain": []})))  # the one that every machine has


def _names(monkeypatch, wish, nvcc):
    if wish is None:
        monkeypatch.delenv("NCA_KERNELS_BUILD", raising=False)
    else:
        monkeypatch.setenv("NCA_KERNELS_BUILD", wish)
    monkeypatch.setitem(SETUP["wanted_extensions"].__globals__, "find_nvcc", lambda: nvcc)
    return [(extension.name, extension.optional) for extension in SETUP["wanted_extensions"]()]


def test_auto_builds_what_it_can_and_says_what_not(monkeypatch, capsys):
    assert _names(monkeypatch, None, "nvcc") == [("nca_kernels._cpu", True), ("nca_kernels._cuda", True)]
    assert _names(monkeypatch, "auto", None) == [("nca_kernels._cpu", True)]
    assert "not building _cuda: nvcc is neither on PATH nor under CUDA_HOME/bin" in capsys.readouterr().out


def test_explicit_wishes(monkeypatch):
    assert _names(monkeypatch, "none", "nvcc") == []
    assert _names(monkeypatch, "cpu", "nvcc") == [("nca_kernels._cpu", False)]
    assert _names(monkeypatch, "cuda", "nvcc") == [("nca_kernels._cpu", False), ("nca_kernels._cuda", False)]
    with pytest.raises(SystemExit, match="NCA_KERNELS_BUILD=cuda: nvcc"):
        _names(monkeypatch, "cuda", None)
    with pytest.raises(SystemExit, match="NCA_KERNELS_BUILD='gpu': wanted auto, none, cpu or cuda"):
        _names(monkeypatch, "gpu", "nvcc")


def test_it_builds_and_loads_without_pytorch(tmp_path):
    """The build, the import and a first call, in a process that cannot import PyTorch."""
    build = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['setup.py', '-q', 'build_ext', '--build-lib', {str(tmp_path)!r}, '--build-temp', {str(tmp_path / 'o')!r}]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "NCA_KERNELS_BUILD": "cpu"}
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, env=environment, check=True)
    load = "import sys; sys.modules['torch'] = None; import _cpu; print(_cpu.unusable(0) or None, _cpu.instruction_set())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "nca_kernels"), "NCA_KERNELS_ISA": _PORTABLE}
    run = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
    assert run.stdout == f"None {_PORTABLE}\n", run.stderr
    environment["NCA_KERNELS_ISA"] = "mmx"
    run = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
    assert "ValueError: NCA_KERNELS_ISA=mmx: this machine and build have" in run.stderr


def test_an_unknown_instruction_set_is_one_line():
    """The backend names the instruction set as the reason why it cannot run."""
    script = (
        "from nca_kernels import explain; from nca_kernels.backends.native import cpu\n"
        "print(cpu.description()); print(explain('cpu', 'token_logps'))"
    )
    environment = {**os.environ, "NCA_KERNELS_ISA": "avx9"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    line = "NCA_KERNELS_ISA=avx9: this machine and build have "
    assert run.stdout.startswith(line)
    assert f"cannot run here ({line}" in run.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other architectures have one instruction set")
def test_a_compiler_without_an_instruction_set_builds_the_others(tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "old-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *mavx512bf16*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setitem(SETUP["takes"].__globals__, "COMPILER", [str(compiler)])
    assert list(SETUP["known_isas"]()) == ["plain", "avx2", "avx512"]
    assert "not building for avx512bf16:" in capsys.readouterr().out


def test_no_pytorch_header_in_the_sources():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) >= 8
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not any(name in line for line in includes for name in ("torch", "ATen", "c10")), path
    assert "torch" not in (ROOT / "pyproject.toml").read_text().split("[project]")[0]
