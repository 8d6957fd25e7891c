"""Batches of prompts of similar length."""

import random

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from architectures import tiny
from training import config
from transformers import TrainerCallback

from nca_kernels.integrations import NCATrainer
from nca_kernels.integrations.training.by_length import LengthSampler

pytestmark = pytest.mark.usefixtures("default_dispatch")


def long_tailed_rows(n):
    """Rows with two responses each; the lengths of prompts and responses are drawn independently."""
    draw = random.Random(0)

    def ids():
        return [draw.randrange(1, 40) for _ in range(min(2 + int(draw.lognormvariate(1.5, 1.0)), 60))]

    return [{"prompt_ids": ids(), "response_ids": [ids(), ids()], "scores": [1.0, 0.0], "ref_logps": [0.0, 0.0]} for _ in range(n)]


def batches_of(tmp_path, rows, **options):
    """The token ids of every step's batch."""
    trainer = NCATrainer(tiny("llama"), config(tmp_path, per_device_train_batch_size=8, **options), rows)
    return [batch["input_ids"] for batch in trainer.get_train_dataloader()]


def padding(batches):
    """The share of padding in all batches."""
    return sum(int((ids == 0).sum()) for ids in batches) / sum(ids.numel() for ids in batches)


def test_batches_by_length_have_less_padding(tmp_path):
    rows = long_tailed_rows(400)
    alike = [{**row, "response_ids": row["response_ids"][:1] * 2} for row in rows]
    assert padding(batches_of(tmp_path, alike, train_sampling_strategy="group_by_length")) < 0.1
    assert padding(batches_of(tmp_path, alike)) > 0.4
    # Where the prompt is shared a line holds all of a prompt's responses: the longest one alone says little of its length.
    shared = {"share_prompt": True}
    assert padding(batches_of(tmp_path, rows, **shared, train_sampling_strategy="group_by_length")) < 0.1
    assert padding(batches_of(tmp_path, rows, **shared)) > 0.4


def test_evaluation_by_length_has_the_same_metrics(tmp_path):
    rows = long_tailed_rows(21)
    positions, metrics = [], []
    for strategy in ("group_by_length", "sequential"):
        trainer = NCATrainer(tiny("llama"), config(tmp_path, train_sampling_strategy=strategy), rows, rows)
        positions.append(sum(batch["input_ids"].numel() for batch in trainer.get_eval_dataloader()))
        metrics.append({name: value for name, value in trainer.evaluate().items() if "second" not in name and "time" not in name})
    assert positions[0] < 0.8 * positions[1]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-6)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own():
    lengths = [random.Random(0).randrange(2, 90) for _ in range(101)]
    sampler = LengthSampler(lengths, 8, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert orders[0] == orders[2] != orders[1]
    assert list(LengthSampler(lengths, 8, seed=4)) != orders[0]


class Seen(TrainerCallback):
    """Records the epochs that the sampler is set to."""

    def __init__(self, told):
        self.told = told

    def on_epoch_end(self, args, state, control, train_dataloader, **kwargs):
        self.told.append(list(train_dataloader.batch_sampler.sampler)[:8])


def test_a_run_tells_the_sampler_its_epochs(tmp_path):
    told = []
    options = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2, "max_steps": -1}
    NCATrainer(
        tiny("llama"), config(tmp_path, per_device_train_batch_size=8, **options), long_tailed_rows(40), callbacks=[Seen(told)]
    ).train()
    assert len(told) == 2 and told[0] != told[1]
