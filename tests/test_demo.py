"""The small models, one alignment run, the demo and its command, at a size that takes seconds."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from nca_kernels import cli
from nca_kernels.experiments import samples
from nca_kernels.experiments.align import Method, align
from nca_kernels.experiments.tasks import TASKS
from nca_kernels.experiments.teach import build_model, teach
from nca_kernels.loss_table import LOSSES

pytestmark = pytest.mark.usefixtures("default_dispatch")


SUMS, CHAINS = TASKS["sums"], TASKS["chains"]


@pytest.fixture(scope="module")
def world():
    """An untrained model and its rewarded samples; for nearly every prompt the rewards differ, because of a lucky digit."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(0, hidden_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        problems = SUMS.draw(80, generator)
        responses = samples.sample(model, SUMS.prompts(problems), 4, 4, generator).tokens
        return model, samples.prefer(model, SUMS, problems, responses, SUMS.rewards(problems, responses), "logits")


def test_sums():
    problems = torch.tensor([[123, 456], [999, 999]])
    assert SUMS.prompts(problems)[0].tolist() == [1, 2, 3, 10, 4, 5, 6, 11]
    assert SUMS.answers(problems).tolist() == [[0, 5, 7, 9], [1, 9, 9, 8]]
    responses = torch.tensor([[[0, 5, 7, 9], [5, 7, 9, 0]], [[1, 9, 9, 9], [1, 0, 0, 8]]])
    assert SUMS.rewards(problems, responses).tolist() == [[1.0, 0.0], [0.75, 0.5]]


def test_chains():
    problems = torch.tensor([[47, 85, 36]])
    assert CHAINS.prompts(problems).tolist() == [[4, 7, 10, 8, 5, 10, 3, 6, 11]]
    right = CHAINS.answers(problems)
    assert right.tolist() == [[1, 3, 2, 10, 3, 6, 11, 1, 6, 8]]
    wrong_step, wrong_result = right.clone(), right.clone()
    wrong_step[0, 2], wrong_result[0, -1] = 1, 9
    responses = torch.stack([right, wrong_step, wrong_result], dim=1)
    assert CHAINS.rewards(problems, responses).tolist() == [[1.0, 1.0, 0.0]], "only the result is checked"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_drawn_problems(task):
    problems = task.draw(1000, torch.Generator().manual_seed(0))
    assert len(problems.unique(dim=0)) == 1000
    assert {len(str(number)) for number in problems.flatten().tolist()} == {task.digits}
    answers = task.answers(problems)
    assert (task.rewards(problems, answers[:, None]) == 1).all()


def test_samples_follow_the_model(world):
    """With the same random numbers the cached sampler draws the same tokens as full forwards; without, the most probable ones."""
    model, K = copy.deepcopy(world[0]), 3
    with torch.no_grad():
        model.lm_head.weight *= 30  # untaught, it says nearly the same after every prompt
    prompts = SUMS.prompts(SUMS.draw(5, torch.Generator().manual_seed(1)))
    for seed in (2, None):
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        drawn = samples.sample(model, prompts, K, 4, generators[0]).tokens.flatten(0, 1)
        rows = prompts.repeat_interleave(K, 0)
        for _ in range(4):
            logits = model(rows).logits[:, -1]
            if seed is None:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(logits.softmax(-1), 1, generator=generators[1])
            rows = torch.cat([rows, token], 1)
        assert torch.equal(drawn, rows[:, prompts.shape[1] :])


def test_collected_preferences(world):
    model, data = world
    assert (data.scores.amax(1) > data.scores.amin(1)).all()
    logits = model(data.tokens[0]).logits.double().log_softmax(-1)
    answer = data.tokens[0, :, -4:]
    logps = logits[:, -5:-1].gather(-1, answer[..., None]).sum((1, 2))
    torch.testing.assert_close(data.ref_logps[0].double(), logps, rtol=1e-5, atol=1e-5)


