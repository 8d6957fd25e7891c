"""The command line: what it reads, what it refuses and how it exits; ``train`` is run by tests/test_guide.py."""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import SaveStrategy

from nca_kernels import cli, doctor, selfcheck
from nca_kernels.backends import native
from nca_kernels.integrations import NCAConfig
from nca_kernels.integrations.commands import run_config
from nca_kernels.integrations.commands.other_names import OTHER_NAMES
from nca_kernels.integrations.commands.run_config import read_run
from nca_kernels.integrations.training.run_record import run_settings

pytestmark = pytest.mark.usefixtures("default_dispatch")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of the same shape that differ."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("model", "reference")]
    for seed, folder in enumerate(folders):
        save_tiny_model(folder, seed)
    return folders


def exits(arguments):
    """The exit code, whether it is returned or raised."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code


# --- the configuration of a run ----------------------------------------------------------------------------------------

CONFIG = {"model": "some/model", "data": "train.jsonl", "use_cpu": True, "beta": 0.3}


def config(**values):
    with open("run.yaml", "w") as file:
        yaml.safe_dump({**CONFIG, **values}, file)
    return "run.yaml"


def test_the_command_line_wins_over_the_file():
    run = read_run(config(loss="dpo", lora={"r": 8}), ["--beta", "0.5", "--learning-rate=1e-4", "--tokenizer", "other"])
    assert (run.config.loss, run.config.beta, run.config.learning_rate) == ("dpo", 0.5, 1e-4)
    assert (run.sources.model, run.sources.tokenizer, run.sources.lora) == ("some/model", "other", {"r": 8})
    assert {"beta", "loss"} <= run.given and "alpha" not in run.given


def test_a_key_without_effect_is_told_once_and_left_out_of_run_yaml(caplog):
    run = read_run(config(loss="dpo", alpha=0.3), [])
    assert [record.getMessage() for record in caplog.records] == [
        "alpha: got 0.3, which has no effect on the loss 'dpo', only on info_nca, nca, biased_nca"
    ]
    caplog.clear()
    with open("run.yaml", "w") as file:
        file.write(run_settings(run.config, vars(run.sources)))
    again = read_run("run.yaml", ["--use_cpu", "true"])
    assert again.config.loss == "dpo" and again.config.pairs == "best_vs_rest" and "pairs" in again.given
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("true", "average", True),
        ("no", "bf16", False),
        ("null", "max_length", None),
        ("[wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("{min_lr: 1.0e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("5e-6", "learning_rate", 5e-6),  # YAML 1.1 wants a dot, people do not
        ("2", "beta", 2.0),
        ("7", "run_name", "7"),
        ("a: b: c", "run_name", "a: b: c"),
        ("-1", "max_steps", -1),
        ("true", "resume_from_checkpoint", True),
        ("out/checkpoint-5", "resume_from_checkpoint", "out/checkpoint-5"),
        ("true", "fsdp", True),
        ("no", "save_strategy", SaveStrategy.NO),
    ],
)
def test_values_on_the_command_line(text, key, value):
    got = getattr(read_run(config(), [f"--{key}", text]).config, key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("text", "value"), [("5e-6", 5e-6), ("1", 1.0), ("0.1", 0.1)])
def test_numbers_in_the_file(text, value):
    with open("run.yaml", "w") as file:
        file.write(f"model: m\ndata: d\nuse_cpu: true\nlearning_rate: {text}\n")
    assert read_run("run.yaml", []).config.learning_rate == value


def test_words_that_yaml_reads_as_truth_values():
    with open("run.yaml", "w") as file:
        file.write("model: m\ndata: d\nuse_cpu: true\nsave_strategy: no\nfsdp: true\n")
    run = read_run("run.yaml", [])
    assert run.config.save_strategy == SaveStrategy.NO and run.config.fsdp is True


USAGE = {
    "unknown in the file": ({"betta": 1}, [], "run.yaml: unknown key 'betta'; the nearest known one is 'beta'"),
    "unknown on the line": ({}, ["--los", "nca"], "command line: unknown key 'los'; the nearest known one is 'loss'"),
    "unknown of lora": (
        {"lora": {"rank_patern": 8}},
        [],
        "run.yaml: lora: unknown key 'rank_patern'; the nearest known one is 'rank_pattern'",
    ),
    "unknown and far from all": ({"zzqx": 1}, [], "run.yaml: unknown key 'zzqx'; no known key is near it"),
    "TRL's model": ({"model_name_or_path": "m"}, [], "run.yaml: unknown key 'model_name_or_path'; here it is 'model'"),
    "TRL's data": ({"dataset_name": "d"}, [], "run.yaml: unknown key 'dataset_name'; here it is 'data'"),
    "TRL's loss": ({}, ["--loss_type", "sigmoid"], "command line: unknown key 'loss_type'; here it is 'loss'"),
    "TRL's dtype": (
        {"torch_dtype": "bfloat16"},
        [],
        "run.yaml: unknown key 'torch_dtype'; here it is 'model_init_kwargs: {dtype: ...}'",
    ),
    "TRL's rank": ({"lora_r": 8}, [], "run.yaml: unknown key 'lora_r'; here it is 'lora: {r: ...}'"),
    "LLaMA-Factory's length": ({"cutoff_len": 8}, [], "run.yaml: unknown key 'cutoff_len'; here it is 'max_length'"),
    "text for a number": ({"beta": "high"}, [], "run.yaml: beta: got 'high' (str), wanted float"),
    "truth for a number": ({}, ["--beta", "true"], "command line: beta: got True (bool), wanted float"),
    "number for truth": ({}, ["--bf16", "1"], "command line: bf16: got 1 (int), wanted bool"),
    "fraction for a count": (
        {},
        ["--num_responses", "2.5"],
        "command line: num_responses: got 2.5 (float), wanted int | None",
    ),
    "truth for a name": ({"model": False}, [], "run.yaml: model: got False (bool), wanted str"),
    "number for a name": ({"model": 7}, [], "run.yaml: model: got 7 (int), wanted str"),
    "type in lora": ({"lora": {"r": "8"}}, [], "run.yaml: lora: r: got '8' (str), wanted int"),
    "no batch": ({}, ["--per_device_train_batch_size", "0"], "per_device_train_batch_size: got 0, wanted an int >= 1"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, [], "gradient_accumulation_steps: got 0, wanted an int >= 1"),
    "out of range": ({}, ["--alpha", "-1"], "alpha: got -1"),
    "unknown loss": ({}, ["--loss", "ppo"], "loss: got 'ppo', wanted one of 'info_nca', 'nca'"),
    "unknown choice of transformers": ({"optim": "sdg"}, [], "run.yaml: optim: sdg is not a valid OptimizerNames"),
    "no value": ({}, ["--bf16"], "command line: --bf16 has no value, wanted --bf16 value"),
    "no value before a key": ({}, ["--bf16", "--beta", "1"], "command line: --bf16 has no value"),
    "no key": ({}, ["beta", "1"], "command line: got 'beta', wanted --key value"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_name_key_place_and_what_was_wanted(case, capsys):
    values, words, message = USAGE[case]
    assert exits(["train", config(**values), *words]) == 2
    assert f"nca-kernels train: error: {message}" in capsys.readouterr().err


def test_a_config_that_is_none(capsys):
    for text, message in (
        ("model: [", "run.yaml: not YAML: while parsing"),
        ("model: m\nmodel: n\ndata: d", "run.yaml: not YAML: the key 'model' occurs 2 times, wanted once"),
        ("lora: {r: 1, r: 2}\nmodel: m", "run.yaml: not YAML: the key 'r' occurs 2 times"),
        ("", "run.yaml: got NoneType, wanted lines of key: value"),
        ("model: m", "run.yaml: no data; wanted it there, or as --data on the command line"),
    ):
        with open("run.yaml", "w") as file:
            file.write(text)
        assert exits(["train", "run.yaml"]) == 2
        assert message in capsys.readouterr().err
    assert exits(["train", "gone.yaml"]) == 1
    assert "gone.yaml" in capsys.readouterr().err


def test_a_config_in_another_encoding_is_named(capsys):
    for encoding in ("utf-16", "latin-1"):
        with open("run.yaml", "w", encoding=encoding) as file:
            file.write("model: café\ndata: d")
        assert exits(["train", "run.yaml"]) == 2
        assert "run.yaml: not UTF-8" in capsys.readouterr().err


def test_a_tilde_is_the_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ("model", "data", "eval_data", "tokenizer", "output_dir", "reference_cache_dir", "resume_from_checkpoint")
    run = read_run(config(**{path: f"~/{path}" for path in paths}, run_name="~/as it is"), [])
    values = {**vars(run.sources), **vars(run.config)}
    assert {path: values[path] for path in paths} == {path: f"/home/someone/{path}" for path in paths}
    assert run.config.run_name == "~/as it is"


def test_every_other_name_leads_to_a_key():
    """The key that a message suggests exists, and the other name is not a key."""
    known = set(run_config._hints(run_config.Sources)) | set(run_config._hints(NCAConfig))
    for other, ours in OTHER_NAMES.items():
        assert other not in known
        assert re.match(r"\w+", ours).group() in known | {"the"}, ours


def test_help_lists_every_key_with_type_and_default(capsys):
    for arguments in (["train", "--help"], ["train", config(), "--beta", "1", "--help"]):
        assert exits(arguments) == 0
        told = capsys.readouterr().out
        for key in (*run_config._hints(run_config.Sources), *run_config._hints(NCAConfig)):
            assert re.search(rf"\b{key}\b", told), key
        assert "beta: float = 0.1" in told and "learning_rate: float = 5e-06" in told and "`" not in told


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("boom"), ValueError("odd")])
def test_what_nobody_foresaw_is_one_line_and_a_file(error, monkeypatch, capsys, tmp_path):
    def fails():
        raise error

    monkeypatch.setattr(doctor, "examine", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"nca-kernels doctor: {type(error).__name__}: ") and told.count("\n") == 1
    file = re.search(r"the traceback is in (\S+)\)", told).group(1)
    assert "in fails" in Path(file).read_text()


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", stopped)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nnca-kernels doctor: stopped\n"


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_interrupted_training_says_how_to_go_on(checkpoint, monkeypatch, capsys, tmp_path):
    def stopped(trainer, run):
        raise KeyboardInterrupt

    monkeypatch.setattr("nca_kernels.integrations.commands.train.prepare", lambda run: None)
    monkeypatch.setattr("nca_kernels.integrations.commands.train.train", stopped)
    (tmp_path / "out" / ("checkpoint-10" if checkpoint else "plots")).mkdir(parents=True)
    assert cli.main(["train", config(output_dir=str(tmp_path / "out"))]) == 130
    told = capsys.readouterr().err
    assert ("--resume_from_checkpoint true continues from the last checkpoint" in told) == checkpoint
    assert ("no checkpoint yet" in told) != checkpoint


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    """The message says how to install a package only if it is one of our optional dependencies."""
    if find_spec("deepspeed") is None:
        assert cli.main(["train", config(deepspeed={"zero_optimization": {"stage": 2}})]) == 1
        error = capsys.readouterr().err
        assert "deepspeed" in error and "pip install" not in error

    def needs_peft():
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr(doctor, "examine", needs_peft)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "nca-kernels doctor: No module named 'peft'; install it with: pip install 'nca_kernels[hf]'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["score", "--model", "m"],
        ["score", "--model", "m", "--data", "d.jsonl", "--beta", "0"],
        ["doctor", "--fast"],
    ],
)
def test_usage_of_the_commands(arguments, capsys):
    assert exits(arguments) == 2
    assert "usage: nca-kernels" in capsys.readouterr().err


# --- score -------------------------------------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "prompt": "2 + 2 =", "responses": [" 4", " five", " 6!"], "scores": [1.0, 0.0, 0.5]},
    {"prompt": "2 + 3 =", "responses": [" 5", " 6"], "scores": [1, 1]},
    {"prompt": "é \u2028", "responses": [" yes"]},
    {"prompt": "best?", "chosen": " this", "rejected": " that one"},
]


def write(*rows, path="data.jsonl"):
    with open(path, "w") as file:
        file.write("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return path


def true_logps(folder, prompt, response):
    """The log-probs of each token of the response and of the end of sequence, in float64, from the logits."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([[*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)
    return logps[0, start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]


