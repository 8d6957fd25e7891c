"""The loop of docs/guide.md: sample, rate, train, and repeat from the result. The mean score rises in every round."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers", reason="transformers is not installed")

from tiny import save_tiny_model

from nca_kernels import cli

pytestmark = pytest.mark.usefixtures("default_dispatch")

GUIDE = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()


def section():
    return GUIDE.split("## From prompts alone", 1)[1].split("\n## ", 1)[0]


def code(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL)


def test_three_rounds_of_the_guide(tmp_path, monkeypatch):
    """The guide's script and files run, with a tiny model, few prompts and the guide's reward, which is easy to raise."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model("tiny")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}:"}) + "\n" for i in range(48)))
    (reward,) = code("python")
    Path("reward.py").write_text(reward)
    (config,) = code("yaml")
    values = {**yaml.safe_load(config), "use_cpu": True, "learning_rate": 0.02, "max_steps": 18, "per_device_train_batch_size": 16}
    values |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    Path("run.yaml").write_text(yaml.safe_dump(values))
    (script,) = code("bash")
    # Each command in this process, which has loaded what they need; the shell only tells what they are.
    script = script.replace("Qwen/Qwen2.5-0.5B-Instruct", "tiny").replace("nca-kernels", "echo COMMAND")
    told = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    means = []
    for line in told.splitlines():
        words = line.removeprefix("COMMAND ").split()
        if words[0] == "sample":
            words += ["--max-new-tokens", "8", "--batch-size", "96"]
        assert cli.main(words) == 0, line
        if words[0] == "rate":
            rows = [json.loads(row) for row in Path(words[words.index("--out") + 1]).read_text(encoding="utf-8").split("\n")[:-1]]
            scores = [score for row in rows for score in row["scores"]]
            means.append(sum(scores) / len(scores))
    assert len(means) == 4, "three rounds, and the result of the last"
    assert all(after > before for before, after in zip(means, means[1:], strict=False)), means
