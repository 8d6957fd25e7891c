"""One alignment run on the toy world: a method and a fixed data set in, an aligned model and its curves out."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

from nca_kernels import group_loss

from .toy import IGNORED, Preferences, all_logps, head_logps, response_logps


@dataclass(frozen=True)
class Method:
    """What the paper varies: the loss, and how many responses a prompt it sees (see :func:`choose_responses`)."""

    loss: str
    K: int = 4
    beta: float = 0.3
    alpha: float = 0.1
    pairs: str = "best_vs_rest"
    lr: float = 1e-4


@dataclass
class Curves:
    """The loss of every step; at every one of ``steps``, the log-probs of held-out best and worst responses."""

    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the steps alone
    loss_seconds: float = 0.0  # of these, in the head, the log-probs and the loss, forward and backward


def align(
    reference: LlamaForCausalLM,
    train: Preferences,
    heldout: Preferences,
    method: Method,
    *,
    seed: int,
    steps: int = 200,
    batch_size: int = 16,
    path: str = "linear",
    progress: bool = False,
) -> tuple[LlamaForCausalLM, Curves]:
    """Align a copy of ``reference`` on ``steps`` batches of ``batch_size`` prompts of ``train``."""
    generator = torch.Generator().manual_seed(seed)
    train = choose_responses(train, method.K, generator)
    strangers = _mismatched(reference, train, path) if method.loss == "kto" else None
    model = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    curves = Curves()
    _probe(model, heldout, 0, path, curves)
    order = _batches(len(train), batch_size, steps, generator)
    for step, rows in enumerate(tqdm(order, desc=f"{method.loss}, K = {method.K}", disable=not progress), 1):
        start = time.perf_counter()
        batch = train.pick(rows)
        baseline = _drift(model, strangers.pick(rows), path) if strangers else None
        hidden = model.model(batch.tokens.flatten(0, 1), use_cache=False).last_hidden_state
        # Cut here: what comes after, its backward included, is then timed apart from the model's body.
        cut = hidden.detach().requires_grad_()
        before_loss = time.perf_counter()
        loss = group_loss(
            method.loss,
            head_logps(model, cut, batch.labels, path),
            batch.ref_logps,
            batch.scores,
            beta=method.beta,
            alpha=method.alpha,
            pairs=method.pairs,
            lengths=(batch.labels != IGNORED).sum(-1),
            baseline=baseline,
        ).loss
        loss.backward()
        curves.loss_seconds += time.perf_counter() - before_loss
        hidden.backward(cut.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        curves.seconds += time.perf_counter() - start
        curves.loss.append(loss.item())
        if step % max(steps // 20, 1) == 0:
            _probe(model, heldout, step, path, curves)
    return model, curves


def choose_responses(data: Preferences, K: int, generator: torch.Generator) -> Preferences:
    """K of each prompt's responses: a best one, a worse one, then any others, each at random."""
    rows = torch.arange(len(data))[:, None]
    best = data.scores == data.scores.amax(1, keepdim=True)
    key = torch.rand(data.scores.shape, generator=generator)
    first, second = ((key + group).argmax(1, keepdim=True) for group in (best, ~best))
    key[rows, first], key[rows, second] = 3.0, 2.0
    return data.pick(rows, key.argsort(1, descending=True)[:, :K])


def _mismatched(reference: LlamaForCausalLM, data: Preferences, path: str) -> Preferences:
    """One response to each prompt that was given to another: KTO's baseline is the policy's drift on these."""
    rows = torch.arange(len(data))[:, None]
    given = data.pick(rows, rows % data.scores.shape[1])
    tokens = torch.where(given.labels == IGNORED, given.tokens, given.tokens.roll(1, 0))
    labels = torch.where(given.labels == IGNORED, IGNORED, tokens)
    return Preferences(tokens, labels, given.scores, all_logps(reference, tokens, labels, path))


@torch.no_grad()
def _drift(model: LlamaForCausalLM, data: Preferences, path: str) -> Tensor:
    return (response_logps(model, data.tokens, data.labels, path) - data.ref_logps).mean()


def _probe(model: LlamaForCausalLM, heldout: Preferences, step: int, path: str, curves: Curves) -> None:
    ends = torch.stack([heldout.scores.argmax(1), heldout.scores.argmin(1)], 1)
    ends = heldout.pick(torch.arange(len(heldout))[:, None], ends)
    chosen, rejected = all_logps(model, ends.tokens, ends.labels, path).mean(0).tolist()
    curves.steps.append(step)
    curves.chosen.append(chosen)
    curves.rejected.append(rejected)


def _batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Row numbers [steps, batch_size], every row once before any comes again."""
    epochs = -(-steps * batch_size // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)
