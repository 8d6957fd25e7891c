"""The metrics of NCATrainer's evaluate and predict, against plain log-probs in float64."""

import pytest
import torch
from architectures import tiny
from datasets import Dataset
from test_data import tokenizer
from training import config, logged, make_rows, plain_logps, trained, with_ref_logps

from nca_kernels import reference
from nca_kernels.integrations.training.trainer import NCATrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def test_evaluate(tmp_path):
    """A last batch of one prompt counts as one prompt; metrics equal those of one batch with all prompts."""
    rows, held_out = make_rows(8), make_rows(9, seed=1)
    trainer = trained(tmp_path, rows, eval_dataset=held_out, eval_strategy="epoch")
    assert len(logged(trainer, "eval_loss")) == 1
    metrics = trainer.evaluate()
    policy, start = trainer.model.double(), tiny("llama").double()
    losses, margins, changes, right, pairs = [], [], [], 0, 0
    for row in held_out:
        with torch.no_grad():
            logps, ref = (plain_logps(model, row["prompt_ids"], row["response_ids"]) for model in (policy, start))
        scores = torch.tensor(row["scores"])
        loss, rewards = reference.group_loss("nca", logps[None], ref[None], scores[None], beta=0.1, alpha=1.0)
        losses.append(float(loss))
        best, worst = scores.argmax(), scores.argmin()
        margins.append(float(rewards[0, best] - rewards[0, worst]))
        changes.append(float(logps[best] - ref[best]))
        for i in range(len(scores)):
            for j in range(len(scores)):
                pairs += int(scores[i] > scores[j])
                right += int(scores[i] > scores[j] and rewards[0, i] > rewards[0, j])
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert metrics["eval_rewards/margin"] == pytest.approx(sum(margins) / 9, rel=1e-3)
    assert metrics["eval_logps/best_change"] == pytest.approx(sum(changes) / 9, rel=1e-3)
    assert metrics["eval_rewards/accuracy"] == pytest.approx(right / pairs)


def test_evaluating_on_other_rows(tmp_path):
    rows = make_rows(8)
    scored = with_ref_logps(rows, tiny("llama"))
    trainer = NCATrainer(tiny("llama"), config(tmp_path), rows, {"a": rows[:3], "b": rows[3:]})
    before = trainer.evaluate()
    assert before.keys() >= {"eval_a_loss", "eval_b_loss", "eval_b_rewards/rank_1"}
    assert before["eval_a_logps/best_change"] == 0
    trainer.train()
    after = trainer.evaluate(scored[:3])
    assert after["eval_loss"] == pytest.approx(trainer.evaluate()["eval_a_loss"], rel=1e-5) != before["eval_a_loss"]
    with pytest.raises(ValueError, match="eval_dataset: rows without ref_logps, and the model is no longer the reference"):
        trainer.evaluate(rows[:3])


@pytest.mark.parametrize("loss", ["nca", "kto"])
def test_predict(loss, tmp_path):
    """predict takes rows in any form that evaluate takes, and gives the same metrics."""
    words = tokenizer()
    rows = [{"prompt": prompt, "responses": ["ath", " oth"], "scores": [1.0, 0.2]} for prompt in ("the moth", "a", "oth")]
    trainer = trained(
        tmp_path, rows, tiny("llama", vocab_size=len(words)), rows, processing_class=words, loss=loss, reference="model"
    )
    wanted = trainer.evaluate()["eval_loss"]
    for given in (rows, Dataset.from_list(rows), trainer.eval_dataset):
        predicted = trainer.predict(given)
        assert predicted.predictions is None
        assert predicted.metrics["test_loss"] == wanted


def test_ktos_evaluation_does_not_depend_on_its_batches(tmp_path):
    """An evaluation has one baseline, which equals that of a plain loop in float64."""
    rows, held_out = (
        [{**row, "desirable": [score == max(row["scores"]) for score in row["scores"]]} for row in each]
        for each in (make_rows(6), make_rows(5, seed=3))
    )
    losses = []
    for size in (1, 2, 5):
        trainer = trained(tmp_path, rows, eval_dataset=held_out, loss="kto", per_device_eval_batch_size=size)
        losses.append(trainer.evaluate()["eval_loss"])
    policy, start = trainer.model.double(), tiny("llama").double()
    changes = []
    for row in trainer.eval_dataset:
        responses = [*row["response_ids"], row["mismatched_ids"]]
        with torch.no_grad():
            changes.append(plain_logps(policy, row["prompt_ids"], responses) - plain_logps(start, row["prompt_ids"], responses))
    z = sum(change[-1] for change in changes) / 5
    assert z > 0.1
    wanted = 0
    for row, change in zip(held_out, changes, strict=True):
        desirable = torch.tensor(row["desirable"])
        wanted += float((1 - torch.sigmoid(0.1 * (change[:-1] - z) * (2 * desirable - 1))).mean()) / 5
    assert losses == pytest.approx([wanted] * 3, rel=1e-5)