@pytest.mark.parametrize("average", [False, True])
def test_scores_of_a_file(models, average, capsys):
    flags = ["--average"] if average else []
    assert cli.main(["score", "--model", models[0], "--ref-model", models[1], "--data", write(*ROWS), "--beta", "0.5", *flags]) == 0
    with open("scored.jsonl") as file:
        scored = [json.loads(line) for line in file]
    right = pairs = 0
    for row, given in zip(scored, ROWS, strict=True):
        assert {key: row[key] for key in given} == given and set(row) - set(given) == {"logps", "ref_logps", "rewards"}
        responses = given.get("responses") or [given["chosen"], given["rejected"]]
        true = [[true_logps(folder, row["prompt"], text) for text in responses] for folder in models]
        own, ref = ([(t.mean() if average else t.sum()).item() for t in each] for each in true)
        rewards = [0.5 * (a - b) for a, b in zip(own, ref, strict=True)]
        for name, truth in (("logps", own), ("ref_logps", ref), ("rewards", rewards)):
            assert row[name] == pytest.approx(truth, rel=1e-5, abs=1e-5)
        scores = given.get("scores") or [1, 0][: len(responses)] * (len(responses) == 2)
        ordered = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
        right += sum(rewards[i] > rewards[j] for i, j in ordered)
        pairs += len(ordered)
    assert pairs == 4
    assert f"{right / pairs:.1%} of 4 pairs of different scores are in that order by rewards" in capsys.readouterr().out


