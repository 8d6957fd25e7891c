"""``nca-kernels train``: a run from its configuration to a saved model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PrinterCallback, ProgressCallback, set_seed

from ...dispatch import resolve
from ...loss_table import LOSSES
from ..data.load import Groups, load_groups
from ..data.rows import response_counts, tokenized
from ..models.heads import causal_lm
from ..models.pretrained import load_tokenizer
from ..training.card import Training, write_card
from ..training.config import NCAConfig
from ..training.console import ConsoleCallback
from ..training.policy import policy_of
from ..training.run_record import run_settings
from ..training.trainer import NCATrainer
from .run_config import Run


def prepare(run: Run) -> NCATrainer:
    r"""Print what will run, and return the trainer of the run.

    Preference data (``chosen`` and ``rejected``) says which response is better but not by how much, so ``alpha`` is 0 for it unless
    the run sets it. A model without an adapter is loaded in float32 unless ``model_init_kwargs`` says otherwise, because bfloat16
    weights round small updates away; ``bf16: true`` then computes in bfloat16.

    Raises:
        ValueError, OSError: the data cannot be used (the message names file, row and column); the model or the tokenizer does not
            load or does not suit the data.
    """
    sources, config, given, command = run
    say = _speaker(config)
    set_seed(config.seed)
    with config.main_process_first(desc="data"):
        train = load_data(sources.data, sources.split, run)
        heldout = None if sources.eval_data is None else load_data(sources.eval_data, sources.eval_split, run)
    if train.preference and "alpha" not in given:
        config.alpha = 0.0
    tokenizer = load_tokenizer(sources.tokenizer or sources.model)
    peft_config = _lora(sources.lora)
    model = policy_of(sources.model, peft_config, config.seed, config.model_init_kwargs)
    total = sum(map(_size, model.parameters()))
    dtype = causal_lm(model).dtype
    say(f"model    {sources.model}: {total / 1e6:,.2f} M parameters, {dtype}")
    say(f"data     {sources.data}: {describe_groups(train)}")
    say(f"layout   {train.layout}")
    if heldout is not None:
        say(f"eval     {sources.eval_data}: {describe_groups(heldout)}")
    say(f"loss     {describe_loss(config, train.preference)}")
    say(f"batch    {_batch(config)}")
    say(f"kernels  {_kernels(config, dtype)}")
    with config.main_process_first(desc="tokens"):
        rows = tokenized(train, tokenizer, config.row_options())
        heldout_rows = None if heldout is None else tokenized(heldout, tokenizer, config.row_options())
    trainer = NCATrainer(model, config, rows, heldout_rows, processing_class=tokenizer)
    trainer.run_settings = run_settings(config, vars(sources), command)
    _watch(trainer)
    trained = sum(_size(p) for p in trainer.model.parameters() if p.requires_grad)
    say(f"trained  {trained / 1e6:,.2f} M parameters{'' if sources.lora is None else f', LoRA {sources.lora}'}")
    return trainer


def load_data(source: str, split: str, run: Run) -> Groups:
    """Load the rows of a file, folder or hub name with the settings of the run."""
    sources, config = run.sources, run.config
    return load_groups(
        source, split=split, config_name=sources.config_name, columns=sources.columns, skip_bad_rows=config.skip_bad_rows
    )


def _watch(trainer: NCATrainer) -> None:
    """Replace transformers' output, which prints every metric under its raw name, by one line per log."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleCallback)


def train(trainer: NCATrainer, run: Run) -> None:
    """Train, evaluate if there is an evaluation set, and save the model, its card and the metrics.

    ``train_results.json`` also holds the metrics of the last log, each as ``train_last_...``.
    """
    config = trainer.args
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    last = next((log for log in reversed(trainer.state.log_history) if "loss" in log), {})
    last = {f"train_last_{name}": value for name, value in last.items() if name not in ("epoch", "step")}
    trainer.save_metrics("train", {**result.metrics, **last})
    if trainer.eval_dataset is not None:
        metrics = _evaluated(trainer)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        write_card(Path(config.output_dir), _training(trainer, run), adapter=isinstance(trainer.model, PeftModel))
    _speaker(config)(f"saved    {config.output_dir}")


