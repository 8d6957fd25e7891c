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

from .toy import Preferences, all_logps, head_logps


@dataclass(frozen=True)
class Method:
    """What the paper varies. ``K`` responses a prompt are used: a best one, a worse one, and others at random."""

    loss: str
    K: int = 4
    beta: float = 0.1
    alpha: float = 0.1
    pairs: str = "best_vs_rest"
    lr: float = 3e-4


@dataclass
class Curves:
    """Losses at every step; log-probs of held-out best and worst responses at the steps of ``steps``."""

    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    seconds: float = 0.0
    loss_seconds: float = 0.0


def align(
    reference: LlamaForCausalLM,
    train: Preferences,
    heldout: Preferences,
    method: Method,
    *,
    seed: int,
    steps: int,
    batch_size: int = 16,
    path: str = "linear",
    progress: bool = False,
) -> tuple[LlamaForCausalLM, Curves]:
    """Align a copy of ``reference`` on batches of ``batch_size`` prompts of ``train``."""
    generator = torch.Generator().manual_seed(seed)
    train = choose_responses(train, method.K, generator)
    lengths = (train.labels >= 0).sum(-1)
    model = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    curves = Curves()
    _probe(model, heldout, 0, path, curves)
    order = _batches(len(train), batch_size, steps, generator)
    for step, rows in enumerate(tqdm(order, desc=f"{method.loss}, K = {method.K}", disable=not progress), 1):
        start = time.perf_counter()
        model.train()
        hidden = model.model(train.tokens[rows].flatten(0, 1), use_cache=False).last_hidden_state
        body = time.perf_counter()
        # Cut here, so that what the head and the loss take, backward included, can be timed apart from the model's body.
        cut = hidden.detach().requires_grad_()
        logps = head_logps(model, cut, train.labels[rows], path)
        loss, _ = group_loss(
            method.loss,
            logps,
            train.ref_logps[rows],
            train.scores[rows],
            beta=method.beta,
            alpha=method.alpha,
            pairs=method.pairs,
            lengths=lengths[rows],
        )
        loss.backward()
        curves.loss_seconds += time.perf_counter() - body
        hidden.backward(cut.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        curves.loss.append(loss.item())
        curves.seconds += time.perf_counter() - start
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
    columns = key.argsort(1, descending=True)[:, :K]
    return Preferences(*(values[rows, columns] for values in (data.tokens, data.labels, data.scores, data.ref_logps)))


def _probe(model: LlamaForCausalLM, heldout: Preferences, step: int, path: str, curves: Curves) -> None:
    rows = torch.arange(len(heldout))[:, None]
    ends = torch.stack([heldout.scores.argmax(1), heldout.scores.argmin(1)], 1)
    chosen, rejected = all_logps(model, heldout.tokens[rows, ends], heldout.labels[rows, ends], path).mean(0).tolist()
    curves.steps.append(step)
    curves.chosen.append(chosen)
    curves.rejected.append(rejected)


def _batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """Row numbers [steps, batch_size], every row once before any comes again."""
    epochs = -(-steps * batch_size // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)
