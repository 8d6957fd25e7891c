"""Checkpoints that are written whole or not at all, and that record which run wrote them.

A checkpoint is whole if it has a manifest and every file that the manifest names, each of the recorded size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ... import whole_files

RUN = "run.yaml"
MANIFEST = "checkpoint.json"  # the fingerprint of the run and the size of every file, written last
UNFINISHED = "_unfinished"  # a folder for checkpoints that are being written; the underscore makes push_to_hub skip it

Fingerprint = dict[str, object]


class Checkpoint(NamedTuple):
    """A checkpoint on disk, and the reasons not to resume from it (``None`` where there is no such reason)."""

    folder: Path
    step: int
    problem: str | None
    another_run: str | None  # the differences to the run that wrote it
    weights_only: bool  # it has no optimizer state


def seal(folder: Path, fingerprint: Fingerprint, settings: str) -> None:
    """Add the run's settings and then the manifest to a written checkpoint, which makes it whole."""
    (folder / RUN).write_text(settings, encoding="utf-8")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    text = json.dumps({"fingerprint": fingerprint, "files": sizes}, indent=1, sort_keys=True)
    with whole_files.replacing(folder / MANIFEST) as beside:
        beside.write_text(text, encoding="utf-8")


def examine(folder: Path, fingerprint: Fingerprint) -> Checkpoint:
    """Report whether a checkpoint is whole and whether the run with this fingerprint wrote it."""
    step = int(folder.name.rpartition("-")[2]) if _is_numbered(folder) else 0
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        theirs, sizes = manifest["fingerprint"], manifest["files"]
    except FileNotFoundError:
        return Checkpoint(
            folder, step, f"it has no {MANIFEST}, which is written last: half-written, or of another program", None, False
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Checkpoint(folder, step, f"{MANIFEST} cannot be read ({error})", None, False)
    problem = next(_damages(folder, sizes), None)
    weights_only = not any(Path(name).name.startswith(("optimizer", "global_step")) or "optim" in name for name in sizes)
    different = "; ".join(differences(_as_json(fingerprint), theirs)) or None
    return Checkpoint(folder, step, problem, different, weights_only)


def checkpoints(output_dir: Path, fingerprint: Fingerprint) -> list[Checkpoint]:
    """All checkpoints in ``output_dir``, newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _is_numbered(path)]
    return sorted((examine(folder, fingerprint) for folder in folders), key=lambda found: -found.step)


def differences(ours: object, theirs: object, name: str = "") -> Iterator[str]:
    """Yield each difference between two fingerprints with its name, such as "beta: 0.5 there, 0.1 here"."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield f"{name}: {theirs} there, {ours} here"


def remove_unfinished(output_dir: Path) -> None:
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def _damages(folder: Path, sizes: dict[str, int]) -> Iterator[str]:
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes of {size}"


def _is_numbered(folder: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def _as_json(fingerprint: Fingerprint) -> Fingerprint:
    return json.loads(json.dumps(fingerprint))
