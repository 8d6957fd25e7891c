"""Figures: log-probs of chosen and rejected responses during training, and results with a point for each seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# From the palette of Okabe and Ito, which is distinguishable with any colour vision.
COLORS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


def draw_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the paper's Figure 2. ``curves`` holds ``steps``, ``chosen`` and ``rejected`` of every seed of each method.

    A line is the mean over the seeds, and the band reaches from the lowest to the highest seed. Each curve is shifted to start at
    the mean of all starts, because the models of the seeds differ by more than a method changes them.
    """
    figure = _figure(9, 3.6)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, which in zip(panels, ("chosen", "rejected"), strict=True):
        for (name, seeds), color in zip(curves.items(), COLORS, strict=False):
            steps, values = seeds[0]["steps"], np.array([seed[which] for seed in seeds])
            values = values - values[:, :1] + values[:, :1].mean()
            axes.plot(steps, values.mean(0), color=color, label=name, linewidth=1.8)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
        axes.axhline(values[:, 0].mean(), color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(f"{which} responses", loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("log-probability, held-out")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_points(results: dict[str, list[float]], label: str, path: Path) -> None:
    """Draw a row for each method with a point for each seed and a bar at their mean; ``label`` names the quantity."""
    figure = _figure(7, 0.9 + 0.36 * len(results))
    axes = figure.subplots()
    for row, values in enumerate(results.values()):
        axes.plot(values, [row] * len(values), "o", color=COLORS[0], alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot(np.mean(values), row, "|", color=COLORS[2], markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(results)), results)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=150)


def draw_lines(panels: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str, path: Path, log_x: bool = False) -> None:
    """Draw a panel for each world with a line through the points of each method, sorted by x."""
    figure = _figure(4.5 * len(panels), 3.6)
    for axes, (world, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for (name, points), color in zip(lines.items(), COLORS, strict=False):
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=name, linewidth=1.5, markersize=4)
        axes.set_title(world, loc="left", fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        if log_x:
            axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
