"""A bundle: the folder that export writes and every other step reads."""

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BundleError
from edgeprune.manifest import MANIFEST_FILE, FileEntry, Manifest, manifest_from_json

# Hashing reads a file whole; larger ones are checked by size when a bundle is opened and by hash by ``verify``.
HASHED_AT_OPEN_BYTES = 64 * 2**20

# Folders that this process is writing. Process ids come again, in containers nearly always: a folder with
# our own id that is not here was left by an earlier process.
_partial_folders: set[Path] = set()


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: The folder.
        manifest: Its manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, check_all: bool = False) -> "Bundle":
        """Read the manifest and check the files.

        Args:
            path: The folder.
            check_all: Hash every file; otherwise files above 64 MiB are checked by size only.

        Raises:
            BundleError: No bundle, or a file is missing or changed.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{folder} is not a folder: give a bundle made by edgeprune export")
        bundle = cls(folder, manifest_from_json(folder / MANIFEST_FILE))
        for entry in bundle.manifest.files():
            bundle.check(entry, hashed=check_all or entry.bytes <= HASHED_AT_OPEN_BYTES)
        return bundle

    def file(self, entry: FileEntry) -> Path:
        """Where a file lies."""
        return self.path / entry.path

    def check(self, entry: FileEntry, *, hashed: bool) -> None:
        """Compare a file with its entry.

        Raises:
            BundleError: It is missing or changed.
        """
        path = self.file(entry)
        remedy = "copy the bundle again or export the checkpoint again"
        if not path.is_file():
            raise BundleError(f"{path} is missing: {remedy}")
        if path.stat().st_size != entry.bytes or (hashed and sha256_of(path) != entry.sha256):
            raise BundleError(f"{path} is not the file that was exported (changed or truncated): {remedy}")


def sha256_of(*paths: Path) -> str:
    """Hash of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def file_entry(folder: Path, path: Path) -> FileEntry:
    """The entry of a file that lies in ``folder``."""
    return FileEntry(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Write a bundle aside and put it in place only when it is whole.

    Yields a new folder beside ``path``. When the body ends, it replaces ``path``; when the body fails or is
    interrupted, it is deleted and whatever was at ``path`` is left as it was.

    Raises:
        BundleError: ``path`` holds something else than a bundle, or the disk is full or read-only.
    """
    # A link stays, what it points to is replaced.
    target = Path(os.path.realpath(path))
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    if partial in _partial_folders:
        raise BundleError(f"{target} is being written by this process already: choose another output folder")
    _partial_folders.add(partial)
    try:
        if target.exists() and not (target / MANIFEST_FILE).is_file() and not _is_empty_folder(target):
            raise BundleError(f"{target} exists and is no bundle: choose another output folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as error:
        raise BundleError(
            f"cannot write {target} ({error.strerror or error}): free disk space or choose another output folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _partial_folders.discard(partial)


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
    """Clear away what killed exports left beside the target; a bundle that had stepped aside comes back."""
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
