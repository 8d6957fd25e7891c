"""K-way alignment as a transformers ``Trainer``: the loss of each prompt's K responses, without materialising logits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, PredictionOutput, TrainOutput

from ... import group_loss
from ..data.collator import Batch, GroupCollator, group_logps
from ..data.mismatched import MismatchedCollator
from ..data.rows import Rows, longest_sequences, map_datasets, missing_ref_logps, prepare_rows, shared_lengths
from ..data.shared_prompt import check_layout, model_inputs
from ..models.evaluating import evaluating
from ..models.heads import model_logps, model_token_stats
from ..reference.frozen import reshard
from ..reference.placement import checkpointed_once, place_for_deepspeed, to_device, to_device_or_shard, zero3_for_forward
from ..reference.policy_reference import PolicyReference, ReferenceOptions
from .batches import ChangedBatches, each_prompt_once, with_baseline
from .by_length import LengthSampler
from .clock import LossClock
from .config import NCAConfig
from .kto_baseline import KTOBaseline
from .loss_guard import LossGuard
from .metrics import GroupMetrics, TokenSums
from .plots import PlotsCallback
from .policy import check_reference, policy_of, vocabulary_of, warn_of_losses
from .resumable import ResumableTrainer
from .run_modes import keep_4bit_gradients, refuse_split_sequences, refuse_tensor_parallel
from .run_record import run_fingerprint, run_settings
from .samples import samples_callback


class NCATrainer(ResumableTrainer):
    r"""Aligns a causal LM with scored responses, by any loss of :func:`nca_kernels.group_loss`.

    :func:`~nca_kernels.integrations.model_logps` computes the log-probs of policy and reference without materialising logits.
    The loss of a step is the mean over all prompts of its accumulated batch on all ranks. Each prompt counts once, whatever the
    number of its responses and the size of the last batch. A log holds the metrics of
    :class:`~nca_kernels.integrations.training.metrics.GroupMetrics`, ``tokens_per_second`` (without padding and without the time
    of evaluations) and ``loss_time_share``, the share of the time that the head and the loss take
    (:class:`~nca_kernels.integrations.training.clock.LossClock`). After training, ``<output_dir>/plots`` has their curves.

    Args:
        model: a transformers causal LM, with or without PEFT, or a name or folder that ``from_pretrained`` takes. A model that is
            loaded by its name is in float32, because steps of 5e-6 are lost in bfloat16 weights; with ``peft_config`` it keeps the
            dtype in which it was saved. A model object keeps its dtype; training bfloat16 weights gives a warning.
        args: see :class:`~nca_kernels.integrations.training.config.NCAConfig`.
        train_dataset: rows with a prompt, K responses and their scores, in any layout of ``load_groups``, or tokenized rows as
            ``tokenize_groups`` returns them. A column ``ref_logps`` of tokenized rows (summed over tokens) is used as it is.
        eval_dataset: the same, or a mapping from names to such data sets.
        processing_class: the tokenizer, for rows that are not tokenized; it is saved with the model.
        peft_config: adds an adapter to the model and trains it; the base is the reference.
        ref_model: the reference model, with its adapter if it has one; ``None`` for the model at the start of training (for a new
            adapter, its base). With ``reference="precompute"`` it is released once all rows have their log-probs.
        callbacks, optimizers: as in ``transformers.Trainer``.

    To compute log-probs in another way, override :meth:`compute_logps`: policy, reference and KTO's baseline all use it.
    ``token_metrics`` is then refused, because these metrics come from the forward that computes the policy's log-probs.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.

    Source: Chen et al. 2024 (arXiv 2402.05369).

    Example::

        trainer = NCATrainer(model, NCAConfig("out", loss="nca"), load_groups("train.jsonl").rows, processing_class=tokenizer)
        trainer.train()
    """

    processing_class: PreTrainedTokenizerBase | None

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
        refuse_split_sequences(args)
        if args.token_metrics and type(self).compute_logps is not NCATrainer.compute_logps:
            raise ValueError(f"token_metrics: got True, wanted False: {type(self).__name__} computes log-probs in its own way")
        model = policy_of(model, peft_config, args.seed, args.model_init_kwargs)
        warn_of_losses(model, args.learning_rate)
        refuse_tensor_parallel("model", model)
        keep_4bit_gradients(model)
        if ref_model is not None:
            check_reference(ref_model, model)
            refuse_tensor_parallel("ref_model", ref_model)
        vocabulary = vocabulary_of(model)
        with args.main_process_first(desc="rows"):
            if train_dataset is not None:
                train_dataset = prepare_rows("train_dataset", train_dataset, processing_class, args.row_options(), vocabulary)
            eval_dataset = map_datasets(
                "eval_dataset",
                eval_dataset,
                lambda name, rows: prepare_rows(name, rows, processing_class, args.row_options(), vocabulary, training=False),
            )
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0  # any id will do
        self._collator = GroupCollator(pad_token_id, "share_prompt" if args.share_prompt else "padded")
        collator = MismatchedCollator(self._collator) if args.loss == "kto" else self._collator
        super().__init__(
            model,
            args,
            collator,  # type: ignore[arg-type]  # transformers annotates dict, and to mypy a TypedDict is not one
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,  # type: ignore[arg-type]  # transformers takes any scheduler but annotates LambdaLR
        )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp: accelerate shards no model on {args.device.type}, it would run as DistributedDataParallel")
        # compute_loss divides by the prompts of the whole accumulated batch: without this, Trainer would divide once more.
        # (transformers >= 5.23 has loss_is_scaled_for_ga for this purpose, which also avoids counting the labels.)
        self.model_accepts_loss_kwargs = True
        self.add_callback(PlotsCallback)
        if args.sample_prompts:
            self.add_callback(samples_callback(args, self.eval_dataset, processing_class))
        self._train_metrics, self._eval_metrics = GroupMetrics(), GroupMetrics()
        # Reading the clock breaks the graph of a compiled model; without logs the recorded times would accumulate.
        unread = args.torch_compile or args.logging_strategy == IntervalStrategy.NO
        self._clock = None if unread else LossClock(args.device)
        self._window_began: float | None = None
        self.fingerprint = run_fingerprint(args, self.model, self.train_dataset, ref_model)
        self.run_settings = run_settings(args, {})
        self.loss_guard = LossGuard(self.accelerator)
        self._kto_baseline = KTOBaseline(self._log_ratios, self.accelerator)
        self._reference = PolicyReference(
            ref_model,
            self.model,
            self.compute_logps,
            lambda rows: self._on_device(self._collator(rows)),
            self.accelerator,
            ReferenceOptions(**{name: getattr(args, name) for name in ReferenceOptions._fields}),
        )
        self._setup_reference()

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        to_device(model, device)

    def _on_device(self, batch: Mapping[str, Any]) -> Batch:
        """Move a batch of the collator to this rank's device."""
        return cast(Batch, self._prepare_inputs({**batch}))

    def _setup_reference(self) -> None:
        """Add reference log-probs to all rows, or keep the model that computes them. First check that the model can run."""
        missing = any(missing_ref_logps(rows) is not None for rows in self._datasets())
        if missing:
            self._reference.keep_copy(self.model)
        if missing or self.args.share_prompt:
            self._place_policy()
            with zero3_for_forward(self.model, self.accelerator):
                self._run_before_training(missing)
        self._reference.release()

    def _run_before_training(self, missing: bool) -> None:
        if self.args.share_prompt:
            for rows in self._datasets():
                longest = int(longest_sequences(rows).argmax())
                check_layout(self.model, [rows[longest]], self._collator)
        if missing:
            self._try_policy()
        self.train_dataset = map_datasets("train_dataset", self.train_dataset, self._rows_with_ref_logps)
        self.eval_dataset = map_datasets("eval_dataset", self.eval_dataset, self._rows_with_ref_logps)

    def _try_policy(self) -> None:
        """Compute the log-probs of the shortest row, so that an unusable head (LoRA on it, say) fails before the long pass."""
        rows = self._datasets()[0]
        with evaluating(self.model), self.accelerator.autocast():
            self._reference.flat_logps(self.model, [rows[int(longest_sequences(rows).argmin())]])

    def _datasets(self) -> list[Dataset]:
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [rows for rows in (self.train_dataset, *evaluated) if rows is not None]

    def _place_policy(self) -> None:
        """Place the policy for a forward before training. Trainer itself does so only when training starts."""
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped = to_device_or_shard(self.model, self.accelerator)
        elif self.is_deepspeed_enabled and self.deepspeed is None:
            place_for_deepspeed(self.model, self.accelerator)

    def _rows_with_ref_logps(self, name: str, rows: Dataset) -> Dataset:
        return self._reference.rows_with_ref_logps(name, rows, self.model, trained=self.state.global_step > 0)

    def compute_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-prob of each response, in nats, summed over its tokens: ``[B, K]`` float32, 0 where ``mask`` is not set.

        Override this method to change how the log-probs of policy, reference and KTO's baseline are computed.

        Args:
            model: the policy or its reference, in any wrapper (DDP, FSDP, PEFT); gradients flow to its trainable weights.
            batch: a batch of the collator, on the model's device. Only its tokens and ``mask`` are used.
        """
        return group_logps(model_logps(model, **self._head_inputs(model, batch)), batch)

    def _policy_logps(self, model: nn.Module, batch: Batch) -> tuple[Tensor, TokenSums | None]:
        """The log-probs of :meth:`compute_logps` and, with ``token_metrics``, the token sums of the same forward."""
        if not self.args.token_metrics:
            return self.compute_logps(model, batch), None
        stats = model_token_stats(model, **self._head_inputs(model, batch))
        entropy, top1 = (group_logps(values.float(), batch) for values in (stats.entropy, stats.top1))
        return group_logps(stats.logps, batch), TokenSums(batch["lengths"], entropy, top1)

    def _head_inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        return {"attention_mask": None, **model_inputs(model, batch), "labels": batch["labels"], **self.args.head_options()}

    def _ref_logps(self, batch: Batch) -> Tensor:
        return self._reference.batch_logps(batch, self.model, trained=self.state.global_step > 0)

    def _per_token(self, logps: Tensor, batch: Batch) -> Tensor:
        return logps / batch["lengths"].clamp(min=1) if self.args.average else logps

    def _log_ratios(self, batch: Batch) -> Tensor:
        """``logps - ref_logps`` of a batch on any device, without gradients."""
        batch = self._on_device(batch)
        with evaluating(self.model), self.accelerator.autocast():
            return self._per_token(self.compute_logps(self.model, batch) - self._ref_logps(batch), batch)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        with checkpointed_once(self.model, self.accelerator):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if rows is None or self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return self._length_sampler(rows, self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._length_sampler(eval_dataset, self.args.eval_batch_size)  # transformers' own needs a column input_ids

    def _length_sampler(self, rows: Dataset, batch_size: int) -> LengthSampler:
        lengths = shared_lengths(rows) if self.args.share_prompt else longest_sequences(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(lengths.tolist(), batch_size * self.args.world_size, seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        # After a forward, FSDP2 leaves its outermost weights gathered until the backward. The optimizer would take those as its
        # parameters, instead of the shards.
        reshard(self.model)
        return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int]:
        """The micro-batches of a step and the number of their prompts on all ranks, by which the loss is divided."""
        if self._window_began is None:
            self._window_began = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, counts = self._each_prompt_once(batches)
        prompts = sum(counts)
        if self.accelerator.num_processes > 1:
            prompts = self.accelerator.reduce(torch.tensor(prompts, device=device))
        if self.args.loss == "kto":
            baseline = self._kto_baseline(batches)
            batches = [with_baseline(batch, baseline) for batch in batches]
        return batches, prompts

    def _each_prompt_once(self, batches: list[Batch]) -> tuple[list[Batch], list[int]]:
        return each_prompt_once(batches, self.accelerator, self.args.dataloader_drop_last)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The batch's part of the mean over ``num_items_in_batch`` prompts (over this batch if that is None).

        It is multiplied by the world size, because gradients are averaged over ranks. With ``return_outputs`` the result is a pair
        of the loss and a dict with the implicit ``rewards``.
        """
        with self._clock.from_head(model) if self._clock and model.training else nullcontext():
            loss, rewards = self._group_loss(model, cast(Batch, inputs))
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
        baseline = batch.get("baseline")
        if args.loss == "kto" and baseline is None:
            baseline = self._kto_baseline([batch])
        ref_logps = self._per_token(self._ref_logps(batch), batch)
        logps, token_sums = self._policy_logps(model, batch)
        logps = self._per_token(logps, batch)
        lengths = torch.ones_like(batch["lengths"]) if args.average else batch["lengths"]  # averages are per token already
        options = args.loss_options(lengths=lengths, baseline=baseline, desirable=batch.get("desirable"))
        loss, rewards = group_loss(args.loss, logps, ref_logps, scores, mask=mask, reduction="sum", **options)
        metrics = self._train_metrics if model.training else self._eval_metrics
        tokens = (batch["branches"] >= 0 if "branches" in batch else batch["attention_mask"]).sum()
        metrics.update(loss.detach(), rewards, logps, ref_logps, scores, mask, tokens, token_sums)
        return loss, rewards

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Add the batch to the metrics, also its loss: Trainer's own mean over batches would weight prompts by batch size."""
        with torch.no_grad():
            self._group_loss(model, self._on_device(inputs))
        return None, None, None

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in transformers; ``eval_dataset`` may have any form that ``NCATrainer`` takes."""
        named = isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict) and eval_dataset in self.eval_dataset
        if not (eval_dataset is None or isinstance(eval_dataset, dict) or named):
            eval_dataset = self._prepared("eval_dataset", eval_dataset)
        return super().evaluate(
            eval_dataset,  # type: ignore[arg-type]  # it takes a name, too, and passes each value of a mapping to this method
            ignore_keys,
            metric_key_prefix,
        )

    def predict(
        self, test_dataset: Rows, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return only the metrics of :meth:`evaluate`, without ``predictions``."""
        return super().predict(self._prepared("test_dataset", test_dataset), ignore_keys, metric_key_prefix)

    def _prepared(self, name: str, rows: Rows) -> Dataset:
        with self.args.main_process_first(desc="rows"):
            options, vocabulary = self.args.row_options(), vocabulary_of(self.model)
            rows = prepare_rows(name, rows, self.processing_class, options, vocabulary, training=False)
        return self._rows_with_ref_logps(name, rows)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        began = time.perf_counter()
        self._eval_metrics = GroupMetrics()
        self._place_policy()
        batches = ChangedBatches(dataloader, lambda batch: self._each_prompt_once([batch])[0][0])
        if self.args.loss == "kto":
            batches = ChangedBatches(batches, partial(with_baseline, baseline=self._kto_baseline(batches)))
        output = super().evaluation_loop(
            batches,  # type: ignore[arg-type]  # it uses only the parts of a DataLoader that this class has
            description,
            prediction_loss_only,
            ignore_keys,
            metric_key_prefix,
        )
        means = self._eval_metrics.read(self.accelerator)
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items() if name != "tokens"}
        if self._window_began is not None:
            self._window_began += time.perf_counter() - began
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window_began is not None:  # a log of training steps
            seconds = time.perf_counter() - self._window_began
            self._window_began = None
            means = self._train_metrics.read(self.accelerator)
            logs["tokens_per_second"] = means.pop("tokens") / seconds
            if self._clock:
                logs["loss_time_share"] = self._clock.seconds() / seconds
            logs.update({name: value for name, value in means.items() if name != "loss"})
            self._refuse_bad_losses(self.args.max_bad_losses)
        super().log(logs, start_time)
