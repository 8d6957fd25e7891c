"""K-way alignment as a transformers ``Trainer``: log-probs without logits, and the loss of each prompt's K responses."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, PredictionOutput

from ... import group_loss
from ..data.collator import GroupCollator, group_logps
from ..data.mismatched import MismatchedCollator
from ..data.rows import longest_sequences, prepare_rows, unscored, with_ref_logps
from ..data.shared_prompt import check_layout, model_inputs
from ..models.evaluating import evaluating
from ..models.heads import model_logps
from ..reference.cache import cache_key, reference_logps, weights_digest
from ..reference.frozen import as_reference, refuse_rewritten_base
from .clock import LossClock
from .config import NCAConfig
from .metrics import GroupMetrics
from .plots import PlotsCallback
from .policy import check_reference, policy_of, warn_of_losses

Rows = Dataset | list[dict]
Batch = dict[str, Tensor]


class NCATrainer(Trainer):
    r"""Aligns a causal LM with scored responses, by any loss of :func:`nca_kernels.group_loss`.

    The log-probs of policy and reference go through :func:`~nca_kernels.integrations.model_logps`: no logits. The loss of a
    step is the mean over all prompts of its accumulated batch on all ranks, each counted once, whatever the number of their
    responses and the size of the last batch. Metrics: :class:`~nca_kernels.integrations.training.metrics.GroupMetrics`,
    with ``tokens_per_second`` (without padding, evaluations left out) and ``loss_time_share``
    (:class:`~nca_kernels.integrations.training.clock.LossClock`). After training their curves lie in
    ``<output_dir>/plots``.

    Args:
        model: a transformers causal LM (inside PEFT, or not), or what ``from_pretrained`` takes: then in float32, since steps of
            5e-6 are lost in bfloat16 weights; with ``peft_config`` in the dtype that it was saved in. A model that is loaded
            keeps its own; trained in bfloat16, it gives a warning.
        args: see :class:`~nca_kernels.integrations.training.config.NCAConfig`.
        train_dataset: rows of a prompt, K responses and their scores: in any layout of ``load_groups``, or of
            ``tokenize_groups``. ``ref_logps`` in the latter (summed over tokens) are taken as they are.
        eval_dataset: the same, or a mapping of names to such.
        processing_class: the tokenizer, for rows that are not tokenized; saved with the model.
        peft_config: trains an adapter of the model; the base is the reference.
        ref_model: the reference, with its adapter if it has one; ``None`` for the model as it is when training starts (its base,
            under PEFT). With ``reference="precompute"`` it is let go once all rows have their log-probs.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Raises:
        TypeError, ValueError: an argument that cannot be used, by name.

    Source: Chen et al. 2024 (arXiv 2402.05369).

    Example::

        trainer = NCATrainer(model, NCAConfig("out", loss="nca"), load_groups("train.jsonl").rows, processing_class=tokenizer)
        trainer.train()
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike,
        args: NCAConfig,
        train_dataset: Rows | None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: nn.Module | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ):
        if not isinstance(args, NCAConfig):
            raise TypeError(f"args: got {type(args).__name__}, wanted an NCAConfig")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: got {args.n_gpu} GPUs for one process, which transformers would run as nn.DataParallel; wanted one: use "
                "accelerate launch, or CUDA_VISIBLE_DEVICES=0"
            )
        model = policy_of(model, peft_config, args.seed)
        warn_of_losses(model, args.learning_rate)
        if ref_model is not None:
            check_reference(ref_model, model)
        with args.main_process_first(desc="rows"):
            if train_dataset is not None:
                train_dataset = prepare_rows("train_dataset", train_dataset, processing_class, args)
            eval_dataset = _each("eval_dataset", eval_dataset, lambda *rows: prepare_rows(*rows, processing_class, args))
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0  # any id will do
        self._collator = GroupCollator(pad_token_id, "share_prompt" if args.share_prompt else "padded")
        super().__init__(
            model,
            args,
            MismatchedCollator(self._collator) if args.loss == "kto" else self._collator,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp: accelerate shards no model on {args.device.type}, it would run as DistributedDataParallel")
        # compute_loss divides by the prompts of the whole accumulated batch: without this, Trainer would divide once more.
        # (transformers >= 5.23 has loss_is_scaled_for_ga for that alone, which spares it a count of the labels.)
        self.model_accepts_loss_kwargs = True
        self.add_callback(PlotsCallback)
        self._train_metrics, self._eval_metrics = GroupMetrics(), GroupMetrics()
        # A compiled model would be cut in two where the clock is read; without logs its times would pile up.
        unread = args.torch_compile or args.logging_strategy == IntervalStrategy.NO
        self._clock = None if unread else LossClock(args.device)
        self._window_began: float | None = None
        self._eval_baseline: Tensor | None = None
        self._has_ref_model = ref_model is not None
        self._take_reference(ref_model)

    def _take_reference(self, ref_model: nn.Module | None) -> None:
        """The reference log-probs of all rows, or the model that gives them at every step; and whether the layout holds."""
        needed = any(unscored(rows) is not None for rows in self._datasets())
        if needed and ref_model is None and self.args.reference == "model" and not isinstance(self.model, PeftModel):
            ref_model = copy.deepcopy(self.model)
        self._ref_model = None if ref_model is None else self._placed(ref_model.requires_grad_(False))
        if needed or self.args.share_prompt:
            self._shard_policy()
        if self.args.share_prompt:
            for rows in self._datasets():
                longest = int(longest_sequences(rows).argmax())
                check_layout(self.model, [rows[longest]], self._collator)
        if needed:
            self._try_policy()
        self.train_dataset = _each("train_dataset", self.train_dataset, self._with_ref_logps)
        self.eval_dataset = _each("eval_dataset", self.eval_dataset, self._with_ref_logps)
        if self.args.reference == "precompute":
            self._ref_model = None

    def _try_policy(self) -> None:
        """Log-probs of the shortest row: a model that has none, or LoRA on its head, is refused before the pass over all rows."""
        rows = self._datasets()[0]
        with evaluating(self.model), self.accelerator.autocast():
            self._flat_logps(self.model, [rows[int(longest_sequences(rows).argmin())]])

    def _datasets(self) -> list[Dataset]:
        found: list[Dataset] = []
        for rows in (self.train_dataset, self.eval_dataset):
            _each("", rows, lambda _, rows: found.append(rows))
        return found

    def _placed(self, model: nn.Module) -> nn.Module:
        """On this rank's device, sharded where the run is."""
        if not self.is_fsdp_enabled:
            return model.to(self.args.device)
        # accelerate shards a model only with an optimizer of it; the run's own is made when training starts.
        model, _ = self.accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        return model

    def _shard_policy(self) -> None:
        """For a forward before training, in whose beginning Trainer would do it."""
        if self.is_fsdp_enabled and not isinstance(self.model, (FSDPModule, FullyShardedDataParallel)):
            self.model = self.model_wrapped = self._placed(self.model)

    def _with_ref_logps(self, name: str, rows: Dataset) -> Dataset:
        """The rows with the reference log-probs that they lack, if they are to be computed now."""
        args = self.args
        lacking = unscored(rows)
        if lacking is None:
            return rows
        reference = self._reference(name)
        if args.reference == "model":
            return rows
        base = reference is self.model
        key = cache_key(weights_digest(reference, base=base), lacking, args.mixed_precision)
        with as_reference(reference, base=base), self.accelerator.autocast():
            ref_logps = reference_logps(
                lacking,
                lambda rows: self._flat_logps(reference, rows),
                Path(args.reference_cache_dir) / f"{key}.safetensors",
                self.accelerator,
                batch_size=args.per_device_eval_batch_size,
                progress=not args.disable_tqdm,
            )
        return with_ref_logps(rows, ref_logps)

    def _reference(self, name: str) -> nn.Module:
        if self._ref_model is not None:
            return self._ref_model
        peft = isinstance(self.model, PeftModel)
        if self._has_ref_model or (self.state.global_step > 0 and not peft):
            gone = "ref_model is no longer kept" if self._has_ref_model else "the model is no longer the reference"
            raise ValueError(
                f"{name}: rows without ref_logps, and {gone}; wanted them at the start of NCATrainer, or with ref_logps, or "
                'reference="model"'
            )
        if peft:
            refuse_rewritten_base(self.model)
        return self.model

    def _flat_logps(self, model: nn.Module, rows: list[dict]) -> Tensor:
        batch = self._prepare_inputs(self._collator(rows))
        return self._logps(model, batch)[batch["mask"]]

    def _logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each response the sum over its tokens, [B, K]."""
        inputs = {"attention_mask": None, **model_inputs(model, batch)}
        token_logps = model_logps(model, **inputs, labels=batch["labels"], save_budget=self.args.save_budget)
        return group_logps(token_logps, batch)

    def _ref_logps(self, batch: Batch) -> Tensor:
        if "ref_logps" in batch:
            return batch["ref_logps"]
        reference = self._reference("ref_logps")
        with as_reference(reference, base=reference is self.model), self.accelerator.autocast():
            return self._logps(reference, batch)

    def _per_token(self, logps: Tensor, batch: Batch) -> Tensor:
        return logps / batch["lengths"].clamp(min=1) if self.args.average else logps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # FSDP2 leaves its outermost weights gathered after a forward, until a backward: the optimizer would take those, and not
        # the shards, for what it trains.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int]:
        """The micro-batches of a step, and the number of their prompts on all ranks, over which the loss is averaged."""
        if self._window_began is None:
            self._window_began = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = sum(self._without_repeats(batches))
        if self.accelerator.num_processes > 1:
            prompts = self.accelerator.reduce(torch.tensor(prompts, device=device))
        if self.args.loss == "kto":
            baseline = self._kto_baseline(batches)
            for batch in batches:
                batch["baseline"] = baseline
        return batches, prompts

    def _without_repeats(self, batches: list[Batch]) -> list[int]:
        """The number of prompts of each batch, those masked that only fill up the last one.

        accelerate gives every rank a full batch, at the end of the data with prompts from its beginning.
        """
        prompts = [len(batch["mask"]) for batch in batches]
        ranks, data = self.accelerator.num_processes, self.accelerator.gradient_state
        filled_up = self.accelerator.even_batches and not self.args.dataloader_drop_last
        if batches and ranks > 1 and filled_up and data.end_of_dataloader:
            # accelerate's own `remainder` is not set in the rest of an epoch that a resumed run goes on with.
            last = len(data.active_dataloader.dataset) % (ranks * prompts[-1]) or ranks * prompts[-1]
            prompts[-1] = min(max(last - self.accelerator.process_index * prompts[-1], 0), prompts[-1])
            batches[-1]["mask"][prompts[-1] :] = False
        return prompts

    def _each_once(self, dataloader: DataLoader) -> Iterator[Batch]:
        for batch in dataloader:
            self._without_repeats([batch])
            yield batch

    def _kto_baseline(self, batches: Iterable[Batch]) -> Tensor:
        """The policy's mean log-ratio on mismatched pairs, of all batches on all ranks: those of a step, or of an evaluation."""
        sums = torch.zeros(2, device=self.args.device)
        for batch in map(self._prepare_inputs, batches):
            pairs = batch["mismatched"]
            with evaluating(self.model), self.accelerator.autocast():
                log_ratios = self._logps(self.model, pairs) - self._ref_logps(pairs)
            there = batch["mask"].any(1)
            sums += torch.stack([(self._per_token(log_ratios, pairs)[:, 0] * there).sum(), there.sum()])
        total, count = self.accelerator.reduce(sums)
        return total / count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the mean over ``num_items_in_batch`` prompts (of this batch, if not given).

        Times the number of ranks, since gradients are averaged over them. ``return_outputs`` adds the implicit ``rewards``.
        """
        with self._clock.from_head(model) if self._clock and model.training else nullcontext():
            loss, rewards = self._group_loss(model, inputs)
        if num_items_in_batch is None:
            loss = loss / len(inputs["mask"])
        else:
            loss = loss * (self.accelerator.num_processes / num_items_in_batch)
        if self._clock and loss.requires_grad:
            self._clock.watch(loss)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _group_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the losses of the batch's prompts, and the rewards."""
        args, mask, scores = self.args, batch["mask"], batch["scores"]
        if args.loss == "kto" and "baseline" not in batch:
            batch["baseline"] = self._kto_baseline([batch])
        ref_logps = self._per_token(self._ref_logps(batch), batch)
        logps = self._per_token(self._logps(model, batch), batch)
        loss, rewards = group_loss(
            args.loss,
            logps,
            ref_logps,
            scores,
            beta=args.beta,
            alpha=args.alpha,
            mask=mask,
            pairs=args.pairs,
            lengths=None if args.average else batch["lengths"],
            baseline=batch.get("baseline"),
            reduction="sum",
        )
        metrics = self._train_metrics if model.training else self._eval_metrics
        tokens = (batch["branches"] >= 0 if "branches" in batch else batch["attention_mask"]).sum()
        metrics.update(loss.detach(), rewards, logps, ref_logps, scores, mask, tokens)
        return loss, rewards

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Adds to the metrics, the loss among them: Trainer's own mean of batches would weigh prompts by their batch."""
        inputs = self._prepare_inputs(inputs)
        self._without_repeats([inputs])
        if self._eval_baseline is not None:
            inputs["baseline"] = self._eval_baseline
        with torch.no_grad():
            self._group_loss(model, inputs)
        return None, None, None

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in transformers; ``eval_dataset`` may be rows in any form that ``NCATrainer`` takes."""
        named = isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict) and eval_dataset in self.eval_dataset
        if not (eval_dataset is None or isinstance(eval_dataset, dict) or named):
            eval_dataset = self._prepared("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Rows, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The metrics of :meth:`evaluate` alone: no ``predictions``."""
        return super().predict(self._prepared("test_dataset", test_dataset), ignore_keys, metric_key_prefix)

    def _prepared(self, name: str, rows: Rows) -> Dataset:
        with self.args.main_process_first(desc="rows"):
            rows = prepare_rows(name, rows, self.processing_class, self.args.row_options())
        return self._with_ref_logps(name, rows)

    def evaluation_loop(
        self, dataloader: DataLoader, *args: object, metric_key_prefix: str = "eval", **kwargs: object
    ) -> EvalLoopOutput:
        began = time.perf_counter()
        self._eval_metrics = GroupMetrics()
        self._shard_policy()
        if self.args.loss == "kto":
            self._eval_baseline = self._kto_baseline(self._each_once(dataloader))
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._eval_baseline = None
        means = self._eval_metrics.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items() if name != "tokens"})
        if self._window_began is not None:
            self._window_began += time.perf_counter() - began
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window_began is not None:  # of training steps
            seconds = time.perf_counter() - self._window_began
            self._window_began = None
            means = self._train_metrics.read(self.accelerator)
            logs["tokens_per_second"] = means.pop("tokens") / seconds
            if self._clock:
                logs["loss_time_share"] = self._clock.seconds() / seconds
            logs.update({name: value for name, value in means.items() if name != "loss"})
        super().log(logs, start_time)


def _each(name: str, rows: Rows | dict[str, Rows] | None, function: Callable[[str, Rows], Rows]) -> Rows | dict[str, Rows] | None:
    """The function of the rows and their name, or of each of the data sets of a mapping."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {key: function(f"{name}[{key!r}]", value) for key, value in rows.items()}
    return function(name, rows)