def test_scores_without_a_reference_or_scores(models, capsys):
    assert cli.main(["score", "--model", models[0], "--data", write(ROWS[2], ROWS[2]), "--out", "a/b.jsonl"]) == 0
    with open("a/b.jsonl") as file:
        assert [set(json.loads(line)) for line in file] == [{"prompt", "responses", "logps"}] * 2
    assert "pairs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./gone", "--data", "data.jsonl"], "tokenizer: './gone' cannot be loaded as a folder or hub name"),
        (["--model", ".", "--data", "data.jsonl"], "tokenizer: '.' cannot be loaded as a folder or hub name"),
        (["--model", "{model}", "--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--model", "{model}", "--data", "bad.jsonl"], "bad.jsonl: row 3, column responses[1]: empty text"),
        (["--model", "{model}", "--data", "gone.parquet"], "gone.parquet: no such file"),
        (["--model", "{model}", "--data", "data.jsonl", "--out", "data.jsonl/x"], "data.jsonl"),
    ],
)
def test_failed_scores_say_why_in_one_line(models, arguments, message, capsys):
    write(*ROWS)
    write(ROWS[0], {**ROWS[1], "responses": [" 5", " "]}, path="bad.jsonl")
    assert cli.main(["score", *(word.format(model=models[0]) for word in arguments)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nca-kernels score: ") and message in last


# --- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['datasets'] = None\n"
        "from nca_kernels.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"torch         {version('torch')}\n" in done.stdout
    assert "nca_kernels._cpu   built for " in done.stdout
    checks = done.stdout.split("Self-check")[1].splitlines()[1:]
    assert {tuple(line.split()[:3]) for line in checks} >= {
        (op, "cpu", backend) for op in ("token_logps", "linear_token_logps", "group_loss") for backend in ("cpu", "torch")
    }
    assert all(line.split()[4] == "ok" for line in checks)


def outcomes():
    return {(each.op, each.backend, each.dtype): each for each in selfcheck.run([torch.device("cpu")])}


def test_the_self_check_finds_a_wrong_value_a_wrong_gradient_and_a_crash(monkeypatch, capsys):
    forward, backward, loss = native.cpu.token_logps_fwd, native.cpu.token_logps_bwd, native.cpu.group_loss_fwd
    assert all(each.passed for each in outcomes().values())

    def wrong_value(logits, labels, logps, stats, **settings):
        forward(logits, labels, logps, stats, **settings)
        logps[..., 0] += 0.01

    def wrong_gradient(dlogps, logits, labels, stats, dlogits, **settings):
        backward(dlogps, logits, labels, stats, dlogits, **settings)
        dlogits[..., -1] = 0

    def crash(*args, **settings):
        raise RuntimeError("no such instruction")

    for name, original, broken in (
        ("token_logps_fwd", forward, wrong_value),
        ("token_logps_bwd", backward, wrong_gradient),
        ("group_loss_fwd", loss, crash),
    ):
        monkeypatch.setattr(native.cpu, name, broken)
        found = outcomes()
        op = name.removesuffix("_fwd").removesuffix("_bwd")
        failed = found[op, "cpu", torch.float32]
        assert not failed.passed and found[op, "torch", torch.float32].passed
        assert failed.errors is None if broken is crash else max(failed.errors) > 1e-4
        monkeypatch.setattr(native.cpu, name, original)

    monkeypatch.setattr(native.cpu, "group_loss_fwd", crash)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "failed  RuntimeError: no such instruction" in printed.out and "doctor: a backend failed" in printed.err
