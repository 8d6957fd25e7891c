"""NCATrainer in one process: its steps against loops written by hand, its scaling, its metrics, its errors."""

import math

import pytest
import torch
from architectures import tiny
from peft import LoraConfig
from training import assert_same_weights, config, logged, make_rows, plain_logps, trained, weights, with_ref_logps

from nca_kernels import reference
from nca_kernels.integrations.trainer import NCATrainer
from nca_kernels.losses import LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _users_dispatch(default_dispatch):
    """Triton's interpreter takes seconds where the CPU's kernels take milliseconds."""


def by_hand(rows, steps, *, loss="nca", batch=4, lr=0.2, average=False, **options):
    """The losses and weights of plain SGD on full logits, prompt by prompt, in float64; the reference is the model at first."""
    policy, start = tiny("llama").double(), tiny("llama").double()
    losses = []
    for step in range(steps):
        chosen = [(i, rows[i]) for i in range(step * batch, min((step + 1) * batch, len(rows)))]
        baseline = None
        if loss == "kto":
            drifts = []
            for i, row in chosen:
                before = rows[i - 1]["response_ids"]
                stranger = [before[i % len(before)]]
                with torch.no_grad():
                    drift = plain_logps(policy, row["prompt_ids"], stranger) - plain_logps(start, row["prompt_ids"], stranger)
                drifts.append(drift / len(stranger[0]) if average else drift)
            baseline = torch.stack(drifts).mean()
        total = 0
        for _, row in chosen:
            with torch.no_grad():
                ref = plain_logps(start, row["prompt_ids"], row["response_ids"])
            logps = plain_logps(policy, row["prompt_ids"], row["response_ids"])
            lengths = torch.tensor([[len(response) for response in row["response_ids"]]])
            if average:
                ref, logps = ref / lengths[0], logps / lengths[0]
            value, _ = reference.group_loss(
                loss,
                logps[None],
                ref[None],
                torch.tensor([row["scores"]]),
                **{"beta": 0.1, "alpha": 1.0, "pairs": "best_vs_rest", **options},
                lengths=None if average else lengths,
                baseline=baseline,
            )
            total = total + value.sum() / len(chosen)
        total.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= lr * parameter.grad
                parameter.grad = None
        losses.append(float(total))
    return losses, {name: tensor.float() for name, tensor in policy.state_dict().items()}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps(loss, average, tmp_path):
    """Ragged K and a last batch of two prompts, against float64 by hand."""
    rows = make_rows(10)
    losses, wanted = by_hand(rows, 3, loss=loss, average=average)
    trainer = trained(tmp_path, rows, loss=loss, average=average)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=2e-5)
    assert_same_weights(weights(trainer), wanted, tiny("llama").state_dict(), rtol=2e-3)
