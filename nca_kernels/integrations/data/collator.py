"""Batches of prompts with K responses each: padded rows, one packed row, or each prompt once with its responses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ...checks import one_of
from ...segments import sequence_sums

LAYOUTS = ("padded", "packed", "share_prompt")
IGNORE_INDEX = -100


class Batch(TypedDict, total=False):
    """A batch of :class:`GroupCollator`; ``mismatched`` and ``baseline`` are KTO's."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    branches: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    mask: Tensor
    lengths: Tensor
    scores: Tensor
    ref_logps: Tensor
    desirable: Tensor
    mismatched: Batch  # each prompt with one response to another prompt
    baseline: Tensor  # the mean log-ratio of all mismatched pairs of the step or the evaluation


class _Segment(NamedTuple):
    """Consecutive tokens of a row of the batch."""

    input_ids: list[int]
    labelled: int  # how many tokens at its end have a label
    position: int  # of the first
    branch: int  # tokens of branch 0 are seen by every later token of the row


@dataclass
class GroupCollator:
    r"""Rows of ``tokenize_groups`` to a batch.

    Args:
        pad_token_id: fills up rows; any id, since padding is not attended to and has no label.
        layout: ``"padded"``: one row a response. ``"packed"``: all responses in one row, for models that separate
            sequences by ``position_ids``. ``"share_prompt"``: one row a prompt, which holds the prompt once and its responses side
            by side (:mod:`~nca_kernels.integrations.data.shared_prompt`).

    A batch of B prompts, with at most K responses each and S responses in all, holds:

    - ``input_ids``, ``labels`` ``[N, T]``: ``labels`` are -100 at prompts and padding, and belong to the logits with ``shift=1``;
    - ``attention_mask`` ``[N, T]`` (padded), ``position_ids`` ``[N, T]`` (packed, shared), ``branches`` ``[N, T]`` (shared:
      0 at the prompt, k at the k-th response, -1 at padding);
    - ``scores``, ``mask``, ``lengths`` ``[B, K]``: the scores, which responses exist, and the number of labelled tokens;
      ``ref_logps`` and ``desirable`` ``[B, K]`` if the rows have them;
    - ``cu_seqlens`` ``[S + 1]`` and ``slots`` ``[S]``, with which :func:`group_logps` finds the responses.
    """

    pad_token_id: int
    layout: str = "padded"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)

    def __call__(self, rows: list[dict]) -> Batch:
        if self.layout == "share_prompt":
            lines = [list(_shared(row)) for row in rows]
        else:
            lines = [[segment] for row in rows for segment in _separate(row)]
            if self.layout == "packed":
                lines = [[segment for line in lines for segment in line]]
        return {**self._tokens(lines), **_per_response(rows)}

    def _tokens(self, lines: list[list[_Segment]]) -> Batch:
        shape = len(lines), max(sum(len(s.input_ids) for s in line) for line in lines)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        branches = torch.full(shape, -1)
        starts = []
        for n, line in enumerate(lines):
            end = 0
            for segment in line:
                start, end = end, end + len(segment.input_ids)
                input_ids[n, start:end] = torch.tensor(segment.input_ids, dtype=torch.int64)
                labels[n, end - segment.labelled : end] = input_ids[n, end - segment.labelled : end]
                position_ids[n, start:end] = torch.arange(segment.position, segment.position + end - start)
                branches[n, start:end] = segment.branch
                if segment.labelled:
                    starts.append(n * shape[1] + start)
        # The sum of a response may extend to the start of the next one: tokens between them have no label and add 0.
        batch: Batch = {
            "input_ids": input_ids,
            "labels": labels,
            "cu_seqlens": torch.tensor([0, *starts[1:], input_ids.numel()]),
        }
        if self.layout == "padded":
            return {**batch, "attention_mask": (branches >= 0).long()}
        if self.layout == "packed":
            return {**batch, "position_ids": position_ids}
        return {**batch, "position_ids": position_ids, "branches": branches}


def _separate(row: dict) -> Iterator[_Segment]:
    for response in row["response_ids"]:
        yield _Segment(row["prompt_ids"] + response, len(response), 0, 0)


def _shared(row: dict) -> Iterator[_Segment]:
    # The prompt's last token predicts the first token of every response, but a position predicts only one token. So each response
    # begins with a copy of it, at the same position id, where the model computes the same hidden state.
    *prompt, last = row["prompt_ids"]
    yield _Segment(prompt, 0, 0, 0)
    for branch, response in enumerate(row["response_ids"], start=1):
        yield _Segment([last, *response], len(response), len(prompt), branch)


def _per_response(rows: list[dict]) -> Batch:
    counts = [len(row["response_ids"]) for row in rows]
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]

    def grid(values: list[list[float]]) -> Tensor:
        flat = torch.tensor([value for row in values for value in row], dtype=torch.float32)
        return torch.zeros(mask.shape).masked_scatter(mask, flat)

    batch: Batch = {"mask": mask, "slots": mask.flatten().nonzero()[:, 0]}
    batch["lengths"] = grid([[len(response) for response in row["response_ids"]] for row in rows])
    for name in ("scores", "ref_logps"):
        if name in rows[0]:
            batch[name] = grid([row[name] for row in rows])
    if "desirable" in rows[0]:
        batch["desirable"] = grid([row["desirable"] for row in rows]).bool()
    return batch


def group_logps(token_logps: Tensor, batch: Batch) -> Tensor:
    """The log-prob of each response ``[B, K]``, 0 where ``mask`` is not set, from those of the tokens ``[N, T]`` (``shift=1``)."""
    sums = sequence_sums(token_logps, batch["cu_seqlens"])
    return sums.new_zeros(batch["mask"].numel()).index_copy(0, batch["slots"], sums).view(batch["mask"].shape)
