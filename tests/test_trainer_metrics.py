"""What the trainer says of a run: its metrics against loops by hand, its times on a clock set by hand."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny
from torch import nn
from training import config, logged, make_rows
from transformers import TrainerCallback

from nca_kernels.integrations.training import clock, trainer
from nca_kernels.integrations.training.clock import LossClock
from nca_kernels.integrations.training.metrics import GroupMetrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def random_batch(counts, K, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(K) < torch.tensor(counts)[:, None]
    rewards, logps, ref_logps = (torch.randn(len(counts), K, generator=generator) for _ in range(3))
    scores = torch.randint(3, (len(counts), K), generator=generator).float()  # with ties
    loss = torch.randn((), generator=generator)
    return {
        "loss": loss,
        "rewards": rewards.masked_fill(~mask, 0.0),
        "logps": logps.masked_fill(~mask, 0.0),
        "ref_logps": ref_logps.masked_fill(~mask, 0.0),
        "scores": scores.masked_fill(~mask, 9.0),  # what is masked does not matter
        "mask": mask,
        "tokens": torch.tensor(7 * len(counts)),
    }


def by_hand(batches):
    seen = {"loss": [sum(batch["loss"].item() for batch in batches), 0]}

    def add(name, value):
        total = seen.setdefault(name, [0.0, 0])
        total[0] += value
        total[1] += 1

    for batch in batches:
        for b in range(len(batch["mask"])):
            n = int(batch["mask"][b].sum())
            if n == 0:
                continue
            rewards, logps, ref, scores = (batch[name][b][:n].tolist() for name in ("rewards", "logps", "ref_logps", "scores"))
            order = sorted(range(n), key=lambda i: -scores[i])
            seen["loss"][1] += 1
            for rank, i in enumerate(order, start=1):
                add(f"rewards/rank_{rank}", rewards[i])
                add("kl", ref[i] - logps[i])
            add("logps/best", logps[order[0]])
            add("logps/worst", logps[order[-1]])
            add("logps/best_change", logps[order[0]] - ref[order[0]])
            if scores[order[0]] > scores[order[-1]]:
                add("rewards/margin", rewards[order[0]] - rewards[order[-1]])
            for i in range(n):
                for j in range(n):
                    if scores[i] > scores[j]:
                        add("rewards/accuracy", rewards[i] > rewards[j])
    return {name: total / count for name, (total, count) in seen.items()}


def test_metrics():
    """Ragged K, prompts that only fill up a batch, batches of other K; every reading begins anew."""
    metrics, accelerator = GroupMetrics(), Accelerator(cpu=True)
    for batches in (
        [random_batch([3, 1, 4, 2], 4, 0), random_batch([2, 6, 0], 6, 1), random_batch([1, 0], 1, 2)],
        [random_batch([5, 5, 2], 5, 3)],
    ):
        for batch in batches:
            metrics.update(**batch)
        means = metrics.read(accelerator)
        assert means.pop("tokens") == sum(int(batch["tokens"]) for batch in batches)
        assert means == pytest.approx(by_hand(batches), rel=1e-5)


class Clock:
    """Stands still but where something is said to take time."""

    def __init__(self, monkeypatch, *modules):
        self.now = 0.0
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def taking(self, forward, backward):
        watch = self

        class Work(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                watch.now += forward
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                watch.now += backward
                return gradient

        return Work.apply


def test_share_of_time_in_the_loss(monkeypatch):
    """From the head on, forward and backward; not the body, and nothing between forward and backward."""
    watch = Clock(monkeypatch, clock)
    body, head, loss = watch.taking(100.0, 200.0), watch.taking(1.0, 2.0), watch.taking(4.0, 8.0)

    class Head(nn.Module):
        def forward(self, hidden):
            return head(hidden)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Head()

        def get_output_embeddings(self):
            return self.head

        def forward(self, x):
            return self.head(body(x))

    model, measured = Model(), LossClock(torch.device("cpu"))
    for _ in range(2):
        with measured.from_head(model):
            value = loss(model(torch.ones(3, requires_grad=True)).sum())
        watch.now += 1000.0
        measured.watch(value)
        value.backward()
    assert measured.seconds() == 2 * (1 + 4 + 8 + 2)
    assert measured.seconds() == 0
    assert not model.head._forward_pre_hooks


def test_speed_leaves_evaluations_out(tmp_path, monkeypatch):
    watch = Clock(monkeypatch, trainer)

    class Ticks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            watch.now += 2.0

        def on_prediction_step(self, *args, **kwargs):
            watch.now += 1000.0

    rows = make_rows(8)
    args = config(tmp_path, per_device_train_batch_size=2, logging_steps=2, eval_strategy="steps", eval_steps=1)
    run = trainer.NCATrainer(tiny("llama"), args, rows, rows, callbacks=[Ticks()])
    run.train()
    tokens = [sum(len(row["prompt_ids"]) + len(ids) for ids in row["response_ids"]) for row in rows]
    assert logged(run, "tokens_per_second") == [sum(tokens[:4]) / 4.0, sum(tokens[4:]) / 4.0]


def test_times_are_kept_only_to_be_logged(tmp_path):
    run = trainer.NCATrainer(tiny("llama"), config(tmp_path, logging_strategy="no"), make_rows(4))
    run.train()
    assert run._clock is None
    assert "loss" not in {name for log in run.state.log_history for name in log}


def test_logs_of_others(tmp_path):
    """A loss that a callback logs before any step."""
    run = trainer.NCATrainer(tiny("llama"), config(tmp_path), make_rows(4))
    run.log({"loss": 1.0})
    assert logged(run, "loss") == [1.0] and not logged(run, "tokens_per_second")
    run.train()
    assert len(logged(run, "tokens_per_second")) == 1
