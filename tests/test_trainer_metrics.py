"""What the trainer logs about a run: its metrics against plain loops, and its times on a fake clock."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from architectures import tiny
from torch import nn
from training import assert_same_weights, config, logged, make_rows, trained, weights
from transformers import TrainerCallback

from nca_kernels.integrations.training import clock, trainer
from nca_kernels.integrations.training.clock import LossClock
from nca_kernels.integrations.training.metrics import GroupMetrics, TokenSums

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
    lengths = torch.randint(1, 9, (len(counts), K), generator=generator).float()
    top1 = (lengths * torch.rand(len(counts), K, generator=generator)).floor()
    return {
        "loss": loss,
        "rewards": rewards.masked_fill(~mask, 0.0),
        "logps": logps.masked_fill(~mask, 0.0),
        "ref_logps": ref_logps.masked_fill(~mask, 0.0),
        "scores": scores.masked_fill(~mask, 9.0),  # what is masked does not matter
        "mask": mask,
        "tokens": torch.tensor(7 * len(counts)),
        "token_sums": TokenSums(lengths, lengths * 0.3 + top1, top1),
    }


def by_hand(batches):
    seen = {"loss": [sum(batch["loss"].item() for batch in batches), 0]}

    def add(name, value, count=1):
        total = seen.setdefault(name, [0.0, 0])
        total[0] += value
        total[1] += count

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
            lengths, entropy, top1 = (float(sums[b, order[0]]) for sums in batch["token_sums"])
            add("entropy/best", entropy, lengths)
            add("token_accuracy/best", top1, lengths)
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
    """Metrics with ragged K, prompts that only fill up a batch, and batches of different K; reading them resets the sums."""
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
    """A clock that only advances when a test says that something takes time."""

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
    """The time includes forward and backward from the head on, but not the body, nor anything between forward and backward."""
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
    """A callback may log a loss before any step."""
    run = trainer.NCATrainer(tiny("llama"), config(tmp_path), make_rows(4))
    run.log({"loss": 1.0})
    assert logged(run, "loss") == [1.0] and not logged(run, "tokens_per_second")
    run.train()
    assert len(logged(run, "tokens_per_second")) == 1


@torch.no_grad()
def with_likely_tokens(rows, model):
    """Every other token of the best responses is the model's most probable one, so that no accuracy is near 0 or 1."""
    for row in rows:
        best = row["response_ids"][row["scores"].index(max(row["scores"]))]
        for i in range(0, len(best), 2):
            best[i] = int(model(input_ids=torch.tensor([row["prompt_ids"] + best[:i]]), use_cache=False).logits[0, -1].argmax())
    return rows


@torch.no_grad()
def plain_token_metrics(rows, model):
    """Entropy and accuracy of the tokens of the best responses, one prompt at a time, from the model's logits in float64."""
    entropy, right = [], []
    model = copy.deepcopy(model).double().eval()
    for row in rows:
        response = row["response_ids"][row["scores"].index(max(row["scores"]))]
        ids = torch.tensor([row["prompt_ids"] + response])
        logps = model(input_ids=ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1].double().log_softmax(-1)
        entropy.append(-(logps * logps.exp()).sum(-1))
        right.append(logps.argmax(-1) == torch.tensor(response))
    return torch.cat(entropy).mean().item(), torch.cat(right).double().mean().item()


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("nca", {}),
        ("info_nca", {"share_prompt": True}),
        ("dpo", {"average": True, "nll_weight": 0.5}),
        ("kto", {"reference": "model"}),
    ],
)
def test_token_metrics(loss, options, tmp_path):
    """The metrics of a step with two micro-batches of different size and of an evaluation; losses and weights stay the same."""
    model = tiny("llama")
    rows, held_out = (with_likely_tokens(make_rows(n, seed=n), model) for n in (7, 5))
    options = {"loss": loss, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2, **options}
    without = trained(tmp_path, rows, copy.deepcopy(model), held_out, **options)
    run = trained(tmp_path, rows, copy.deepcopy(model), held_out, token_metrics=True, **options)

    entropy, accuracy = plain_token_metrics(rows, model)
    assert 0.2 < accuracy < 0.9
    assert logged(run, "entropy/best") == pytest.approx([entropy], rel=1e-6)
    assert logged(run, "token_accuracy/best") == pytest.approx([accuracy])
    evaluated = run.evaluate()
    entropy, accuracy = plain_token_metrics(held_out, run.model)
    assert evaluated["eval_entropy/best"] == pytest.approx(entropy, rel=1e-6)
    assert evaluated["eval_token_accuracy/best"] == pytest.approx(accuracy)

    assert logged(run, "loss") == pytest.approx(logged(without, "loss"), rel=1e-6)
    assert_same_weights(weights(run), weights(without), model.state_dict(), rtol=1e-6)
    names = {*without.evaluate(), *(name for log in without.state.log_history for name in log)}
    assert "loss" in names and not [name for name in names if "entropy" in name or "token_accuracy" in name]


def test_token_metrics_with_log_probs_of_ones_own_are_refused(tmp_path):
    class Own(trainer.NCATrainer):
        def compute_logps(self, model, batch):
            return super().compute_logps(model, batch)

    Own(tiny("llama"), config(tmp_path), make_rows(4))
    with pytest.raises(ValueError, match="token_metrics: got True, wanted False: Own computes log-probs in its own way"):
        Own(tiny("llama"), config(tmp_path, token_metrics=True), make_rows(4))
