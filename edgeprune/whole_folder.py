"""Folders that are there as a whole or not at all."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgeprune.errors import EdgepruneError

# Folders that this process is writing. Process ids come again, in containers nearly always: a folder with
# our own id that is not here was left by an earlier process.
_partial_folders: set[Path] = set()


@contextlib.contextmanager
def whole_folder(path: str | Path, marker: str, kind: str, error: type[EdgepruneError]) -> Iterator[Path]:
    """Write a folder aside and put it in place only when it is whole.

    Yields a new folder beside ``path``. When the body ends, it replaces ``path``; when the body fails or is
    interrupted, it is deleted and whatever was at ``path`` is left as it was.

    Args:
        path: The folder.
        marker: Name of a file that every folder of this kind holds; only those are replaced.
        kind: What such a folder is, for messages.
        error: What is raised.

    Raises:
        EdgepruneError: Of the type ``error``: ``path`` holds something else, or the disk is full or read-only.
    """
    # A link stays, what it points to is replaced.
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    if partial in _partial_folders:
        raise error(f"{target} is being written by this process already: choose another output folder")
    _partial_folders.add(partial)
    try:
        check_replaceable(target, marker, kind, error)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as reason:
        raise error(
            f"cannot write {target} ({reason.strerror or reason}): free disk space or choose another output folder"
        ) from reason
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _partial_folders.discard(partial)


def check_replaceable(path: Path, marker: str, kind: str, error: type[EdgepruneError]) -> None:
    """Find out early whether :func:`whole_folder` may write to ``path``; the same arguments.

    Raises:
        EdgepruneError: Of the type ``error``: ``path`` holds something else.
    """
    if path.exists() and not (path / marker).is_file() and not _is_empty_folder(path):
        raise error(f"{path} exists and is no {kind}: choose another output folder")


def _replace(partial: Path, target: Path) -> None:
    """Swap the folders; a folder cannot be renamed over a non-empty one, so the old one steps aside first."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Clear away what killed processes left beside the target; a folder that had stepped aside comes back."""
    for kind in ("old", "partial"):
        for folder in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            owner = folder.name.rpartition("-")[2]
            if owner != str(os.getpid()) and owner.isdigit() and Path(f"/proc/{owner}").exists():
                continue
            if kind == "old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
