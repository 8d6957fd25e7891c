"""Writes files and folders beside their place and moves them there once they are whole, so that a failure leaves the old ones."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write, in the folder of ``file``. It replaces ``file`` when the block ends; after an error ``file`` is unchanged.

    The content is on the disk before the move, so that a power cut leaves the old file or the new one. The new file has the old
    one's permissions, or those of any new file.
    """
    file = Path(os.path.realpath(file))  # a link is kept, and its target replaced
    file.parent.mkdir(parents=True, exist_ok=True)
    # Named after the process: two of them may write the same file.
    beside = file.with_name(f"{file.name}.{os.getpid()}.unfinished")
    try:
        beside.touch()
        mode = stat.S_IMODE((file if file.exists() else beside).stat().st_mode)
        yield beside
        os.chmod(beside, mode)  # some writers make files that nobody else may read
        sync(beside)
        os.replace(beside, file)
        sync(file.parent)
    finally:
        beside.unlink(missing_ok=True)


def move_folder(beside: Path, folder: Path) -> None:
    """Sync a written folder to the disk and move it to its place; a folder that was there is removed after that."""
    sync_tree(beside)
    if folder.exists():
        old = folder.with_name(f"_{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old)
    else:
        os.replace(beside, folder)
    sync(folder.parent)


def sync_tree(folder: Path) -> None:
    """:func:`sync` of a folder and all that it holds."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until the file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
