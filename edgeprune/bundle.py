"""A bundle: the folder that export writes and every other step reads."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BundleError
from edgeprune.manifest import MANIFEST_FILE, FileEntry, Manifest, manifest_from_json
from edgeprune.whole_folder import whole_folder

# Hashing reads a file whole; larger ones are checked by size when a bundle is opened and by hash by ``verify``.
HASHED_AT_OPEN_BYTES = 64 * 2**20


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


def writing(path: str | Path) -> contextlib.AbstractContextManager[Path]:
    """Write a bundle aside and put it in place only when it is whole; see :func:`whole_folder`.

    Raises:
        BundleError: ``path`` holds something else than a bundle, or the disk is full or read-only.
    """
    return whole_folder(path, MANIFEST_FILE, "bundle", BundleError)
