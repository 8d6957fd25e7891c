"""The examples in docstrings and pages run, and the page of environment variables is complete.

test_guide.py tests docs/guide.md, which is one long session.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml

import nca_kernels

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


PACKAGE = Path(nca_kernels.__file__).parent
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstring_examples(path, default_dispatch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "integrations" in path.parts:
        pytest.importorskip("transformers", reason="transformers is not installed")
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS, extraglobs={"torch": torch})
    assert results.failed == 0 and results.attempted > 0


def test_every_public_function_has_an_example():
    functions = [getattr(nca_kernels, name) for name in nca_kernels.__all__ if name.islower() and not name.startswith("_")]
    assert [function.__name__ for function in functions if ">>> " not in (function.__doc__ or "")] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: the guide's data, and a tiny model under the name of a real one."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny import save_tiny_model

    folder = tmp_path_factory.mktemp("user")
    save_tiny_model(folder / MODEL)
    rows = re.search(r"^`train.jsonl`:\n\n```json\n(.*?)^```$", (ROOT / "docs" / "guide.md").read_text(), re.M | re.S)
    (folder / "train.jsonl").write_text(rows[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page.name != "guide.md"]


@pytest.mark.usefixtures("default_dispatch")
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.usefixtures("default_dispatch")
def test_the_readmes_training_run(folder, monkeypatch):
    from nca_kernels import cli

    monkeypatch.chdir(folder)
    (config,) = blocks(ROOT / "README.md", "yaml")
    Path("run.yaml").write_text(config)
    assert cli.main(["train", "run.yaml", "--use_cpu", "true", "--max_steps", "1"]) == 0
    assert Path(yaml.safe_load(config)["output_dir"], "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    assert all(f"({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "index.md")


def read_by_the_code():
    """The environment variables that the package, its build and its benchmarks read."""
    sources = (".py", ".h", ".cpp", ".cu", ".cuh")
    files = [ROOT / "setup.py", ROOT / "bench" / "gpu.sh"]
    files += [path for folder in ("nca_kernels", "csrc", "bench") for path in (ROOT / folder).rglob("*") if path.suffix in sources]
    for path in files:
        text = path.read_text()
        yield from re.findall(r"NCA_KERNELS_[A-Z_]+", text)
        yield from re.findall(r"""(?:environ\.(?:get|setdefault)\(|environ\[|getenv\()["'](\w+)["']""", text)


def test_every_environment_variable_is_documented_and_no_other():
    documented = set(re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    assert {name for cell in documented for name in re.findall(r"`(\w+)`", cell)} == set(read_by_the_code())
