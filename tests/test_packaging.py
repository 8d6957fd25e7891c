"""The metadata of the package: its version, its dependencies, and the files that users and developers look for."""

import ast
import sys
from pathlib import Path

import pytest

import nca_kernels
from nca_kernels import cli

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"pyyaml": "yaml"}  # where a distribution's module has another name


def declared(requirements):
    names = [requirement.split(">=")[0] for requirement in requirements]
    return {MODULES.get(name, name) for name in names}


def imported():
    for path in (ROOT / "nca_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.split(".")[0]


def test_every_imported_package_is_declared_and_no_other():
    extras = PROJECT["optional-dependencies"]
    packages = set(imported()) - set(sys.stdlib_module_names) - {"nca_kernels", "typing_extensions"}  # the latter is PyTorch's
    users = [PROJECT["dependencies"], *(names for extra, names in extras.items() if extra != "test")]
    known = set().union(*map(declared, users))
    assert packages <= known
    # transformers imports these: for chat templates, ZeRO and quantised weights.
    assert known - packages <= {"bitsandbytes", "deepspeed", "jinja2"}


def test_a_missing_package_is_told_with_the_extra_that_brings_it():
    assert set(cli._HF_MODULES) == declared(PROJECT["optional-dependencies"]["hf"])


def test_pins_cover_the_dependencies():
    pins = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-torch.txt")).lower()
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["hf"], *extras["test"]]:
        assert f"\n{requirement.split('>=')[0].lower()}==" in f"\n{pins}", requirement


def test_one_version(capsys):
    version = nca_kernels.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version.partition('.dev')[0]} (" in (ROOT / "CHANGELOG.md").read_text()
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"nca_kernels {version}\n"
