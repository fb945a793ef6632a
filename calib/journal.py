"""The records of a calibration that has not ended, so that the next run goes on where it was stopped."""

import glob
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from edgeprune.bundle import Bundle
from edgeprune.calib.record import Record
from edgeprune.errors import BundleError, DataError
from edgeprune.json_data import from_json, to_json
from edgeprune.manifest import manifest_to_json

_KEY_CHARACTERS = 16


class Journal:
    """A file of records beside the bundle, one JSON object per line, written out after each.

    A record holds for a bundle and the settings that it was made with, which are in the file's name, and for a sample,
    whose hash is in the record; so a resumed calibration may have more or other samples. A line that is torn or
    otherwise unreadable is a record that is not there.

    Attributes:
        path: The file, ``.NAME.calibration-KEY.jsonl``.
        records: By hash of the sample, what it holds.
    """

    def __init__(self, bundle: Bundle, settings: dict[str, str | int], *, restart: bool = False) -> None:
        """Find the records of an earlier run.

        Args:
            bundle: The bundle.
            settings: What a record depends on beside bundle and sample.
            restart: Forget the records.

        Raises:
            DataError: The folder beside the bundle cannot be written.
        """
        target = Path(os.path.realpath(bundle.path))
        # Calibration and engines do not change what the graphs compute.
        exported = manifest_to_json(replace(bundle.manifest, calibration=None, engines={}))
        key = hashlib.sha256(json.dumps([exported, settings], sort_keys=True).encode()).hexdigest()
        self.path = target.parent / f"{_prefix(target)}{key[:_KEY_CHARACTERS]}.jsonl"
        self.records: dict[str, Record] = {}
        try:
            if restart:
                self.path.unlink(missing_ok=True)
            self._file = self.path.open("a+b")
            self._file.seek(0)
            whole = 0
            for line in self._file:
                if line.endswith(b"\n"):
                    whole += len(line)
                    self._read(line)
            # What is written next begins a line of its own.
            self._file.truncate(whole)
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, record: Record) -> None:
        """Append a record.

        Raises:
            DataError: The disk is full.
        """
        try:
            self._file.write(json.dumps(to_json(record)).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self.records[record.sample_sha256] = record

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it stays, unless nothing is in it."""
        self._file.close()
        if not self.records:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def delete_all(bundle: Path) -> None:
        """Delete the journals of a bundle, whatever their settings: it is calibrated."""
        target = Path(os.path.realpath(bundle))
        for path in target.parent.glob(f"{glob.escape(_prefix(target))}*.jsonl"):
            path.unlink(missing_ok=True)

    def _read(self, line: bytes) -> None:
        try:
            record = from_json(Record, json.loads(line), self.path.name)
        except (ValueError, RecursionError, BundleError):
            return
        self.records[record.sample_sha256] = record

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self.path} ({error.strerror or error}): free disk space or copy the bundle elsewhere"
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.calibration-"
