"""The reference of a policy: which model computes the reference log-probs, on which device, and where they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from ..data.collator import Batch
from ..data.rows import missing_ref_logps, with_ref_logps
from .cache import cache_key, reference_logps, weights_digest
from .frozen import adapter_changes_nothing, as_reference
from .placement import frozen_copy, to_device_or_shard


class ReferenceOptions(NamedTuple):
    """How reference log-probs are computed; each is a key of :class:`~nca_kernels.integrations.training.config.NCAConfig`."""

    reference: str = "precompute"
    reference_cache_dir: str = "_reference_cache"
    mixed_precision: str = "no"
    logits_dtype: str | None = None
    per_device_eval_batch_size: int = 8
    disable_tqdm: bool = False


class PolicyReference:
    r"""The reference log-probs of a policy's rows and batches.

    With ``reference="precompute"`` they are computed once, cached on disk and added to the rows as a column. With ``"model"`` they
    are computed for every batch. The model that computes them is the first of these: the given ``ref_model``; the base of a policy
    whose adapter changes nothing yet; for ``"model"`` a frozen copy of the policy; for ``"precompute"`` the policy itself, before
    training. Without a ``ref_model`` the reference is therefore the initial policy.

    Args:
        ref_model: a separate model, or ``None``.
        policy: the policy before training.
        compute_logps: ``(model, batch) -> [B, K]``, log-probs of a batch on the model's device.
        collate: makes a batch on that device from rows.
        accelerator: the run's; a reference model is sharded if the run is.
    """

    def __init__(
        self,
        ref_model: nn.Module | None,
        policy: nn.Module,
        compute_logps: Callable[[nn.Module, Batch], Tensor],
        collate: Callable[[list[dict]], Batch],
        accelerator: Accelerator,
        options: ReferenceOptions,
    ):
        self._given = ref_model is not None
        self._is_base = not self._given and isinstance(policy, PeftModel) and adapter_changes_nothing(policy)
        self._compute_logps, self._collate = compute_logps, collate
        self._accelerator, self._options = accelerator, options
        self._model = None if ref_model is None else self._placed(ref_model)

    def keep_copy(self, policy: nn.Module) -> None:
        """Keep a frozen copy of the policy if no other model can compute the reference log-probs of every step."""
        if self._model is None and self._options.reference == "model" and not self._is_base:
            self._model = self._placed(frozen_copy(policy))

    def _placed(self, model: nn.Module) -> nn.Module:
        return to_device_or_shard(model.requires_grad_(False), self._accelerator)

    def release(self) -> None:
        """Release the reference model if it only had to precompute log-probs."""
        if self._options.reference == "precompute":
            self._model = None

    def rows_with_ref_logps(self, name: str, rows: Dataset, policy: nn.Module, *, trained: bool) -> Dataset:
        """The rows, with missing reference log-probs added if the run precomputes them.

        Args:
            name: the name of the rows in errors.
            policy: the policy in its current state.
            trained: whether the policy has been trained since the run began.

        Raises:
            ValueError: no model is left that can compute the reference log-probs.
        """
        missing = missing_ref_logps(rows)
        if missing is None:
            return rows
        model = self._model_for(policy, name, trained)
        if self._options.reference == "model":
            return rows
        base = model is policy and self._is_base
        numerics = " ".join(filter(None, (self._options.mixed_precision, self._options.logits_dtype)))
        key = cache_key(weights_digest(model, base=base), missing, numerics)
        with as_reference(model, base=base), self._accelerator.autocast():
            ref_logps = reference_logps(
                missing,
                lambda rows: self.flat_logps(model, rows),
                Path(self._options.reference_cache_dir) / f"{key}.safetensors",
                self._accelerator,
                batch_size=self._options.per_device_eval_batch_size,
                progress=not self._options.disable_tqdm,
            )
        return with_ref_logps(rows, ref_logps)

    def flat_logps(self, model: nn.Module, rows: list[dict]) -> Tensor:
        """The log-probs of all responses of ``rows`` in order, ``[S]``."""
        batch = self._collate(rows)
        return self._compute_logps(model, batch)[batch["mask"]]

    @torch.no_grad()
    def batch_logps(self, batch: Batch, policy: nn.Module, *, trained: bool) -> Tensor:
        """The reference log-probs of a batch, ``[B, K]``: the batch's own if it has them, else computed by the reference model."""
        if "ref_logps" in batch:
            return batch["ref_logps"]
        model = self._model_for(policy, "ref_logps", trained)
        with as_reference(model, base=model is policy and self._is_base), self._accelerator.autocast():
            return self._compute_logps(model, batch)

    def _model_for(self, policy: nn.Module, name: str, trained: bool) -> nn.Module:
        if self._model is not None:
            return self._model
        if self._given or (trained and not self._is_base):
            gone = "ref_model is no longer kept" if self._given else "the model is no longer the reference"
            raise ValueError(
                f"{name}: rows without ref_logps, and {gone}; wanted them at the start of NCATrainer, or with ref_logps, or "
                'reference="model"'
            )
        return policy
