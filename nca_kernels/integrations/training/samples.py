"""Samples responses to held-out prompts during training, which show as text what the metrics report as numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.evaluating import evaluating
from ..models.heads import causal_lm
from ..models.sampling import Sampling, end_tokens, sample_responses
from .config import NCAConfig

SAMPLES = "samples.jsonl"
_TOKENS = 128


def samples_callback(
    args: NCAConfig, rows: Dataset | dict[str, Dataset] | None, tokenizer: PreTrainedTokenizerBase | None
) -> SamplesCallback:
    """The sampling callback of a run. With several evaluation sets it samples from the first.

    Raises:
        ValueError: there are no held-out prompts, no tokenizer, or the model is sharded.
    """
    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    if rows is None:
        raise ValueError(f"sample_prompts: got {args.sample_prompts} without evaluation data, wanted an eval_dataset (eval_data)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"sample_prompts: got {args.sample_prompts} without a tokenizer, wanted one as processing_class")
    if args.fsdp or args.deepspeed:
        raise ValueError("sample_prompts: got it with a sharded model (fsdp or deepspeed), which one process cannot sample from")
    return SamplesCallback(rows, args.sample_prompts, tokenizer)


class SamplesCallback(TrainerCallback):
    """Samples a response to each of a few held-out prompts at every evaluation and appends them to ``<output_dir>/samples.jsonl``.

    The random numbers are the same at every step, so that only the model changes. The first response is printed.

    Args:
        rows: tokenized rows with ``prompt_ids``; the first ``count`` are sampled.
    """

    def __init__(self, rows: Dataset, count: int, tokenizer: PreTrainedTokenizerBase):
        self._prompts = [list(ids) for ids in rows.select(range(min(count, len(rows))))["prompt_ids"]]
        self._tokenizer = tokenizer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        model = kwargs["model"]
        ends = end_tokens(causal_lm(model), self._tokenizer)
        keys = [(row, 0) for row in range(len(self._prompts))]
        with evaluating(model):
            responses = sample_responses(model, self._tokenizer, self._prompts, keys, Sampling(max_new_tokens=_TOKENS), ends)
        with (Path(str(args.output_dir)) / SAMPLES).open("a", encoding="utf-8") as file:
            for ids, response in zip(self._prompts, responses, strict=True):
                line = {"step": state.global_step, "prompt": self._tokenizer.decode(ids), **response._asdict()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"sample {state.global_step}/{state.max_steps}  {responses[0].text!r}", flush=True)
