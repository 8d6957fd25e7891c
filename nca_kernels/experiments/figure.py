"""The paper's Figure 2: the log-probs of chosen and rejected responses over the training, by method."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# From Okabe and Ito's palette: told apart with any colour vision.
COLORS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")


def draw_figure(result: dict, path: Path) -> None:
    """``result`` is what :func:`nca_kernels.experiments.demo.run_demo` returns."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, which in zip(panels, ("chosen", "rejected"), strict=True):
        for (name, run), color in zip(result["results"].items(), COLORS, strict=False):
            axes.plot(run["curves"]["steps"], run["curves"][which], color=color, label=name, linewidth=1.8)
        start = next(iter(result["results"].values()))["curves"][which][0]
        axes.axhline(start, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(f"{which} responses", loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("log-probability, held-out")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
