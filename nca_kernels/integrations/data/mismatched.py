"""Batches for KTO: each prompt also with a response to another prompt."""

from __future__ import annotations

from dataclasses import dataclass

from .collator import Batch, GroupCollator


@dataclass
class MismatchedCollator:
    """The batch of ``collator``, and under ``"mismatched"`` a batch of each row's prompt with its ``mismatched_ids``."""

    collator: GroupCollator

    def __call__(self, rows: list[dict]) -> Batch:
        pairs = [mismatched_pair(row) for row in rows]
        return {**self.collator(rows), "mismatched": self.collator(pairs)}


def mismatched_pair(row: dict) -> dict:
    """A row of the prompt with one response to another prompt."""
    pair = {"prompt_ids": row["prompt_ids"], "response_ids": [row["mismatched_ids"]]}
    if "mismatched_ref_logps" in row:
        pair["ref_logps"] = [row["mismatched_ref_logps"]]
    return pair
