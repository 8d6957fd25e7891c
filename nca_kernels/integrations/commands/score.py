"""``nca-kernels score``: log-probs and implicit rewards of a file's responses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import send_to_device
from datasets import Dataset
from tqdm import tqdm

from ... import whole_files
from ...scores import score_pairs
from ..data.collator import GroupCollator, group_logps
from ..data.load import load_groups, source_rows
from ..data.tokenize import tokenize_groups
from ..models.heads import model_logps
from ..models.pretrained import load_model, load_tokenizer
from ..reference.placement import default_device, to_device
from ..training.checkpoints import RUN

Rows = list[list[float]]  # a number for each response of each prompt


def score_file(
    model: str,
    data: str | Path,
    out: Path,
    *,
    split: str = "train",
    ref_model: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
    beta: float = 0.1,
    average: bool = False,
    batch_size: int = 4,
) -> None:
    r"""Write ``data`` to ``out`` with ``logps``, and with ``ref_logps`` and ``rewards`` if there is a reference; print a summary.

    ``logps`` are in nats, the sum over a response's tokens or their ``average``; ``rewards = beta * (logps - ref_logps)``. Each
    is a list, in the order of the responses (``chosen``, ``rejected``; ``A0``, ``A1``, ...). The input's columns stay; one of
    the same name is replaced. ``out`` is written under a temporary name and renamed, so that it may be ``data`` itself.

    Args:
        model, ref_model: folders or names on the hub, each with its tokenizer.
        data: what :func:`~nca_kernels.integrations.data.load.load_groups` takes; scores may be missing.
        split: the split of a folder or a hub name.
        model_init_kwargs: keywords of ``from_pretrained`` for both models; ``None`` for those in the ``run.yaml`` that
            ``nca-kernels train`` saves with a model.
        max_length: the most tokens of a prompt with a response, as in training; ``None`` for the value in the ``run.yaml`` of
            ``model``, or for no limit if there is no such file.
        batch_size: prompts per batch.

    Raises:
        ValueError: a row cannot be used (the message names file, row and column); a model has no usable head.
        OSError: a file or model cannot be read or written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)  # before the long pass, so that an unusable folder fails at once
    groups = load_groups(str(data), split=split, scores_required=False)
    rows = groups.rows
    lines = source_rows(str(data), split=split)
    if groups.dropped:
        row, (problem, *_) = next(iter(groups.dropped.items()))
        raise ValueError(f"{data}: row {row}, {problem}")
    if len(lines) != len(rows):
        raise ValueError(
            f"{data}: got {len(lines)} rows for {len(rows)} prompts, wanted one row for each prompt, with all its responses"
        )
    settings = _settings(model)
    if max_length is None:
        max_length = settings.get("max_length")
        if max_length is not None:
            print(f"max_length {max_length}, as {Path(model) / RUN} says")
    logps_under = partial(
        response_logps,
        rows=rows,
        average=average,
        batch_size=batch_size,
        model_init_kwargs=model_init_kwargs,
        max_length=max_length,
        max_prompt_length=settings.get("max_prompt_length"),
    )
    columns = {"logps": logps_under(model)}
    if ref_model is not None:
        columns["ref_logps"] = logps_under(ref_model)
        columns["rewards"] = [
            [beta * (logp - ref) for logp, ref in zip(*both, strict=True)]
            for both in zip(columns["logps"], columns["ref_logps"], strict=True)
        ]
    with whole_files.replacing(out) as beside, beside.open("w", encoding="utf-8") as file:
        for line, *values in zip(lines, *columns.values(), strict=True):
            file.write(json.dumps({**line, **dict(zip(columns, values, strict=True))}, ensure_ascii=False) + "\n")
    print(f"{out}: {len(rows)} prompts, {sum(map(len, columns['logps']))} responses")
    for name, values in columns.items():
        flat = [value for row in values for value in row]
        print(f"{name:<10} mean {sum(flat) / len(flat):.4f}")
    judge = "rewards" if "rewards" in columns else "logps"
    right, pairs = ordered_pairs(columns[judge], rows["scores"])
    if pairs:
        print(f"accuracy   {right / pairs:.1%} of {pairs} pairs of different scores are in that order by {judge}")


def _settings(model: str) -> dict[str, Any]:
    """The ``run.yaml`` that ``nca-kernels train`` saved with the model; empty if there is none."""
    file = Path(model) / RUN
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


@torch.no_grad()
def response_logps(
    model: str,
    rows: Dataset,
    *,
    average: bool = False,
    batch_size: int = 4,
    model_init_kwargs: dict[str, Any] | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> Rows:
    """Load a model and compute its log-prob of each response of ``rows``, which are those of ``load_groups``."""
    tokenizer = load_tokenizer(model)
    without_scores = rows.remove_columns("scores")
    tokenized = tokenize_groups(without_scores, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length).rows
    if model_init_kwargs is None:
        model_init_kwargs = _settings(model).get("model_init_kwargs") or {}
        if model_init_kwargs:
            print(f"{model}: loaded with {model_init_kwargs}, as its {RUN} says")
    network = to_device(load_model(model, **model_init_kwargs), default_device()).eval()
    collator = GroupCollator(tokenizer.pad_token_id or 0)
    logps = []
    for start in tqdm(range(0, len(tokenized), batch_size), desc=model):
        batch = collator([tokenized[i] for i in range(start, min(start + batch_size, len(tokenized)))])
        batch = send_to_device(batch, network.device)
        tokens = model_logps(network, batch["input_ids"], batch["attention_mask"], batch["labels"])
        sums = group_logps(tokens.to(network.device), batch)
        values = sums / batch["lengths"].clamp(min=1) if average else sums
        logps += [row[mask].tolist() for row, mask in zip(values, batch["mask"], strict=True)]
    return logps


def ordered_pairs(values: Rows, scores: list[list[float] | None]) -> tuple[int, int]:
    """Among the pairs of a prompt's responses with different scores: how many have ``values`` in the same order, and how many
    there are.
    """
    right = pairs = 0
    for row, given in zip(values, scores, strict=True):
        if given is None:
            continue
        by_score = _better(given)
        right += int((by_score & _better(row)).sum())
        pairs += int(by_score.sum())
    return right, pairs


def _better(values: list[float]) -> torch.Tensor:
    grid = torch.tensor([values], dtype=torch.float64)
    return score_pairs(grid, torch.ones_like(grid, dtype=torch.bool), "all")
