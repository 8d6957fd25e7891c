"""nca-kernels rate: scores by a Python function and by a reward model."""

import json

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from tiny import save_tiny_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from nca_kernels import cli
from nca_kernels.integrations import load_groups
from nca_kernels.integrations.commands.rate import rewards

ROWS = [
    {"prompt": "ab", "responses": ["long answer", "no"], "finished": [True, False]},
    {"prompt": [{"role": "user", "content": "q"}], "responses": ["1", "22", "333"], "scores": [1, 2, 3], "id": 7},
    {"prompt": "x", "responses": [{"role": "assistant", "content": "yes"}], "system": "be short"},
]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def function(tmp_path, body):
    file = tmp_path / "reward.py"
    file.write_text(f"calls = []\ndef score(prompt, responses):\n    {body}\n")
    return f"{file}:score"


def rate(data, out, *options):
    return cli.main(["rate", "--data", str(data), "--out", str(out), *options])


# --- a function ------------------------------------------------------------------------------------------------------


def test_a_function_scores_each_row(data, tmp_path, capsys):
    out = tmp_path / "train.jsonl"
    assert rate(data, out, "--function", function(tmp_path, "return [len(str(r)) for r in responses]")) == 0
    rows = read(out)
    assert rows[0] == {**ROWS[0], "scores": [11.0, 2.0]}
    assert rows[1] == {**{k: v for k, v in ROWS[1].items() if k != "scores"}, "old_scores": [1, 2, 3], "scores": [1.0, 2.0, 3.0]}
    assert "3 prompts, 6 responses" in capsys.readouterr().out


def test_old_scores_are_never_overwritten(tmp_path):
    data, scorer = tmp_path / "0.jsonl", function(tmp_path, "return [0.5]")
    data.write_text(json.dumps({"prompt": "a", "responses": ["b"], "scores": [1]}) + "\n")
    for n in range(3):
        assert rate(tmp_path / f"{n}.jsonl", tmp_path / f"{n + 1}.jsonl", "--function", scorer) == 0
    (row,) = read(tmp_path / "3.jsonl")
    assert (row["old_scores"], row["old_scores_2"], row["old_scores_3"], row["scores"]) == ([1], [0.5], [0.5], [0.5])


def test_what_it_writes_trains(data, tmp_path):
    out = tmp_path / "train.jsonl"
    rate(data, out, "--function", function(tmp_path, "return [float(i) for i in range(len(responses))]"))
    out.write_text(out.read_text().splitlines()[0] + "\n")
    assert load_groups(out).rows[0]["scores"] == [0.0, 1.0]


@pytest.mark.parametrize(
    "body, problem",
    [
        ("return [float('nan')] * len(responses)", "row 1, scores[0]: got nan, wanted a finite number"),
        ("return [float('inf')] * len(responses)", "row 1, scores[0]: got inf"),
        ("return [1.0]", "row 1: got 1 scores for 2 responses"),
        ("return 1.0", "row 1: got float for 2 responses"),
        ("return [None] * len(responses)", "row 1, scores[0]: got None"),
        ("return [True] * len(responses)", "row 1, scores[0]: got True"),
        ("raise KeyError('answer')", "fails at row 1: KeyError"),
    ],
)
def test_what_a_function_may_not_return(body, problem, data, tmp_path, capsys):
    assert rate(data, tmp_path / "out.jsonl", "--function", function(tmp_path, body)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nca-kernels rate: ") and problem in error


@pytest.mark.parametrize(
    "name, problem",
    [
        ("reward.py", "wanted file.py:name"),
        ("nowhere.py:score", "no such file"),
        ("broken.py:score", "fails when it is loaded: SyntaxError"),
        ("empty.py:score", "has no function 'score'"),
    ],
)
def test_a_function_that_is_not_there(name, problem, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "empty.py").write_text("")
    assert rate(data, tmp_path / "out.jsonl", "--function", name) == 1
    assert problem in capsys.readouterr().err


def test_a_function_that_fails_later_costs_no_row(data, tmp_path):
    """The rows before the failure are not rated again."""
    log = tmp_path / "log"
    body = "open({!r}, 'a').write('.'); assert len(responses) < 3 or {}; return [0.0] * len(responses)"
    assert rate(data, tmp_path / "out.jsonl", "--function", function(tmp_path, body.format(str(log), "False"))) == 1
    assert log.read_text() == ".."
    part = (tmp_path / "out.jsonl.part").read_text()
    assert part.count("\n") == 2
    # The function was mended, so its file differs: the rows of the old one are refused, not mixed with new ones.
    assert rate(data, tmp_path / "out.jsonl", "--function", function(tmp_path, body.format(str(log), "True"))) == 1
    (tmp_path / "out.jsonl.part").unlink()
    assert rate(data, tmp_path / "out.jsonl", "--function", function(tmp_path, body.format(str(log), "True"))) == 0


# --- a reward model --------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 259, "num_labels": 1}
LLAMA = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


def reward_model(kind):
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(**SMALL, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        return BertForSequenceClassification(config).eval()
    if kind == "gpt2":
        config = GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
        return GPT2ForSequenceClassification(config).eval()
    pad = {"llama": 0, "llama without a pad token": None}[kind]
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=pad)).eval()


@pytest.mark.parametrize("kind", ["llama", "llama without a pad token", "gpt2", "bert"])
def test_a_batch_gives_what_each_sequence_alone_gives(kind):
    """This also holds if sequences end in the padding token, and if the model has no padding token."""
    model = reward_model(kind)
    sequences = [[5, 6, 7, 8, 9, 10], [11, 12, 0], [13], [14, 0, 0, 15]]
    if kind == "bert":
        sequences = [[token or 1 for token in sequence] for sequence in sequences]
    with torch.no_grad():
        alone = torch.stack([model(input_ids=torch.tensor([sequence])).logits[0, 0] for sequence in sequences])
    torch.testing.assert_close(rewards(model, sequences), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_scores_through_its_template(side, data, tmp_path):
    folder = str(tmp_path / "rm")
    save_tiny_model(folder)
    reward_model("llama").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    out = tmp_path / "train.jsonl"
    assert rate(data, out, "--reward-model", folder, "--batch-size", "4") == 0
    rows = read(out)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    text = "<|user|>q</s><|assistant|>22</s>"
    with torch.no_grad():
        wanted = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item()
    assert rows[1]["scores"][1] == pytest.approx(wanted, abs=1e-5)
    assert rows[2]["scores"] != rows[0]["scores"][:1] and [len(row["scores"]) for row in rows] == [2, 3, 1]


def test_a_classifier_of_several_outputs_is_refused(data, tmp_path, capsys):
    folder = str(tmp_path / "rm")
    save_tiny_model(folder)
    LlamaForSequenceClassification(LlamaConfig(**{**LLAMA, "num_labels": 3})).save_pretrained(folder)
    assert rate(data, tmp_path / "out.jsonl", "--reward-model", folder) == 1
    assert "has 3 outputs, wanted 1" in capsys.readouterr().err


def test_one_way_to_score_is_wanted(data, tmp_path):
    for options in ([], ["--function", "a.py:b", "--reward-model", "m"]):
        with pytest.raises(SystemExit) as error:
            rate(data, tmp_path / "out.jsonl", *options)
        assert error.value.code == 2
