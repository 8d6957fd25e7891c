"""The output of a run while it trains: one readable line per log, and a file with all metrics as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG = "log.jsonl"

# Each label of the line, the metric that it shows, and the format.
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "rewards/accuracy", "{:.1%}"),
    ("margin", "rewards/margin", "{:.3f}"),
    ("kl", "kl", "{:.3f}"),
    ("lr", "learning_rate", "{:.2g}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


class ConsoleCallback(TrainerCallback):
    """Prints a line for each log and appends the log, with its step, to ``<output_dir>/log.jsonl``.

    It replaces the callbacks of transformers, which print every metric under its raw name.
    """

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = time.monotonic(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        logs: Mapping[str, Any] = kwargs["logs"]
        with (Path(str(args.output_dir)) / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        line = log_line(logs, state.global_step, state.max_steps, self._seconds_left(state))
        if line:
            print(line, flush=True)

    def _seconds_left(self, state: TrainerState) -> float | None:
        if self._began is None or state.global_step <= self._began[1]:
            return None
        began, first = self._began
        return (time.monotonic() - began) / (state.global_step - first) * (state.max_steps - state.global_step)


def log_line(logs: Mapping[str, Any], step: int, steps: int, seconds_left: float | None) -> str:
    """The line for a log of training or evaluation; empty for the summary at the end of a run."""
    evaluated = any(name.startswith("eval_") for name in logs)
    if not evaluated and "loss" not in logs:
        return ""
    words = [f"{'eval' if evaluated else 'step'} {step}/{steps}"]
    for word, metric, form in _SHOWN:
        for name in (name for name in logs if _is(name, metric, evaluated)):
            of = name.removeprefix("eval_").removesuffix(metric).strip("_/")
            words.append(f"{of + ' ' if of else ''}{word} {form.format(logs[name])}")
    if seconds_left is not None and not evaluated:
        words.append(f"left {_duration(seconds_left)}")
    return "  ".join(words)


def _is(name: str, metric: str, evaluated: bool) -> bool:
    """Whether ``name`` in a log is this metric. With several evaluation sets, the set's name precedes that of the metric."""
    if not evaluated:
        return name == metric
    return name == f"eval_{metric}" or (name.startswith("eval_") and name.endswith(f"_{metric}"))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
