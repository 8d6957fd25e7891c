"""Reference log-probs, computed once and stored in a file that later runs read."""

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

# Prompts per file of an unfinished pass: a killed run loses at most the results of so many.
PART = 512
# Keys of a model's config that do not change what it computes: where it is stored and how it is run.
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

    The token ids make the key depend on the tokenizer, the chat template and the truncation.

    Args:
        weights: the result of :func:`weights_digest`.
        rows: rows with ``prompt_ids`` and ``response_ids``; other columns do not count.
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
    """A hash of the weights and the config of the model, or with ``base`` of its base under PEFT."""
    core = causal_lm(model)
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    digest = xxhash.xxh3_128()
    for name, tensor in whole_tensors(core):
        if base and prefix is not None and (prefix in name or "modules_to_save" in name):
            continue
        # PEFT moves the layers that it changes one level down, which must not change the hash.
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # mypy sees no buffer in ndarray
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

    The ranks share the pass and save it in parts, so that a run that is killed and started again continues after the last saved
    part. Only the main process reads and writes; every file is written under a temporary name and renamed once it is whole.

    Args:
        rows: rows with ``prompt_ids`` and ``response_ids``.
        logps: computes the log-probs of a list of rows, flat, ``[S]``. It is called the same number of times on every rank,
            because the forward of a sharded model is collective.
        file: a file named by :func:`cache_key`; its folder is created. A folder of the same name without suffix holds the parts
            of an unfinished pass.
        batch_size: rows per call of ``logps``.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: a file was not written by this function, or a log-prob is not finite.
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
    # The longest rows come first: a batch then has rows of similar length, and one that does not fit in memory fails at once.
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
    """The log-probs of all batches; each rank computes its share."""
    mine = {}
    for turn in range(0, len(batches), accelerator.num_processes):
        # If the last turn has fewer batches than ranks, the other ranks repeat the last batch: the forward may be collective.
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
        raise ValueError(f"{file}: not a file of reference log-probs ({error}); remove it, and it is computed again") from error
    if flat.shape != (size,):
        raise ValueError(f"{file}: holds {list(flat.shape)} log-probs, wanted {size}; remove it, and it is computed again")
    return flat


def _write(file: Path, flat: Tensor) -> None:
    with whole_files.replacing(file) as beside:
        save_file({"ref_logps": flat}, beside)
