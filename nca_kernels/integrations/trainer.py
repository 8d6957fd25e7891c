"""K-way alignment as a transformers ``Trainer``: log-probs without logits, and the loss of each prompt's K responses."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .. import group_loss
from .collator import GroupCollator, group_logps
from .config import NCAConfig
from .heads import model_logps
from .shared_prompt import model_inputs

Batch = dict[str, Tensor]


class NCATrainer(Trainer):
    r"""Aligns a causal LM with scored responses."""

    # compute_loss divides by the prompts of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: NCAConfig,
        train_dataset: Dataset | list[dict],
        eval_dataset: Dataset | list[dict] | None = None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        super().__init__(
            model,
            args,
            GroupCollator(pad_token_id, "share_prompt" if args.share_prompt else "padded"),
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int:
        return sum(len(batch["mask"]) for batch in batch_samples)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Tensor:
        logps = self._logps(model, inputs)
        loss, rewards = group_loss(
            self.args.loss,
            logps,
            inputs["ref_logps"],
            inputs["scores"],
            beta=self.args.beta,
            alpha=self.args.alpha,
            mask=inputs["mask"],
            pairs=self.args.pairs,
            lengths=inputs["lengths"],
            reduction="sum",
        )
        loss = loss / (num_items_in_batch or len(logps))
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _logps(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {"attention_mask": None, **model_inputs(self.model, batch)}
        token_logps = model_logps(model, **inputs, labels=batch["labels"], save_budget=self.args.save_budget)
        return group_logps(token_logps, batch)
