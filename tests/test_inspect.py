"""nca-kernels inspect: what a run would train on, and warnings for likely mistakes, without the weights of a model."""

import json
import os
import re

import datasets
import pytest
import yaml
from tiny import save_tiny_model

from nca_kernels import cli

pytestmark = pytest.mark.usefixtures("default_dispatch")

ROWS = [
    {"prompt": [{"role": "user", "content": f"Count to {i}."}], "responses": ["1 2 3", "1, 2", "no"][: 2 + i % 2], "scores": scores}
    for i, scores in enumerate(([9, 2], [9, 1, 5], [4, 4], [3, 1, 3]))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with only a tokenizer and a configuration."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    os.remove(folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def inspect(tmp_path, monkeypatch, model, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def run(rows, *words, **keys):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"model": model, "data": "data.jsonl", "output_dir": "out", "use_cpu": True, "alpha": 2.0, **keys}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
        code = cli.main(["inspect", "run.yaml", *words])
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err.splitlines()[-1]

    return run


def test_it_tells_what_a_run_trains_on(inspect):
    printed = inspect(ROWS, "--rows", "2", "--num_train_epochs", "2", "--per_device_train_batch_size", "2")
    for line in (
        "data     data.jsonl: 4 prompts, 10 responses, K = 2 to 3",
        "layout   groups: responses with scores",
        "loss     nca, beta 0.1, alpha 2",
        "K        2 responses: 2 prompts, 3 responses: 2 prompts",
        "scores   least 1, median 3.5, 90% 9, 99% 9, most 9",
        "pairs    8 of one prompt's responses, 6 of them with different scores",
        "cut      0 prompts and 0 responses, 0 tokens, by max_length 1024",
        "steps    4 of 2 prompts, 2 epochs of 4 prompts",
        "<|user|>Count to 0.</s><|assistant|>",
        "[1 2 3</s>]",
        "response 1, score 2, 5 tokens trained on:",
        "warning  1 of 4 prompts have no two different scores and teach nothing",
    ):
        assert line + "\n" in printed, line
    assert printed.count("the prompt:") == 2 and not os.path.exists("out")


WARNINGS = {
    "nothing to learn": (
        [{**row, "scores": [1] * len(row["scores"])} for row in ROWS],
        {},
        "4 of 4 prompts .*; training would be refused",
    ),
    "alpha above": (
        ROWS,
        {"alpha": 1000.0},
        "alpha 1000 is far above the scores' differences .median 7.: all responses weigh nearly the same",
    ),
    "alpha below": (
        ROWS,
        {"alpha": 0.001},
        "alpha 0.001 is far below the scores' differences .median 7.: the best has all the weight",
    ),
    "ends lost": (ROWS, {"max_length": 8}, "responses lose the words before their end token"),
    "not finished": ([{**row, "finished": False} for row in ROWS], {}, "10 responses are not finished and get no end token"),
    "a preference": (
        [{"prompt": "q", "chosen": "a", "rejected": "b"}],
        {"alpha": 1.0},
        "chosen and rejected say which is better, not by how much; wanted alpha: 0, got 1",
    ),
    "equal": ([{**ROWS[0], "responses": ["a", "a"]}], {}, "1 responses have the same tokens as another"),
    "bad rows": ([*ROWS, {"prompt": "q"}], {"skip_bad_rows": True}, "1 bad rows are left out"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_it_warns_of_what_a_user_would_regret(inspect, case):
    rows, keys, message = WARNINGS[case]
    lines = [line for line in inspect(rows, **keys).splitlines() if line.startswith("warning")]
    assert any(re.search(message, line) for line in lines), lines


def test_labels_of_kto(inspect):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i > 0} for i in range(3)]
    printed = inspect(rows, loss="kto")
    assert "labels   2 desirable, 1 not\n" in printed and "response 0, score 0, undesirable, 2 tokens trained on:" in printed


def test_columns_of_the_run(inspect):
    printed = inspect([{"q": "1 + 1 =", "a": [" 2", " 3"], "s": [1, 0]}], columns={"prompt": "q", "responses": "a", "scores": "s"})
    assert "data     data.jsonl: 1 prompts, 2 responses, K = 2\n" in printed


def test_failures_are_one_line(inspect):
    assert inspect([{"prompt": "q"}]).startswith("nca-kernels inspect: data.jsonl: row 1, column prompt: unknown layout")
    assert "gone.jsonl: no such file" in inspect(ROWS, data="gone.jsonl")
    bad = {"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "\ud800"], "scores": [1, 0]}
    assert "data.jsonl: row 5, column responses[1]: a lone surrogate" in inspect([*ROWS, bad])
