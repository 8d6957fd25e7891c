"""The metrics of a run: sums over prompts that stay on the device and are read over all ranks when they are logged."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ...scores import score_pairs

_OF_TOKENS = ("entropy/best", "token_accuracy/best")
# Each metric is a sum divided by a count.
_SCALARS = ("loss", "rewards/accuracy", "rewards/margin", "logps/best", "logps/worst", "logps/best_change", "kl", *_OF_TOKENS)


class TokenSums(NamedTuple):
    """Sums over the labelled tokens of each response, all ``[B, K]``. Responses that ``mask`` excludes do not count."""

    lengths: Tensor  # the number of tokens
    entropy: Tensor  # nats
    top1: Tensor  # the number of labels that are the most probable token at their position


class GroupMetrics:
    r"""Means over the prompts, pairs and responses seen since they were last read.

    - ``loss``: over prompts.
    - ``rewards/rank_1``, ``rewards/rank_2``, ...: the implicit reward of the best-scored response, of the second-best, ...; equal
      scores are ranked in the order of their columns. Each is a mean over the prompts that have that many responses.
    - ``rewards/accuracy``: the share of all pairs with different scores whose implicit rewards are in the same order.
    - ``rewards/margin``: the implicit reward of the best-scored response minus that of the worst-scored one, over the prompts
      whose scores differ.
    - ``logps/best``, ``logps/worst``: the log-probs of the best- and worst-scored response, over all prompts.
    - ``logps/best_change``: ``logps/best`` minus the reference log-prob of the same response. It is the change since the start of
      training if the reference is the initial model.
    - ``kl``: ``- mean(logp - ref_logp)`` over all responses. If the reference sampled the responses, it is an unbiased estimate of
      KL(reference || policy); otherwise it is a mean drift and may be negative.
    - ``entropy/best``, ``token_accuracy/best``, if token sums are given: over all labelled tokens of the best-scored responses, the
      mean entropy of the policy's next-token distribution, in nats, and the share whose label is its most probable token.

    With ``average``, rewards, log-probs and ``kl`` are averages over a response's tokens, not sums.

    ``tokens`` is a sum: the number of tokens that went through the policy, without padding.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(
        self,
        loss: Tensor,  # the sum over prompts
        rewards: Tensor,  # [B, K]
        logps: Tensor,  # [B, K]
        ref_logps: Tensor,  # [B, K]
        scores: Tensor,  # [B, K]
        mask: Tensor,  # [B, K]
        tokens: Tensor,
        token_sums: TokenSums | None = None,
    ) -> None:
        """Add a batch. There is no host sync: the sums stay on the device of the rewards."""
        there = mask.any(1)
        counts = mask.sum(1)
        order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranked = rewards.gather(1, order).masked_fill(torch.arange(mask.shape[1], device=mask.device) >= counts[:, None], 0.0)
        ends = torch.stack([order[:, 0], order.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]], 1)
        best, worst = logps.gather(1, ends).unbind(1)
        best_reward, worst_reward = rewards.gather(1, ends).unbind(1)
        best_ref = ref_logps.gather(1, ends[:, :1])[:, 0]
        pairs = score_pairs(scores, mask, "all")
        differ = pairs.any(2).any(1)
        right = pairs & (rewards[:, :, None] > rewards[:, None, :])
        prompts = there.sum()
        sums = [
            *(loss, prompts),
            *(right.sum(), pairs.sum()),
            *(((best_reward - worst_reward) * differ).sum(), differ.sum()),
            *((best * there).sum(), prompts),
            *((worst * there).sum(), prompts),
            *(((best - best_ref) * there).sum(), prompts),
            *(((ref_logps - logps) * mask).sum(), counts.sum()),
            *_best_tokens(token_sums, order[:, :1], there),
            tokens,
        ]
        # In float64, because an evaluation may have more than 2^24 tokens; these are a few dozen numbers.
        by_rank = torch.stack([ranked.sum(0), (torch.arange(mask.shape[1], device=mask.device) < counts[:, None]).sum(0)], 1)
        self._add(torch.cat([torch.stack([value.double() for value in sums]), by_rank.double().flatten()]))

    def _add(self, sums: Tensor) -> None:
        if self._sums is None:
            self._sums = sums
            return
        size = max(len(self._sums), len(sums))  # batches differ in K, and each rank of a score has its own sums
        self._sums = F.pad(self._sums, (0, size - len(self._sums))) + F.pad(sums, (0, size - len(sums)))

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes and reset the sums. It takes one collective and one host sync."""
        sums = accelerator.pad_across_processes(self._sums)
        total = accelerator.reduce(sums, "sum").tolist()
        self._sums = None
        n = 2 * len(_SCALARS)
        metrics = {"tokens": total[n]}
        names = [*_SCALARS, *(f"rewards/rank_{rank}" for rank in range(1, (len(total) - n - 1) // 2 + 1))]
        values = total[:n] + total[n + 1 :]
        for name, value, count in zip(names, values[::2], values[1::2], strict=True):
            if count > 0:
                metrics[name] = value / count
        return metrics


def _best_tokens(sums: TokenSums | None, best: Tensor, there: Tensor) -> list[Tensor]:
    """The sum and the count of each metric of ``_OF_TOKENS``, over the responses in the columns ``best`` ``[B, 1]``."""
    if sums is None:
        return [there.new_zeros(())] * (2 * len(_OF_TOKENS))
    lengths, entropy, top1 = ((values.gather(1, best)[:, 0] * there).sum() for values in sums)
    return [entropy, lengths, top1, lengths]
