"""The time of a segment's prefill by its rows: from the cost model, or from a measured table."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.cost import Convention, DecoderShape, attention_flops, head_flops, mlp_flops
from edgeprune.errors import DataError
from edgeprune.manifest import Manifest

_FORM = '{"segment0": {"64": 1.9, "512": 9.7}, …}, milliseconds by rows'


@dataclass(frozen=True)
class SegmentFlops:
    """Operations of a segment, counted as :attr:`edgeprune.cost.Convention.TRUE`.

    Attributes:
        shape: The decoder.
        attention_layers: Layers whose attention the segment holds.
        mlp_layers: Layers whose MLP it holds.
        head: Whether it holds the head, which runs on one row.
    """

    shape: DecoderShape
    attention_layers: int
    mlp_layers: int
    head: bool

    @classmethod
    def of(cls, manifest: Manifest, index: int) -> "SegmentFlops":
        """A segment of a bundle."""
        segment = manifest.segments[index]
        shape = DecoderShape.from_geometry(manifest.geometry)
        last = index == len(manifest.segments) - 1
        return cls(shape, len(segment.layers), len(segment.mlp_layers), last)

    def __call__(self, rows: int) -> float:
        """Of a number of rows."""
        attention = attention_flops(self.shape, rows, Convention.TRUE)
        mlp = mlp_flops(self.shape, rows, Convention.TRUE)
        head = head_flops(self.shape) if self.head else 0
        return float(self.attention_layers * attention + self.mlp_layers * mlp + head)


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of a segment; between two rows of the table they grow evenly.

    Attributes:
        segment: The segment, for messages.
        rows: Ascending.
        milliseconds: Of each.
    """

    segment: str
    rows: tuple[int, ...]
    milliseconds: tuple[float, ...]

    def __call__(self, rows: int) -> float:
        """Of a number of rows.

        Raises:
            DataError: It lies outside the table.
        """
        if not self.rows[0] <= rows <= self.rows[-1]:
            raise DataError(
                f"the latency table of {self.segment} holds {self.rows[0]} … {self.rows[-1]} rows, {rows} were seen: "
                "measure there, too"
            )
        return float(np.interp(rows, self.rows, self.milliseconds))


def read_latency_tables(path: str | Path, segments: Sequence[str]) -> dict[str, LatencyTable]:
    """Read measured times of prefill, ``{"SEGMENT": {"ROWS": MILLISECONDS, …}, …}``.

    Args:
        path: The JSON file.
        segments: The segments that need a table.

    Raises:
        DataError: It is missing or malformed, lacks a segment, or names another.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: --latency takes a file with {_FORM}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: write {_FORM}") from error
    if not isinstance(data, dict) or set(data) != set(segments):
        raise DataError(f"{path} must name the segments {', '.join(segments)} and no others: write {_FORM}")
    return {name: _table(path, name, data[name]) for name in segments}


def _table(path: str | Path, segment: str, data: Any) -> LatencyTable:
    found: dict[int, float] = {}
    for rows, milliseconds in data.items() if isinstance(data, dict) else ():
        number = isinstance(milliseconds, (int, float)) and not isinstance(milliseconds, bool)
        if not rows.isascii() or not rows.isdigit() or not number or not 0 < milliseconds < math.inf:
            raise DataError(
                f"{path}: {segment} has {str(milliseconds)[:40]} for {rows[:40]!r} rows: write {_FORM}"
            )
        found[int(rows)] = float(milliseconds)
    if not found:
        raise DataError(f"{path}: {segment} has no times: write {_FORM}")
    ordered = sorted(found.items())
    return LatencyTable(segment, tuple(rows for rows, _ in ordered), tuple(ms for _, ms in ordered))
