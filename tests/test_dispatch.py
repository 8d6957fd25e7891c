"""Which backend runs, what explain() says, and which modules may import which others."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import nca_kernels
from nca_kernels import dispatch, drop_in
from nca_kernels.backends import BACKENDS, native

PACKAGE = Path(nca_kernels.__file__).parent


def test_the_order_of_backends():
    assert list(BACKENDS) == ["cuda", "triton", "cpu", "torch"]


def test_cpu_tensors_run_on_the_cpu_kernels(default_dispatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.resolve("token_logps", None, torch.device("cpu"), dtype) == "cpu"


def test_float64_runs_on_torch_without_a_warning(default_dispatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.resolve("token_logps", None, torch.device("cpu"), torch.float64) == "torch"


def test_falling_to_torch_warns_once(default_dispatch):
    dispatch._WARNED.clear()
    logits = torch.randn(5, 4, 3).transpose(1, 2)  # stride 1 is not the vocabulary's
    labels = torch.zeros(5, 3, dtype=torch.int64)
    with pytest.warns(UserWarning, match="stride 1 along the vocabulary"):
        ours = nca_kernels.token_logps(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(nca_kernels.token_logps(logits, labels), ours)
        nca_kernels.token_logps(torch.randn(5, 4, 6).transpose(1, 2), torch.zeros(5, 6, dtype=torch.int64))
    assert "cpu     the kernels read rows of stride 1" in nca_kernels.explain(logits, "token_logps")
    assert torch.allclose(ours, nca_kernels.token_logps(logits.contiguous(), labels), atol=1e-6)


X, Y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
H, W, L = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(2, 3)


def _loss(name):
    return lambda: getattr(nca_kernels, name)(L, L)


CALLS = {
    "token_logps": lambda: nca_kernels.token_logps(X, Y),
    "sequence_logps": lambda: nca_kernels.sequence_logps(X, Y, shift=1, average=True),
    "token_stats": lambda: nca_kernels.token_stats(X, Y),
    "selective_log_softmax": lambda: nca_kernels.selective_log_softmax(X, torch.stack((Y, Y), -1)),
    "selective_log_softmax_and_entropy": lambda: drop_in.selective_log_softmax_and_entropy(X, Y),
    "linear_token_logps": lambda: nca_kernels.linear_token_logps(H, W, Y),
    "linear_sequence_logps": lambda: nca_kernels.linear_sequence_logps(H, W, Y),
    "linear_token_stats": lambda: nca_kernels.linear_token_stats(H, W, Y),
    "linear_cross_entropy": lambda: drop_in.linear_cross_entropy(H, W, Y),
    "group_loss": lambda: nca_kernels.group_loss("dpo", L, L),
    **{name: _loss(name) for name in nca_kernels.__all__ if name.endswith("_loss") and name != "group_loss"},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_warning_names_the_users_line(default_dispatch, monkeypatch, call):
    monkeypatch.setattr(native.cpu, "unsupported", lambda *_: ["is not here"], raising=False)
    dispatch._choose.cache_clear()
    dispatch._WARNED.clear()
    try:
        with pytest.warns(UserWarning, match="runs on plain PyTorch, slowly.*cpu: is not here") as warned:
            call()
        assert [(Path(w.filename), w.lineno) for w in warned] == [(Path(__file__), call.__code__.co_firstlineno)]
    finally:
        dispatch._choose.cache_clear()


def test_a_named_backend_that_cannot_run_raises_with_every_reason(default_dispatch):
    logits, labels = torch.randn(1, 2, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run token_logps: .*not on cpu.*torch.float64"):
        nca_kernels.token_logps(logits, labels, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend 'triton' .*TRITON_INTERPRET.*torch.float64"):
        nca_kernels.token_logps(logits, labels, backend="triton")
    with pytest.raises(RuntimeError, match="stride 1 along the vocabulary"):
        nca_kernels.token_logps(torch.randn(1, 3, 2).mT, labels, backend="cpu")
    with pytest.raises(ValueError, match="backend: got 'metal', wanted None or one of 'cuda', 'triton'"):
        nca_kernels.token_logps(logits, labels, backend="metal")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: no backend is missing")
def test_a_skip_of_a_required_backend_is_a_failure():
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "test_token_logps.py",
        "-k",
        "ignore_index and cuda",
    ]
    run = subprocess.run([*command, "--require-backend=triton,cuda"], cwd=here, capture_output=True, text=True)
    assert run.returncode == 1 and "backend cuda is required and cannot run" in run.stdout, run.stdout


def test_explain(default_dispatch):
    table = nca_kernels.explain("cpu")
    for op in dispatch.OPS:
        assert f"{op} on cpu, torch.float32" in table
    lines = nca_kernels.explain(torch.zeros(1, dtype=torch.float64), "token_logps").splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(BACKENDS)
    assert "torch.float64" in lines[3] and lines[4].split()[-1] == "runs"
    with pytest.raises(ValueError, match="op: got 'sort'"):
        nca_kernels.explain("cpu", "sort")
    with pytest.raises(ValueError, match="tensor_or_device: got 'cpuu', wanted a tensor, a device or its name"):
        nca_kernels.explain("cpuu")


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, nca_kernels; "
        "import nca_kernels.integrations as hf; assert 'NCATrainer' in dir(hf); "
        "print([m for m in ('triton', 'transformers', 'nca_kernels._cpu', 'nca_kernels._cuda') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


# Each layer may import what stands to its right, never what stands to its left.
LAYERS = [
    "cli",
    "doctor",
    "selfcheck",
    "experiments",
    "integrations",
    "drop_in",
    "linear_functional",
    "functional",
    "losses",
    "segments",
    "ops",
    "skipping",
    "linear",
    "slices",
    "linear_head",
    "tiles",
    "rows",
    "memory",
    "parallel",
    "dispatch",
    "backends",
    "checks",
    "whole_files",
    "_compat",
]
# The rooms of ``integrations``, by the same rule.
ROOMS = ["commands", "training", "reference", "data", "models"]


def _imports(path):
    """The modules of the package that a file imports, each as its first name below the package."""
    yield from _imported(path, PACKAGE, "nca_kernels")


def _imported(path, folder, package):
    """What a file imports from ``package``, which is in ``folder``: the first name below it."""
    depth = len(path.relative_to(folder).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith(package):
            yield (node.module.split(".") + [alias.name for alias in node.names])[1]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith(f"{package}.")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imported = set(_imports(path))
    if layer == "reference":
        assert imported <= {"loss_table", "scores"}, "the reference imports torch, and what knows no kernel"
    if layer in ("loss_table", "scores"):
        assert not imported, "every layer may import these"
    if layer in LAYERS:
        above = LAYERS[: LAYERS.index(layer)]
        assert not imported & set(above), f"{path} imports a layer above its own"
    if layer == "backends":
        assert not imported & {"reference", "scores"}, "a kernel must not be able to pass against itself"


ROOM_FILES = sorted(path for room in ROOMS for path in (PACKAGE / "integrations" / room).glob("*.py"))


def test_every_file_of_integrations_is_in_a_room():
    assert [path.name for path in (PACKAGE / "integrations").glob("*.py")] == ["__init__.py"]
    assert sorted(
        path.name for path in (PACKAGE / "integrations").iterdir() if path.is_dir() and path.name != "__pycache__"
    ) == sorted(ROOMS)


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: str(path.relative_to(PACKAGE / "integrations")))
def test_rooms_import_downwards(path):
    above = ROOMS[: ROOMS.index(path.parent.name)]
    imported = set(_imported(path, PACKAGE / "integrations", "nca_kernels.integrations"))
    assert not imported & set(above), f"{path} imports a room above its own"
