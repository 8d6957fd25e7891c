"""Draws the curves of a run, one figure for each metric, into the folder ``plots`` of its output directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Points = list[tuple[int, float]]

# Numbers in the log that are not metrics of the model: times, counters, and the summary at the end of a run.
_NO_METRIC = (
    "step",
    "epoch",
    "total_flos",
    "num_input_tokens_seen",
    "model_preparation_time",
    "train_loss",
    "runtime",
    "train_runtime",
)
_RATES = ("_runtime", "_per_second", "_jit_compilation_time", "_preparation_time")
_RANK = "rewards/rank_"


class PlotsCallback(TrainerCallback):
    """Draws ``<output_dir>/plots`` when training ends."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(str(args.output_dir)) / "plots")


def draw_curves(log_history: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw a PNG for each metric that was logged at two steps or more, and return the files.

    Training and evaluation share a figure, where evaluation is dashed. The rewards of all ranks of a score share one too, and each
    rank has its own colour.

    Args:
        log_history: that of the trainer's state: for each log its metrics and its ``step``.
        folder: created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for metric, curves in _figures(log_history).items():
        figure = _figure(metric, curves)
        files.append(folder / f"{metric.replace('/', '_')}.png")
        figure.savefig(files[-1], dpi=120)
    return files


def _figures(log_history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """The curves of each figure, by the name that each metric has in the log."""
    figures: dict[str, dict[str, Points]] = {}
    for log in log_history:
        for name, value in log.items():
            metric = name.removeprefix("eval_")
            if metric in _NO_METRIC or name.endswith(_RATES) and metric != "tokens_per_second":
                continue
            if isinstance(value, (int, float)):
                figure = "rewards/rank" if metric.startswith(_RANK) else metric
                figures.setdefault(figure, {}).setdefault(name, []).append((log["step"], value))
    drawn = {metric: {name: points for name, points in curves.items() if len(points) > 1} for metric, curves in figures.items()}
    return {metric: curves for metric, curves in drawn.items() if curves}


def _figure(metric: str, curves: dict[str, Points]) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = sorted(dict.fromkeys(name.removeprefix("eval_") for name in curves), key=_by_rank)
    # Ranks are ordered, so their colours come from an ordered colour map, one for each rank.
    colors = [colormaps["viridis"](i / max(len(names) - 1, 1) * 0.9) for i in range(len(names))]
    for name, points in sorted(curves.items(), key=lambda item: _by_rank(item[0].removeprefix("eval_"))):
        evaluated = name.startswith("eval_")
        color = colors[names.index(name.removeprefix("eval_"))]
        axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.5, linestyle="--" if evaluated else "-")
    axes.set_title(metric, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _by_rank(name: str) -> tuple[str, int]:
    """A sort key that puts ``rewards/rank_10`` after ``rewards/rank_9``."""
    number = name.removeprefix(_RANK)
    return (_RANK, int(number)) if number != name and number.isdigit() else (name, 0)
