"""docs/guide.md as a new user follows it: its files, commands and Python, with a tiny model in place of the one that it names."""

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml

pytest.importorskip("transformers", reason="transformers is not installed")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from nca_kernels import cli
from nca_kernels.integrations.commands.run_config import Sources, read_run
from nca_kernels.integrations.data import rows
from nca_kernels.integrations.reference import policy_reference
from nca_kernels.integrations.training.config import NCAConfig

pytestmark = pytest.mark.usefixtures("default_dispatch")

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
KEYS = {field.name for kind in (NCAConfig, Sources) for field in dataclasses.fields(kind)}
# Its name before transformers 5.23.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in KEYS else "gradient_checkpointing"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def commands(start):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with the guide's files and a tiny model under the name of the guide's model."""
    folder = tmp_path_factory.mktemp("user")
    save_tiny_model(folder / MODEL)
    files = re.findall(r"^`([\w-]+\.\w+)`[^\n]*:\n\n```\w+\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["train.jsonl", "heldout.jsonl", "run.yaml", "lora.yaml", "qlora.yaml", "fsdp2.yaml"]
    for name, content in files:
        (folder / name).write_text(content.replace("activation_checkpointing", CHECKPOINTING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(autouse=True)
def in_the_users_folder(user, monkeypatch):
    monkeypatch.chdir(user)


def test_its_commands_run_one_after_another(user, capsys):
    ours = commands("nca-kernels ")
    assert [line.split()[1] for line in ours] == ["doctor", "train", "train", "score", "train", "score"]
    for line in ours:
        on_any_machine = ["--use_cpu", "true"] if "train" in line else []
        assert cli.main([*shlex.split(line)[1:], *on_any_machine]) == 0, line
    printed = capsys.readouterr().out
    (shown,) = blocks("text")
    assert shown in printed and "loss     info_nca, beta 0.3, alpha 2, at most 2 responses of a prompt" in printed
    before, whole, lora = (AutoModelForCausalLM.from_pretrained(name) for name in (MODEL, "aligned", "aligned-lora"))
    ids = torch.arange(10)[None]
    assert not torch.equal(before(ids).logits, whole(ids).logits)
    assert not torch.equal(before(ids).logits, lora(ids).logits)
    for name in ("scored.jsonl", "scored-lora.jsonl"):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
        assert len(rows) == 2 and any(reward != 0 for row in rows for reward in row["rewards"])
    plots = {path.stem for path in Path("aligned/plots").iterdir()}
    first = json.loads(Path("aligned/trainer_state.json").read_text())["log_history"][0]
    assert first["loss"] == pytest.approx(math.log(4), rel=1e-5) and first["rewards/accuracy"] == 0
    metrics = set(first)
    named = set(re.findall(r"`((?:loss|rewards|logps|kl)[\w/]*)`", GUIDE.split("## What to look at")[1].split("## From Python")[0]))
    assert named and named <= metrics
    assert {"loss", "rewards_rank", "rewards_accuracy", "logps_best_change"} <= plots


def test_a_run_goes_on_from_its_last_checkpoint(user, capsys):
    words = ["train", "run.yaml", "--output_dir", "resumed", "--resume_from_checkpoint", "true"]
    Path("resumed").mkdir()
    assert cli.main(words) == 1
    assert "resume_from_checkpoint: got true, and resumed has no checkpoint" in capsys.readouterr().err
    assert cli.main([*words[:-2], "--num_train_epochs", "1"]) == 0
    assert cli.main([*words, "--num_train_epochs", "2"]) == 0
    logged = json.loads(Path("resumed/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4]
    assert sorted(path.name for path in Path("resumed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_its_python_runs(user):
    _, trainer, tie_break = blocks("python")  # the first is run by tests/test_loop.py
    exec(trainer, {})
    assert (user / "aligned-python" / "model.safetensors").exists()
    exec(tie_break, {})
    assert json.loads((user / "with-tie-break.jsonl").read_text())["score_A0"] == 9.01


def test_two_processes_print_once_and_end_as_one_does(user):
    (line,) = commands("accelerate launch ")
    words = shlex.split(line)[1:]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data     train.jsonl") == done.stdout.count("saved    aligned-two") == 1
    assert "processes 2" in done.stdout
    # One process that takes the two's prompts at a time makes the same steps.
    assert cli.main(["train", "run.yaml", "--use_cpu", "true", "--per_device_train_batch_size", "4", "--output_dir", "one"]) == 0
    two, one = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("aligned-two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_accelerate_knows_the_keys_of_fsdp2():
    with open("fsdp2.yaml") as file:
        values = yaml.safe_load(file)
    known = vars(launch_command_parser().parse_args(["script"]))
    assert load_config_from_file("fsdp2.yaml").distributed_type == "FSDP"
    assert set(values["fsdp_config"]) <= set(known) and values["fsdp_config"]["fsdp_version"] == 2


def test_failed_runs_say_why_in_one_line(user, capsys, monkeypatch):
    bad = user / "bad.jsonl"
    bad.write_text((user / "train.jsonl").read_text() + '{"prompt": "q", "responses": ["a", "b"], "scores": [1]}\n')
    for words, message in (
        (["--data", "bad.jsonl"], "bad.jsonl: row 7, column scores: got 1 scores for 2 responses"),
        (["--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["--model", "./gone"], "'./gone' cannot be loaded as a folder or hub name"),
        (["--eval_data", "null"], "eval_dataset"),
        (
            ["--model_init_kwargs", "{dtype: bf17}"],
            "model_init_kwargs: got {'dtype': 'bf17'}, with which the model does not load",
        ),
        (
            ["--model_init_kwargs", "{dtypo: x}"],
            "model_init_kwargs: got {'dtypo': 'x'}, with which the model does not load",
        ),
        (["--lora", "{target_modules: [lm_head]}"], "If that is LoRA on the head, leave it out of target_modules"),
    ):
        assert cli.main(["train", "run.yaml", "--output_dir", "failed", *words]) == 1, words
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("nca-kernels train: ") and message in last
    with monkeypatch.context() as patch:
        patch.setattr(policy_reference, "cache_key", lambda *_: "bad")
        (user / "bad.safetensors").write_text("nothing")
        assert cli.main(["train", "run.yaml", "--output_dir", "failed", "--reference_cache_dir", "."]) == 1
        assert "nca-kernels train: bad.safetensors: not a file of reference log-probs" in capsys.readouterr().err
    assert cli.main(["train", "run.yaml", "--data", "bad.jsonl", "--skip_bad_rows", "true", "--max_steps", "1"]) == 0
    assert "bad.jsonl: 6 prompts, 17 responses, K = 2 to 4; 1 bad rows skipped" in capsys.readouterr().out


def test_rows_are_checked_once(user, monkeypatch):
    monkeypatch.setattr(rows, "load_groups", None)  # the trainer's own check
    assert cli.main(["train", "run.yaml", "--use_cpu", "true", "--max_steps", "1", "--output_dir", "once"]) == 0


def test_preferences_take_alpha_0_unless_told(user, capsys):
    row = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}
    (user / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (user / "pairs.yaml").write_text(yaml.safe_dump({"model": MODEL, "data": "pairs.jsonl", "output_dir": "pairs", "max_steps": 1}))
    for words, alpha in (([], "alpha 0 (chosen and rejected: a preference)"), (["--alpha", "0.5"], "alpha 0.5 ")):
        assert cli.main(["train", "pairs.yaml", *words]) == 0
        assert alpha in capsys.readouterr().out


def _table(title):
    """The rows of a table of keys: their key, and ours as ``(key, value)``; the value is empty if the table has none."""
    section = GUIDE.split(title)[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)[1:]
    assert len(rows) > 10
    for theirs, here in rows:
        same = re.match(r"the same\b", here)
        yield theirs, re.findall(r"`([a-z]\w*)(?:: ([^`]+))?`", theirs if same and "the data's" not in theirs else here)


# Written in the tables' other words, and not as a key: a value, a function.
NO_KEYS = {"from_pretrained", "info_nca", "dpo", "precompute"}


@pytest.mark.parametrize("title", ["## From the authors' YAML", "## From TRL's DPOTrainer"])
def test_the_tables_name_keys_and_values_that_a_run_takes(user, title):
    """A configuration accepts the keys of each row, also those that are "the same", with the values that the row gives."""
    for theirs, named in _table(title):
        given = {}
        for key, value in named:
            if key in NO_KEYS:
                continue
            if key == "activation_checkpointing" or not value or "..." in value:
                assert key in {*KEYS, "activation_checkpointing"}, (theirs, key)
            else:
                given[key] = yaml.safe_load(value)
        (user / "row.yaml").write_text(yaml.safe_dump({"model": MODEL, "data": "train.jsonl", "use_cpu": True, **given}))
        run = read_run("row.yaml", [])
        for key, value in given.items():
            assert getattr(run.config, key, getattr(run.sources, key, None)) == value, (theirs, key)


def test_the_table_of_trl_names_its_keys():
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    losses = trl.DPOConfig.__doc__
    section = GUIDE.split("## From TRL's DPOTrainer")[1]
    for theirs, _ in re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)[1:]:
        for key, value in re.findall(r"`(\w+)(?:: (\w+))?`", theirs):
            assert key in fields or theirs.startswith("the data's ")
            assert key != "loss_type" or not value or f"'{value}'" in losses