def test_rows_for_the_trainer(world):
    data = world[1]
    row = data.rows()[3]
    assert [row["prompt_ids"] + response for response in row["response_ids"]] == data.tokens[3].tolist()
    assert row["scores"] == data.scores[3].tolist() and row["ref_logps"] == data.ref_logps[3].tolist()
    assert all(len(response) == 4 for response in row["response_ids"])
    ends = data.ends()
    assert torch.equal(ends.scores, torch.stack([data.scores.amax(1), data.scores.amin(1)], 1))
    for name in ("scores", "ref_logps"):
        same = (ends.tokens[:, :, None] == data.tokens[:, None]).all(-1)
        kept = getattr(ends, name)[:, :, None] == getattr(data, name)[:, None]
        assert (kept & same).any(-1).all(), f"each response keeps its own {name}"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_widens_the_margin(world, loss, caplog):
    model, data = world
    before = copy.deepcopy(model.state_dict())
    aligned, curves = align(model, data, data, Method(loss, K=3, lr=3e-3), seed=0, steps=20, batch_size=16)
    margins = [chosen - rejected for chosen, rejected in zip(curves.chosen, curves.rejected, strict=True)]
    assert margins[-1] > margins[0] + 0.1
    assert "has no effect" not in caplog.text
    assert curves.steps == list(range(21)) and len(curves.loss) == 20
    assert all(0 < share < 1 for share in curves.loss_time_share)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the reference moved"
    assert not any(torch.equal(before[name], value) for name, value in aligned.state_dict().items()), "a weight did not"


def test_paths_agree_and_runs_repeat(world):
    model, data = world
    runs = [
        align(model, data, data, Method("nca", lr=3e-3), seed=0, steps=5, batch_size=8, path=path)[1]
        for path in ("linear", "logits", "linear")
    ]
    assert runs[0].loss == runs[2].loss and runs[0].chosen == runs[2].chosen
    torch.testing.assert_close(runs[0].loss, runs[1].loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(runs[0].chosen, runs[1].chosen, rtol=1e-4, atol=1e-4)


def test_teaching_ends_at_its_target():
    model = build_model(0, hidden_size=16)
    problems = SUMS.draw(1600, torch.Generator().manual_seed(0))
    losses = teach(model, SUMS, problems, batch_size=32, target=2.2, progress=False)
    assert 10 <= len(losses) < 50 and sum(losses[-10:]) / 10 <= 2.2 < sum(losses[-11:-1]) / 10


TAUGHT = """
import hashlib, torch
from nca_kernels.experiments.tasks import TASKS
from nca_kernels.experiments.teach import build_model, teach
torch.set_num_threads(1)
model = build_model(0, hidden_size=32)
teach(model, TASKS["sums"], TASKS["sums"].draw(1920, torch.Generator().manual_seed(0)), batch_size=32, target=0.1, progress=False)
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(b"".join(p.detach().numpy() for p in model.parameters())).hexdigest())
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one set of vector instructions")
def test_another_cpu_teaches_the_same_weights():
    """PyTorch and MKL without vector instructions beyond SSE stand in for another CPU."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", TAUGHT], env={**os.environ, **other}, check=True, capture_output=True, text=True
        ).stdout
        for other in ({}, {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"})
    ]
    (here, weights), (there, same) = (line.split() for line in printed)
    assert here != there and weights == same


def test_both_paths_give_the_same_losses(tmp_path, capsys, default_dispatch):
    losses = {}
    for path in ("linear", "logits"):
        out = tmp_path / path
        assert cli.main(["demo", "--quick", "--path", path, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("supervised", "DPO", "NCA", "InfoNCA", "chosen log-prob"))
        assert (out / "figure2.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((out / "demo.json").read_text())["results"]
        losses[path] = [results[name]["curves"]["loss"] for name in results if name != "supervised"]
    for linear, logits in zip(losses["linear"], losses["logits"], strict=True):
        assert linear == pytest.approx(logits, rel=1e-3)


def test_exit_codes(tmp_path, capsys):
    with pytest.raises(SystemExit) as usage:
        cli.main(["demo", "--path", "guess"])
    assert usage.value.code == 2
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 1
    assert "nca-kernels demo:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["align"], ["demo", "--path", "nowhere"], ["demo", "--seed", "x"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: nca-kernels" in capsys.readouterr().err
