"""The curves of a run, one figure for each metric, in a folder ``plots`` beside its checkpoints."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PlotsCallback(TrainerCallback):
    """Draws ``<output_dir>/plots`` when training ends."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir) / "plots")


def draw_curves(log_history: list[dict], folder: Path) -> None:
    """A PNG for each metric logged at two steps or more; training and evaluation together, rewards of all ranks together.

    Args:
        log_history: of the trainer's state: a mapping of metrics, with its ``step``, for each log.
        folder: made if it is not there.
    """
    figures: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for log in log_history:
        for name, value in log.items():
            metric = name.removeprefix("eval_")
            if name != "step" and isinstance(value, (int, float)):
                figure = "rewards/rank" if metric.startswith("rewards/rank_") else metric
                figures.setdefault(figure, {}).setdefault(name, []).append((log["step"], value))
    folder.mkdir(parents=True, exist_ok=True)
    for metric, curves in figures.items():
        curves = {name: points for name, points in curves.items() if len(points) > 1}
        if curves:
            _draw(metric, curves, folder / f"{metric.replace('/', '_')}.png")


def _draw(metric: str, curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.5, linestyle="--" if name.startswith("eval_") else "-")
    axes.set_title(metric, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
