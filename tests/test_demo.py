"""The toy world, one alignment run, the demo and its command, at a size of seconds."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from nca_kernels import cli
from nca_kernels.experiments import toy
from nca_kernels.experiments.align import Method, align, choose_responses
from nca_kernels.losses import LOSSES

pytestmark = pytest.mark.usefixtures("default_dispatch")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the demo runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(one_thread):
    """A model that knows nothing, and rewarded samples of it: nearly every prompt's differ by a lucky digit."""
    generator = torch.Generator().manual_seed(0)
    model = toy.build_model(0, hidden_size=16)
    sums = toy.draw_sums(80, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return model, toy.collect(model, sums, 4, generator, "logits")


def test_task():
    sums = torch.tensor([[123, 456], [999, 999]])
    assert toy.prompts(sums)[0].tolist() == [1, 2, 3, 10, 4, 5, 6, 11]
    assert toy.answers(sums).tolist() == [[0, 5, 7, 9], [1, 9, 9, 8]]
    responses = torch.tensor([[[0, 5, 7, 9], [5, 7, 9, 0]], [[1, 9, 9, 9], [1, 0, 0, 8]]])
    assert toy.share_of_right_digits(sums, responses).tolist() == [[1.0, 0.0], [0.75, 0.5]]
    assert len(toy.draw_sums(1000, torch.Generator().manual_seed(0)).unique(dim=0)) == 1000


def test_samples_follow_the_model(world):
    """The cached sampler draws what whole forwards give, from the same random numbers."""
    model, K = copy.deepcopy(world[0]), 3
    with torch.no_grad():
        model.lm_head.weight *= 30  # untaught, it says nearly the same after every prompt
    prompts = toy.prompts(toy.draw_sums(5, torch.Generator().manual_seed(1)))
    drawn = toy.sample(model, prompts, K, torch.Generator().manual_seed(2)).flatten(0, 1)
    rows, generator = prompts.repeat_interleave(K, 0), torch.Generator().manual_seed(2)
    for _ in range(toy.ANSWER_LENGTH):
        probabilities = model(rows).logits[:, -1].softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=generator)], 1)
    assert torch.equal(drawn, rows[:, prompts.shape[1] :])


def test_collected_preferences(world):
    model, data = world
    assert (data.scores.amax(1) > data.scores.amin(1)).all()
    logits = model(data.tokens[0]).logits.double().log_softmax(-1)
    answer = data.tokens[0, :, -toy.ANSWER_LENGTH :]
    logps = logits[:, -toy.ANSWER_LENGTH - 1 : -1].gather(-1, answer[..., None]).sum((1, 2))
    torch.testing.assert_close(data.ref_logps[0].double(), logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_chosen_responses(world, K):
    data = world[1]
    chosen = choose_responses(data, K, torch.Generator().manual_seed(0))
    assert chosen.tokens.shape[:2] == (len(data), K)
    assert torch.equal(chosen.scores[:, 0], data.scores.amax(1))
    assert (chosen.scores[:, 1] < chosen.scores[:, 0]).all()
    same = (chosen.tokens[:, :, None] == data.tokens[:, None]).all(-1)
    for name in ("scores", "ref_logps"):
        kept = getattr(chosen, name)[:, :, None] == getattr(data, name)[:, None]
        assert (kept & same).any(-1).all(), f"each response keeps its own {name}"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_widens_the_margin(world, loss):
    model, data = world
    before = copy.deepcopy(model.state_dict())
    aligned, curves = align(model, data, data, Method(loss, K=3, lr=3e-3), seed=0, steps=20, batch_size=16)
    margins = [chosen - rejected for chosen, rejected in zip(curves.chosen, curves.rejected, strict=True)]
    assert margins[-1] > margins[0] + 0.1
    assert curves.steps == list(range(21)) and len(curves.loss) == 20
    assert 0 < curves.loss_seconds < curves.seconds
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
    model = toy.build_model(0, hidden_size=16)
    sums = toy.draw_sums(1600, torch.Generator().manual_seed(0))
    losses = toy.teach(model, sums, batch_size=32, target=2.2, progress=False)
    assert 10 <= len(losses) < 50 and sum(losses[-10:]) / 10 <= 2.2 < sum(losses[-11:-1]) / 10


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
