"""Reference log-probs, computed once into a file that later runs read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ... import whole_files
from ..data.rows import arrow_batches, longest_sequences, response_counts
from ..models.heads import causal_lm
from ..models.main_process import on_main
from .placement import whole_tensors

# Prompts between two files of an unfinished pass: what a killed run loses at most.
PART = 512
# What a model's config says of where it lies and how it is run, not of what it computes.
_NOT_THE_MODEL = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "dtype",
    "base_model_name_or_path",
    "inference_mode",
}


def cache_key(weights: str, rows: Dataset, numerics: str) -> str:
    r"""The name of the file that holds the reference log-probs of these rows.

    The token ids stand for the tokenizer, the chat template and the truncation: all that these do is in them.

    Args:
        weights: of :func:`weights_digest`.
        rows: with ``prompt_ids`` and ``response_ids``; what else they hold does not count.
        numerics: the mixed precision that the pass runs in, and the dtype of its logits if that is a setting.
    """
    ids = columns_digest(rows.select_columns(["prompt_ids", "response_ids"]))
    return xxhash.xxh3_128(f"{weights} {numerics} {ids}".encode()).hexdigest()


def columns_digest(rows: Dataset) -> str:
    """A hash of the numbers in all columns, which are lists, or lists of lists."""
    digest = xxhash.xxh3_128(" ".join(rows.column_names).encode())
    for columns in arrow_batches(rows):
        for lists in columns.values():
            while isinstance(lists, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
                digest.update(pc.list_value_length(lists).to_numpy())
                lists = lists.flatten()
            digest.update(lists.to_numpy(zero_copy_only=False).astype("float64"))
    return digest.hexdigest()


def weights_digest(model: nn.Module, *, base: bool) -> str:
    """A hash of what the model computes, or with ``base`` its base under PEFT: the bytes of its weights, and its config."""
    core = causal_lm(model)
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    digest = xxhash.xxh3_128()
    for name, tensor in whole_tensors(core):
        if base and prefix is not None and (prefix in name or "modules_to_save" in name):
            continue
        # PEFT puts the layers that it changes one level down.
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # a buffer, which its type hides
        digest.update(content)
    configs: list[Any] = [core.config]
    if isinstance(model, PeftModel) and not base:
        configs += [model.peft_config[name] for name in model.active_adapters]
    for config in configs:
        known = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_MODEL}
        digest.update(json.dumps(known, sort_keys=True, default=_in_order).encode())
    return digest.hexdigest()


def _in_order(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def reference_logps(
    rows: Dataset,
    logps: Callable[[list[dict]], Tensor],
    file: Path,
    accelerator: Accelerator,
    *,
    batch_size: int,
    progress: bool = False,
) -> list[list[float]]:
    r"""The reference log-prob of every response of every row: read from ``file``, or computed into it.

    The pass is shared among the ranks and saved part by part, so that a run that is killed and started again goes on where it
    was. Only the main process reads and writes; every file is written under another name and renamed once it is whole.

    Args:
        rows: with ``prompt_ids`` and ``response_ids``.
        logps: the log-probs of a list of rows, flat, ``[S]``. Called the same number of times on every rank, since a sharded
            model's forward is collective.
        file: named by :func:`cache_key`; its folder is made. Unfinished parts lie in a folder beside it.
        batch_size: rows a call.
        progress: show a bar, on the main process.

    Raises:
        ValueError: a file that is not what this function wrote.
    """
    counts = response_counts(rows)
    flat = on_main(accelerator, _read, file, sum(counts))
    if flat is None:
        flat = _computed(rows, counts, logps, file, accelerator, batch_size, progress)
    return [part.tolist() for part in flat.split(counts)]


def _computed(
    rows: Dataset,
    counts: list[int],
    logps: Callable[[list[dict]], Tensor],
    file: Path,
    accelerator: Accelerator,
    batch_size: int,
    progress: bool,
) -> Tensor:
    # The longest first: rows of a batch are then of a length, and a batch too large for the memory fails at once.
    order = (-longest_sequences(rows)).argsort(kind="stable").tolist()
    bar = tqdm(total=len(rows), desc="Reference log-probs", disable=not (progress and accelerator.is_main_process))
    row_logps: dict[int, Tensor] = {}
    for start in range(0, len(order), PART):
        part = order[start : start + PART]
        part_file = file.with_suffix("") / f"{start}.safetensors"
        part_counts = [counts[i] for i in part]
        flat = on_main(accelerator, _read, part_file, sum(part_counts))
        if flat is None:
            batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            flat = _shared(rows, batches, logps, accelerator)
            _refuse_not_finite(flat, part, part_counts)
            on_main(accelerator, _write, part_file, flat)
        row_logps.update(zip(part, flat.split(part_counts), strict=True))
        bar.update(len(part))
    bar.close()
    flat = torch.cat([row_logps[i] for i in range(len(rows))])
    on_main(accelerator, _write, file, flat)
    if accelerator.is_main_process:
        shutil.rmtree(file.with_suffix(""), ignore_errors=True)
    return flat


def _refuse_not_finite(flat: Tensor, rows: list[int], counts: list[int]) -> None:
    bad = (~flat.isfinite()).nonzero()[:, 0]
    if len(bad):
        row = next(row for row, values in zip(rows, flat.split(counts), strict=True) if not values.isfinite().all())
        raise ValueError(
            f"reference: row {row + 1}: got the log-prob {flat[bad[0]]:g} ({len(bad)} responses), wanted finite numbers: "
            "the reference model gives NaN or zero probability"
        )


def _shared(rows: Dataset, batches: list[list[int]], logps: Callable[[list[dict]], Tensor], accelerator: Accelerator) -> Tensor:
    """The log-probs of all batches, each rank computing its share."""
    mine = {}
    for turn in range(0, len(batches), accelerator.num_processes):
        # Where the last turn has fewer batches than ranks, some compute the last batch once more.
        i = min(turn + accelerator.process_index, len(batches) - 1)
        mine[i] = logps([rows[j] for j in batches[i]]).float().cpu()
    everyone = dict(pair for share in gather_object([mine]) for pair in share.items())
    return torch.cat([everyone[i] for i in range(len(batches))])


def _read(file: Path, size: int) -> Tensor | None:
    if not file.exists():
        return None
    try:
        flat = load_file(file)["ref_logps"]
    except Exception as error:
        raise ValueError(f"{file}: no file of reference log-probs ({error}); remove it to have it computed anew") from error
    if flat.shape != (size,):
        raise ValueError(f"{file}: holds {list(flat.shape)} log-probs, wanted {size}; remove it to have it computed anew")
    return flat


def _write(file: Path, flat: Tensor) -> None:
    with whole_files.replacing(file) as beside:
        save_file({"ref_logps": flat}, beside)
