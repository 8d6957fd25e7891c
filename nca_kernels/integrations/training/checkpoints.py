"""Checkpoints that are whole or not there, and that know which run they belong to."""

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
UNFINISHED = "_unfinished"  # checkpoints are written in this folder; push_to_hub leaves it out, for its underscore

Fingerprint = dict[str, object]


class Checkpoint(NamedTuple):
    """A checkpoint on disk, and what speaks against resuming from it (``None``: nothing)."""

    folder: Path
    step: int
    problem: str | None
    another_run: str | None  # how the run that wrote it differs
    weights_only: bool  # no state of the optimizer


def seal(folder: Path, fingerprint: Fingerprint, settings: str) -> None:
    """Add to a written checkpoint the run's settings and its manifest, after which it is whole."""
    (folder / RUN).write_text(settings, encoding="utf-8")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    text = json.dumps({"fingerprint": fingerprint, "files": sizes}, indent=1, sort_keys=True)
    with whole_files.replacing(folder / MANIFEST) as beside:
        beside.write_text(text, encoding="utf-8")


def examine(folder: Path, fingerprint: Fingerprint) -> Checkpoint:
    """Whether a checkpoint is whole and of the run with this fingerprint."""
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
    """All of a folder, the newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _is_numbered(path)]
    return sorted((examine(folder, fingerprint) for folder in folders), key=lambda found: -found.step)


def differences(ours: object, theirs: object, name: str = "") -> Iterator[str]:
    """What differs between two fingerprints, by name: "beta: 0.5 there, 0.1 here"."""
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
