"""KTO's baseline: how far the policy has drifted on responses to other prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.collator import Batch


class KTOBaseline:
    r"""The mean log-ratio of policy and reference on mismatched pairs, over the batches of all ranks.

    ``z = mean(log pi(y' | x) - log pi_ref(y' | x))`` with ``y'`` a response to another prompt, in nats; no gradients.

    Args:
        log_ratios: computes ``logps - ref_logps`` of a batch with one response per prompt, ``[B, 1]``, without gradients.
        accelerator: the run's; all ranks share one baseline.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306).
    """

    def __init__(self, log_ratios: Callable[[Batch], Tensor], accelerator: Accelerator):
        self._log_ratios, self._accelerator = log_ratios, accelerator

    @torch.no_grad()
    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        """The baseline of the batches of a step or an evaluation. It takes one collective."""
        sums = torch.zeros(2, device=self._accelerator.device)
        for batch in batches:
            exists = batch["mask"].any(1).to(sums.device)
            sums += torch.stack([(self._log_ratios(batch["mismatched"])[:, 0] * exists).sum(), exists.sum()])
        total, count = self._accelerator.reduce(sums)
        return total / count.clamp(min=1)
