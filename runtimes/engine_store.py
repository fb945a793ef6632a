"""Engines inside a bundle: written whole, found again by what they were built from, named in the manifest.

An engine is a file ``engines/<target>/<graph>-<key>.engine`` with a note beside it that holds its entry. The key is a
hash of everything that it was built from, so a file never changes and a new build puts new files beside the old ones.
Replacing ``manifest.json`` is the one step that makes them the target's engines; only then are the old files deleted.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.bundle import Bundle, file_entry, sha256_of
from edgeprune.errors import BundleError, EngineError
from edgeprune.json_data import from_json, to_json
from edgeprune.manifest import (
    MANIFEST_FILE,
    EngineEntry,
    EngineSetEntry,
    GraphEntry,
    ProfileEntry,
    manifest_from_json,
    manifest_to_json,
)
from edgeprune.whole_file import write_whole

ENGINES_FOLDER = "engines"
_KEY_CHARACTERS = 16


def engine_key(graph: GraphEntry, profiles: tuple[ProfileEntry, ...], **built_with: Any) -> str:
    """Hash of what an engine is built from.

    Args:
        graph: The ONNX file and its weights, by their hashes.
        profiles: Its profiles.
        built_with: TensorRT, GPU, plugin, precision, settings.
    """
    parts = {
        "onnx": graph.file.sha256,
        "data": [entry.sha256 for entry in graph.data],
        "profiles": to_json(profiles),
        **built_with,
    }
    return combined_key(parts)


def combined_key(parts: Any) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EngineStore:
    """The engines of one target in a bundle.

    Args:
        bundle: The bundle.
        target: Name of the target.
    """

    def __init__(self, bundle: Bundle, target: str) -> None:
        self.bundle = bundle
        self.target = target
        self.folder = bundle.path / ENGINES_FOLDER / target

    def find(self, graph: str, key: str) -> EngineEntry | None:
        """The engine of a key; None if it was not built, or if its file or its note is damaged."""
        path = self._path(graph, key)
        try:
            data = json.loads(_note(path).read_text(encoding="utf-8"))
            entry = from_json(EngineEntry, data, path.name)
            whole = path.stat().st_size == entry.file.bytes and sha256_of(path) == entry.file.sha256
        except (OSError, ValueError, RecursionError, BundleError):
            return None
        return entry if whole and entry.key == key and self.bundle.file(entry.file) == path else None

    def add(
        self, graph: str, key: str, data: Any, profiles: tuple[ProfileEntry, ...], seconds: float
    ) -> EngineEntry:
        """Write an engine and then its note, each whole or not at all.

        Raises:
            EngineError: It cannot be written.
        """
        path = self._path(graph, key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, memoryview(data))
            onnx = self.bundle.manifest.graphs[graph].file.sha256
            entry = EngineEntry(file_entry(self.bundle.path, path), key, onnx, profiles, round(seconds, 3))
            write_whole(_note(path), json.dumps(to_json(entry), indent=1).encode())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return entry

    def publish(self, engines: EngineSetEntry) -> Bundle:
        """Name the engines in the manifest, then delete those that no entry of the target names.

        Raises:
            EngineError: The manifest cannot be written.
        """
        path = self.bundle.path / MANIFEST_FILE
        # Read again: another target's build may have ended meanwhile.
        manifest = manifest_from_json(path)
        manifest = replace(manifest, engines={**manifest.engines, self.target: engines})
        try:
            write_whole(path, manifest_to_json(manifest).encode())
            named = {self.bundle.file(entry.file) for entry in engines.engines.values()}
            for found in self.folder.iterdir():
                if found not in named and found not in {_note(engine) for engine in named}:
                    found.unlink()
        except OSError as error:
            raise _unwritable(self.bundle.path, error) from error
        return Bundle(self.bundle.path, manifest)

    def _path(self, graph: str, key: str) -> Path:
        return self.folder / f"{graph}-{key[:_KEY_CHARACTERS]}.engine"


def _note(engine: Path) -> Path:
    return engine.with_suffix(".json")


def _unwritable(folder: Path, error: OSError) -> EngineError:
    return EngineError(
        f"cannot write {folder} ({error.strerror or error}): free disk space or copy the bundle elsewhere"
    )
