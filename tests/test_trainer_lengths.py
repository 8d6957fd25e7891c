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
    draw = random.Random(0)
    rows = []
    for _ in range(n):
        length = min(2 + int(draw.lognormvariate(1.5, 1.0)), 60)
        ids = [[draw.randrange(1, 40) for _ in range(length)] for _ in range(3)]
        rows.append({"prompt_ids": ids[0][:2], "response_ids": ids[1:], "scores": [1.0, 0.0], "ref_logps": [0.0, 0.0]})
    return rows


def batches_of(tmp_path, rows, **options):
    """The token ids of every step's batch."""
    trainer = NCATrainer(tiny("llama"), config(tmp_path, per_device_train_batch_size=8, **options), rows)
    return [batch["input_ids"] for batch in trainer.get_train_dataloader()]


def padding(batches):
    """The share of a batch that is padding, of all batches."""
    return sum(int((ids == 0).sum()) for ids in batches) / sum(ids.numel() for ids in batches)


def test_batches_by_length_have_less_padding(tmp_path):
    rows = long_tailed_rows(400)
    assert padding(batches_of(tmp_path, rows, train_sampling_strategy="group_by_length")) < 0.1
    assert padding(batches_of(tmp_path, rows)) > 0.4


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
    """The epochs that the sampler is told of."""

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
