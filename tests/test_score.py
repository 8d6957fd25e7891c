"""``nca-kernels score``: its input survives a full disk, and it takes data, lengths and models as training does."""

import json
import os
import resource
import signal

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model
from training import NF4, plain_logps
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nca_kernels import cli, whole_files
from nca_kernels.integrations.commands.score import response_logps, score_file
from nca_kernels.integrations.data.load import load_groups
from nca_kernels.integrations.data.tokenize import tokenize_groups
from nca_kernels.integrations.models.pretrained import load_tokenizer

ROWS = [{"prompt": f"{i} + {i} =", "responses": [f" {2 * i}", " many", " a few"], "scores": [1.0, 0.0, 0.5]} for i in range(40)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch, default_dispatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    save_tiny_model("model")
    with open("data.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def scored(*arguments):
    assert cli.main(["score", "--model", "model", "--out", "out.jsonl", *arguments]) == 0
    with open("out.jsonl") as file:
        return [json.loads(line)["logps"] for line in file]


def test_the_output_may_be_the_input_and_a_full_disk_costs_nothing(capsys):
    """A limit on the size of files stands for the full disk."""
    with open("data.jsonl") as file:
        before = file.read()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rows = load_groups("data.jsonl").rows  # into the cache, which the limit would hit
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        code = cli.main(["score", "--model", "model", "--data", "data.jsonl", "--out", "data.jsonl"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1 and "File too large" in capsys.readouterr().err
    with open("data.jsonl") as file:
        assert file.read() == before
    assert not [name for name in os.listdir() if "unfinished" in name]
    assert cli.main(["score", "--model", "model", "--data", "data.jsonl", "--out", "data.jsonl"]) == 0
    with open("data.jsonl") as file:
        assert [json.loads(line)["responses"] for line in file] == list(rows["responses"])


def test_parquet_and_a_folder_with_its_split():
    wanted = scored("--data", "data.jsonl")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet("data.parquet")
    os.mkdir("folder")
    table.select(range(5)).to_json("folder/test.jsonl")
    assert scored("--data", "data.parquet") == wanted
    assert scored("--data", "folder", "--split", "test") == wanted[:5]


def test_lengths_and_models_as_in_training(capsys):
    """The `run.yaml` saved with the model gives both, and the command line overrides it."""
    rows = load_groups("data.jsonl").rows
    with open("model/run.yaml", "w") as file:
        yaml.safe_dump({"max_length": 12, "model_init_kwargs": {"dtype": "bfloat16"}}, file)
    low = scored("--data", "data.jsonl")
    assert "max_length 12, as model/run.yaml says" in capsys.readouterr().out
    assert low == response_logps("model", rows, max_length=12, model_init_kwargs={"dtype": "bfloat16"})
    high = scored("--data", "data.jsonl", "--max-length", "100", "--model-init-kwargs", "{dtype: float32}")
    assert high == response_logps("model", rows, max_length=100, model_init_kwargs={"dtype": "float32"}) != low
    os.remove("model/run.yaml")
    assert scored("--data", "data.jsonl") == high


def test_an_adapter_of_a_base_in_4_bits():
    """An adapter that `train` saved, with the quantisation in `run.yaml`, gives the log-probs of the model's own logits."""
    pytest.importorskip("bitsandbytes")
    save_tiny_model("model", hidden_size=64, intermediate_size=128, num_key_value_heads=2)  # bitsandbytes wants multiples of 32
    base = AutoModelForCausalLM.from_pretrained("model", quantization_config=BitsAndBytesConfig(**NF4))
    torch.manual_seed(0)
    network = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)).eval()
    network.save_pretrained("adapter")
    with open("adapter/run.yaml", "w") as file:
        yaml.safe_dump({"model_init_kwargs": {"quantization_config": {"quant_method": "bitsandbytes", **NF4}}}, file)
    with open("few.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS[:4])
    got = scored("--data", "few.jsonl", "--model", "adapter")
    rows = tokenize_groups(load_groups("few.jsonl").rows, load_tokenizer("model")).rows
    with torch.no_grad():
        wanted = [plain_logps(network, row["prompt_ids"], row["response_ids"]).tolist() for row in rows]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-5, atol=0)
    whole = scored("--data", "few.jsonl", "--model", "adapter", "--model-init-kwargs", "{}")
    assert (torch.tensor(whole) - torch.tensor(got)).abs().max() > 1e-2


def test_replacing_keeps_links_and_permissions(tmp_path):
    (tmp_path / "a").write_text("old")
    os.chmod(tmp_path / "a", 0o640)
    os.symlink("a", tmp_path / "link")
    with whole_files.replacing(tmp_path / "link") as beside:
        torch.save({}, beside)
    assert os.path.islink(tmp_path / "link") and (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert torch.load(tmp_path / "a") == {}
    with pytest.raises(RuntimeError), whole_files.replacing(tmp_path / "a") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert torch.load(tmp_path / "a") == {} and not list(tmp_path.glob("*.unfinished"))


def test_score_file_from_python(tmp_path):
    score_file("model", "data.jsonl", tmp_path / "new" / "out.jsonl", max_length=20)
    assert len((tmp_path / "new" / "out.jsonl").read_text().splitlines()) == 40
