"""Figures of the stored results, drawn from their JSON alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from . import schema

OURS = ("#0b3d91", "#2f6fd0", "#7aa6e8", "#b9d1f5")
PEERS = ("#8c8c8c", "#e08a2e", "#4b9b5f", "#b5495b", "#8a6bb8", "#c7b04a", "#5ab4ac", "#7a4a2b")


def plot(results: Path, images: Path) -> list[Path]:
    """Draw every ``results/<device>/<suite>.json`` into ``images/<device>-<suite>-*.png``."""
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for file in sorted(results.glob("*/*.json")):
        document = schema.load(file)
        groups = _drawn(document["rows"])
        if not groups or document["header"]["suite"] == "tune":  # no times, or settings, which suit a table
            continue
        stem = images / f"{file.parent.name}-{file.stem}"
        if document["header"]["suite"] in ("linear", "skip"):
            drawn.append(_bars(document, groups, "units", "time in GEMMs U, less is better", f"{stem}-time.png"))
            drawn += _save_budget(document, f"{stem}-save-budget.png")
        else:
            drawn.append(_bars(document, groups, "speedup", "times as fast as plain PyTorch", f"{stem}-speed.png"))
        if document["header"]["suite"] != "group":  # its problems take only kilobytes
            drawn.append(_bars(document, groups, "peak_mib", "peak MiB beyond the inputs", f"{stem}-memory.png"))
    for file in drawn:
        print("drew", file)
    return drawn


def _drawn(rows: list[dict]) -> dict[str, list[dict]]:
    """The timed rows of each problem by its title, without ceilings, repeated timings and the curve over ``save_budget``."""
    groups: dict[str, list[dict]] = {}
    for (case, dtype, pass_name), group in schema.by_problem(rows).items():
        shown = [row for row in group if row["ms"] and not schema.SIDE_ROWS.search(row["implementation"])]
        if shown:
            groups[f"{textwrap.fill(case, 48)}\n{dtype}, {pass_name}"] = shown
    return groups


def _bars(document: dict, groups: dict[str, list[dict]], field: str, label: str, target: str) -> Path:
    """A panel for each problem, a bar for each implementation."""
    columns = min(2 if document["header"]["suite"] == "logps" else 3, len(groups))
    lines = -(-len(groups) // columns)
    tallest = max(map(len, groups.values()))
    size = (5.2 * columns, (0.9 + 0.3 * tallest) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    colours = _colours([schema.label(row) for rows in groups.values() for row in rows])
    for axis, (title, rows) in zip(axes.flat, groups.items(), strict=False):
        rows = [row for row in rows if row[field] is not None][::-1]
        values, names = [row[field] for row in rows], [schema.label(row) for row in rows]
        bars = axis.barh(names, values, color=[colours[name] for name in names], height=0.7)
        axis.bar_label(bars, [f"{value:.3g}" if value >= 0.1 else "<0.1" for value in values], padding=3, fontsize=8)
        axis.set_xlim(0, 1.18 * max([*values, 1e-9]))
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    return _save(document, figure, label, target)


def _colours(names: list[str]) -> dict[str, str]:
    """Blues for this package and one other colour for each other package, the same in every panel."""
    unique = list(dict.fromkeys(names))
    ours = [name for name in unique if name.startswith(schema.OURS)]
    peers = [name for name in unique if name not in ours]
    palette = [(ours, OURS), (peers, PEERS)]
    return {name: shades[i % len(shades)] for group, shades in palette for i, name in enumerate(group)}


def _save_budget(document: dict, target: str) -> list[Path]:
    """Time and memory of a trained head by the share of the logits that is kept."""
    curves: dict[str, dict[int, dict]] = {}
    for row in document["rows"]:
        title, name = f"{row['case'].removeprefix('trained head, ')}, {row['dtype']}", row["implementation"]
        if row["status"] != "ok" or not row["case"].startswith("trained head") or not row["units"]:
            continue
        if ", save_budget " in name:
            curves.setdefault(title, {})[int(name.rpartition(" ")[2].rstrip("%"))] = row
        elif schema.is_ours(row) and not name.endswith(" again"):
            curves.setdefault(title, {}).setdefault(0, row)
    if not curves:
        return []
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10.4, 3.2), layout="constrained")
    for title, points in curves.items():
        percents = sorted(points)
        time.plot(percents, [points[percent]["units"] for percent in percents], "o-", label=title)
        memory.plot(percents, [points[percent]["peak_mib"] for percent in percents], "o-", label=title)
    for axis, title in ((time, "time in GEMMs U"), (memory, "peak MiB beyond the inputs")):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("save_budget, % of the logits", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    time.legend(fontsize=7, frameon=False)
    return [_save(document, figure, "the trained head by save_budget", target)]


def _save(document: dict, figure: Figure, label: str, target: str) -> Path:
    header = document["header"]
    figure.suptitle(f"{header['suite']}: {label}   ({header['hardware']}, torch {header['torch']})", fontsize=10)
    figure.set_layout_engine("constrained", h_pad=0.1)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return Path(target)
