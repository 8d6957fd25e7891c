"""The model card of a run: what was trained, on what, how, and with what result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..._version import __version__
from ...whole_files import replacing

CITATION = """```bibtex
@article{chen2024noise,
  title   = {Noise Contrastive Alignment of Language Models with Explicit Rewards},
  author  = {Chen, Huayu and He, Guande and Yuan, Lifan and Cui, Ganqu and Su, Hang and Zhu, Jun},
  journal = {arXiv preprint arXiv:2402.05369},
  year    = {2024}
}
```
"""

_METRICS = ("loss", "rewards/accuracy", "rewards/margin", "logps/best_change", "kl")


class Training(NamedTuple):
    """The facts of a run that its card reports.

    Attributes:
        base: the model that training started from; a folder or a name on the hub.
        data: the name and a description of each data set; the keys say what it was used for.
        settings: names and values of the loss, its parameters and the steps.
        command: the command line that started the run.
        metrics: the metrics of the last log and of the last evaluation, by their names in the log.
    """

    base: str
    data: Mapping[str, str]
    settings: Mapping[str, Any]
    command: str
    metrics: Mapping[str, float]


def write_card(folder: Path, training: Training, *, adapter: bool) -> None:
    """Write ``folder/README.md``. It replaces the card that a library may have written when it saved the model."""
    with replacing(folder / "README.md") as file:
        file.write_text(card(training, adapter=adapter), encoding="utf-8")


def card(training: Training, *, adapter: bool) -> str:
    """The text of the card: metadata that the hub reads, and Markdown."""
    metadata: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": ["nca_kernels", "alignment"]}
    if not Path(training.base).exists():
        metadata["base_model"] = training.base
    license_name = _license(training.base)
    if license_name is not None:
        metadata["license"] = license_name
    rows = [
        ("base model", training.base),
        *training.data.items(),
        *((name, f"{value}") for name, value in training.settings.items()),
    ]
    told = license_name or "see the base model, whose licence holds for this one"
    lines = [f"| {name} | {_cell(value)} |" for name, value in [*rows, ("licence of the base", told)]]
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {Path(training.base).name}, aligned with {training.settings['loss']}\n",
        f"{'An adapter of ' if adapter else ''}`{training.base}`, trained by [nca_kernels](https://arxiv.org/abs/2402.05369) "
        f"{__version__} on responses with scores.\n",
        "| | |\n|---|---|\n" + "\n".join(lines) + "\n",
        "## Result\n",
        _result(training.metrics),
        f"## Command\n\n    {training.command}\n",
        f"## Citation\n\n{CITATION}",
    ]
    return "\n".join(sections)


def _result(metrics: Mapping[str, float]) -> str:
    rows = [
        (name, *(f"{metrics[key]:.4f}" if key in metrics else "" for key in (name, f"eval_{name}")))
        for name in _METRICS
        if name in metrics or f"eval_{name}" in metrics
    ]
    if not rows:
        return "No metric was logged.\n"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"| metric | training, last log | evaluation |\n|---|---|---|\n{table}\n"


def _license(base: str) -> str | None:
    """The licence that the base model's own card names; None if the base is not a local folder or its card names none."""
    file = Path(base) / "README.md"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        metadata = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return None
    found = metadata.get("license") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
