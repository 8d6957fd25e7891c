"""Mistakes that only a run of ``nca-kernels train`` finds: each gives one line that names the cause."""

import json
import shutil
from importlib.util import find_spec

import datasets
import pytest
import yaml

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny import save_tiny_model
from transformers import AutoTokenizer

from nca_kernels import cli

pytestmark = pytest.mark.usefixtures("default_dispatch")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    save_tiny_model(folder)
    return folder


def a_run(base, **values):
    """The exit code of a run of two steps."""
    rows = [{"prompt": str(i), "responses": ["a", "bb"], "scores": [1, 0]} for i in range(8)]
    with open("data.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    keys = {"data": "data.jsonl", "output_dir": "out", "use_cpu": True, "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    with open("run.yaml", "w") as file:
        yaml.safe_dump({"model": base, **keys, **values}, file)
    return cli.main(["train", "run.yaml"])


def test_weights_that_are_cut_off_are_named(model, tmp_path, capsys):
    folder = tmp_path / "cut"
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert a_run(model, model=str(folder)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nca-kernels train: model: a file of weights of") and "damaged or cut off" in last


def test_a_tokenizer_larger_than_the_model_is_named_by_row(model, tmp_path, capsys):
    folder = tmp_path / "larger"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["bb"])
    tokenizer.save_pretrained(folder)
    assert a_run(model, tokenizer=str(folder)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "row 1, column response_ids: the token id 259, and the model has 259 embeddings" in last


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed_is_named(model, capsys):
    assert a_run(model, report_to="wandb") == 1
    assert "wandb" in capsys.readouterr().err.splitlines()[-1]


def test_a_hub_that_cannot_be_reached_is_one_line(model, capsys, monkeypatch):
    error = type("ConnectError", (Exception,), {"__module__": "httpx"})("Name or service not known")

    def offline(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", offline)
    assert a_run(model, push_to_hub=True, hub_model_id="a/b") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "nca-kernels train: the network, or the hub: Name or service not known"