def _training(trainer: NCATrainer, run: Run) -> Training:
    """The facts of the run that its model card reports."""
    sources, config = run.sources, run.config
    data = {"training data": f"{sources.data}: {_counted(trainer.train_dataset)}"}
    if sources.eval_data is not None:
        data["evaluation data"] = sources.eval_data
    settings: dict[str, Any] = {"loss": config.loss, **config.loss_options(), "learning rate": config.learning_rate}
    settings["steps"] = trainer.state.global_step
    if sources.lora is not None:
        settings["LoRA"] = sources.lora
    metrics: dict[str, float] = {}
    for log in trainer.state.log_history:
        metrics.update(log)
    return Training(sources.model, data, settings, run.command, metrics)


def _counted(rows: Dataset) -> str:
    counts = response_counts(rows)
    return f"{len(counts)} prompts, {sum(counts)} responses, {_range(counts)}"


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"K = {low}" if low == high else f"K = {low} to {high}"


def _evaluated(trainer: NCATrainer) -> dict[str, float]:
    """The metrics of an evaluation after the last step. It is not repeated if ``eval_strategy`` has already run it."""
    names = [f"eval_{name}_" for name in trainer.eval_dataset] if isinstance(trainer.eval_dataset, dict) else ["eval_"]
    metrics: dict[str, float] = {}
    if not trainer.args.load_best_model_at_end:  # with it, the model is not that of the last step
        for log in trainer.state.log_history:
            if log.get("step") == trainer.state.global_step:
                metrics.update({name: value for name, value in log.items() if name.startswith("eval_") or name == "epoch"})
    return metrics if all(f"{name}loss" in metrics for name in names) else trainer.evaluate()


def _speaker(config: NCAConfig) -> Callable[[str], None]:
    """``print`` on the first process only. On the others it also turns off progress bars and warnings, which would be repeated."""
    if config.process_index == 0:
        return print
    datasets.disable_progress_bars()
    logging.getLogger("nca_kernels").setLevel(logging.ERROR)
    return lambda line: None


def _size(parameter: torch.nn.Parameter) -> int:
    """The elements of the whole parameter: ZeRO-3 leaves 0 elements in a sharded tensor, and 4-bit weights are packed."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return packed.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def _lora(keywords: dict[str, Any] | None) -> PeftConfig | None:
    if keywords is None:
        return None
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", **keywords})


def describe_groups(groups: Groups) -> str:
    """A line with the number of prompts and responses, K, and what was left out."""
    counts = [len(scores) for scores in groups.rows["scores"]]
    skipped = f"; {len(groups.skipped)} bad rows skipped" if groups.skipped else ""
    if groups.dropped:
        skipped += f"; {sum(map(len, groups.dropped.values()))} bad responses left out"
    return f"{len(counts)} prompts, {sum(counts)} responses, {_range(counts)}{skipped}"


def describe_loss(config: NCAConfig, preference: bool) -> str:
    """A line with the loss and its parameters."""
    about = f"{config.loss}, beta {config.beta:g}"
    if "alpha" in LOSSES[config.loss].takes:
        about += f", alpha {config.alpha:g}" + (" (chosen and rejected: a preference)" if preference else "")
    if config.num_responses is not None:
        about += f", at most {config.num_responses} responses of a prompt"
    return about


def _batch(config: NCAConfig) -> str:
    device, accumulated, processes = (
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.world_size,
    )
    return (
        f"{device * accumulated * processes} prompts a step: {device} at a time, accumulation {accumulated}, processes {processes}"
    )


def _kernels(config: NCAConfig, dtype: torch.dtype) -> str:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, dtype)
    linear = resolve("linear_token_logps", None, config.device, dtype)
    group = resolve("group_loss", None, config.device, torch.float32)
    return f"linear_token_logps {linear}, group_loss {group}, on {config.device} (nca-kernels doctor says why)"
