"""``nca-kernels score``: log-probs and implicit rewards of a file's responses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

from ...scores import score_pairs
from ..data.collator import GroupCollator, group_logps
from ..data.load import load_groups
from ..data.tokenize import tokenize_groups
from ..models.heads import model_logps
from ..models.pretrained import load_model, load_tokenizer

Rows = list[list[float]]  # a number for each response of each prompt


def score_file(
    model: str,
    data: Path,
    out: Path,
    *,
    ref_model: str | None = None,
    beta: float = 0.1,
    average: bool = False,
    batch_size: int = 4,
) -> None:
    r"""Write ``data`` to ``out`` with ``logps``, and with ``ref_logps`` and ``rewards`` if there is a reference; print a summary.

    ``logps`` are in nats, the sum over a response's tokens or their ``average``; ``rewards = beta * (logps - ref_logps)``. Each
    is a list, in the order of the responses (``chosen``, ``rejected``; ``A0``, ``A1``, ...). The input's columns stay; one of
    the same name is replaced.

    Args:
        model, ref_model: folders or names on the hub, each with its tokenizer.
        data: a JSONL file that :func:`~nca_kernels.integrations.data.load.load_groups` takes; scores may be missing.
        batch_size: prompts at a time.

    Raises:
        ValueError: a row that cannot be used, by file, row and column; another kind of file; a model without a usable head.
        OSError: a file or model that cannot be read or written.
    """
    if data.suffix != ".jsonl":
        raise ValueError(f"data: got {data}, wanted a .jsonl file")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = load_groups(data, scores_required=False).rows
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").split("\n") if line.strip()]
    columns = {"logps": response_logps(model, rows, average=average, batch_size=batch_size)}
    if ref_model is not None:
        columns["ref_logps"] = response_logps(ref_model, rows, average=average, batch_size=batch_size)
        columns["rewards"] = [
            [beta * (logp - ref) for logp, ref in zip(*both, strict=True)]
            for both in zip(columns["logps"], columns["ref_logps"], strict=True)
        ]
    with out.open("w", encoding="utf-8") as file:
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


@torch.no_grad()
def response_logps(model: str, rows: Dataset, *, average: bool, batch_size: int) -> Rows:
    """The log-prob of each response of ``rows`` (of ``load_groups``) under a model that is loaded for it."""
    tokenizer = load_tokenizer(model)
    tokenized = tokenize_groups(rows.remove_columns("scores"), tokenizer).rows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_model(model).to(device).eval()
    collator = GroupCollator(tokenizer.pad_token_id or 0)
    logps = []
    for start in tqdm(range(0, len(tokenized), batch_size), desc=model):
        batch = collator([tokenized[i] for i in range(start, min(start + batch_size, len(tokenized)))])
        batch = {name: value.to(device) for name, value in batch.items()}
        tokens = model_logps(network, batch["input_ids"], batch["attention_mask"], batch["labels"])
        sums = group_logps(tokens, batch)
        values = sums / batch["lengths"].clamp(min=1) if average else sums
        logps += [row[mask].tolist() for row, mask in zip(values, batch["mask"], strict=True)]
    return logps


def ordered_pairs(values: Rows, scores: list[list[float] | None]) -> tuple[int, int]:
    """How many pairs of one prompt's responses with different scores have ``values`` in the same order, and of how many."""
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
