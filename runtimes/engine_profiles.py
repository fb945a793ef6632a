"""Optimization profiles: for every dynamic dimension of every graph, the least, the tuned-for and the greatest size.

Plain functions of the manifest. A shape outside all profiles is an error when an engine runs, so each strategy covers
everything that the limits allow:

* ``one``: a single profile per graph.
* ``split``: decoder segments have a profile for prefill, tuned for the tokens that enter them, and one for decode,
  tuned for one new row. In a calibrated bundle, prefill has a profile for every bucket that calibration chose.

An engine may hold its weights more than once, so the builder measures both.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import tensor_names as names
from edgeprune.errors import EngineError
from edgeprune.inspection import TEXT_TOKENS
from edgeprune.manifest import GraphEntry, Manifest, ProfileEntry, SiteEntry

Range = tuple[int, int, int]

ONE, SPLIT, AUTO, FILE = "one", "split", "auto", "file"
STRATEGIES = (AUTO, ONE, SPLIT)
WHOLE, PREFILL, DECODE = "all", "prefill", "decode"
DEFAULT_IMAGES = 4
# Rows that TensorRT is to tune decoding for: a prompt's and half of an answer's, which is taken for short.
_ANSWER_TOKENS = 64
# TensorRT for RTX stores the weights once for all profiles but one that is fixed to a single row, which gets a copy in
# another order (measured, docs/tensorrt.md): decoding is tuned for one row and admits two.
_DECODE_ROWS = 2
# CLIP's begin and end tokens take two places of a chunk.
_CHUNK_MARKS = 2


@dataclass(frozen=True)
class Limits:
    """The largest prompts that the engines take.

    Attributes:
        images: Typical pictures in a prompt; a picture of more tiles counts as several.
        sequence: Rows of a prompt, generated tokens included.
    """

    images: int
    sequence: int

    def __post_init__(self) -> None:
        if self.images < 1:
            raise EngineError(f"--max-images is {self.images}: give at least 1")
        if self.sequence < 2:
            raise EngineError(f"--max-sequence is {self.sequence}: give at least 2")

    @classmethod
    def of(cls, manifest: Manifest, images: int | None = None, sequence: int | None = None) -> "Limits":
        """The given limits, the rest from the calibration or the model.

        Raises:
            EngineError: They exceed the model's context, or a picture does not fit.
        """
        geometry = manifest.geometry
        rows = sequence
        if rows is None:
            rows = (
                geometry.context_length if manifest.calibration is None else manifest.calibration.max_sequence
            )
        if rows > geometry.context_length:
            raise EngineError(
                f"--max-sequence {rows} exceeds the model's context of {geometry.context_length}"
            )
        if rows <= geometry.tokens_per_image:
            raise EngineError(
                f"--max-sequence {rows} holds no picture of {geometry.tokens_per_image} tokens and its question: "
                "raise it"
            )
        fitting = max(1, rows // geometry.tokens_per_image)
        return cls(min(DEFAULT_IMAGES, fitting) if images is None else images, rows)


def profiles(manifest: Manifest, limits: Limits, strategy: str) -> dict[str, tuple[ProfileEntry, ...]]:
    """The profiles of every graph.

    Args:
        manifest: Of the bundle.
        limits: The largest prompts.
        strategy: "one" or "split".

    Raises:
        EngineError: A graph has a dimension that nothing is known of.
    """
    return {name: graph_profiles(manifest, limits, strategy, name) for name in manifest.graphs}


def graph_profiles(manifest: Manifest, limits: Limits, strategy: str, name: str) -> tuple[ProfileEntry, ...]:
    """The profiles of one graph, see :func:`profiles`."""
    graph = manifest.graphs[name]
    known = dimension_ranges(manifest, limits, name)
    wide = {dim: _known(known, dim, name) for dim in dynamic_dimensions(graph)}
    is_segment = name in {segment.graph for segment in manifest.segments}
    if strategy == ONE or not is_segment or "past" not in wide:
        return (_entry(WHOLE, wide),)
    buckets = _prefill_buckets(manifest, limits, name)
    found = []
    for index, rows in enumerate(buckets):
        ranges = {**wide, "sequence": rows, "past": (0, 0, 0)}
        if "probe_rows" in wide:
            ranges["probe_rows"] = (0, 1, 1)
        found.append(_entry(PREFILL if len(buckets) == 1 else f"{PREFILL}{index}", ranges))
    decode = {**wide, "sequence": (1, 1, min(_DECODE_ROWS, limits.sequence)), "past": (1, *wide["past"][1:])}
    if "probe_rows" in wide:
        # None come; where none can, the projections are fused another way and their weights stored twice.
        decode["probe_rows"] = (0, 0, 1)
    return (*found, _entry(DECODE, decode))


def weight_copies(entries: tuple[ProfileEntry, ...], *, rtx: bool) -> int:
    """How often an engine with these profiles holds its weights, at the most.

    Args:
        entries: The profiles.
        rtx: Whether TensorRT for RTX builds it. Of TensorRT nothing was measured, so every profile counts.
    """
    if not rtx:
        return len(entries)
    return len({entry.ranges.get("sequence") == (1, 1, 1) for entry in entries})


def dynamic_dimensions(graph: GraphEntry) -> tuple[str, ...]:
    """Names of a graph's dynamic dimensions and of its scalar inputs whose value is a shape, in order."""
    found = [dim for tensor in graph.inputs for dim in tensor.shape if isinstance(dim, str)]
    found += [tensor.name for tensor in graph.inputs if tensor.name == names.NUM_KEEP]
    return tuple(dict.fromkeys(found))


def dimension_ranges(manifest: Manifest, limits: Limits, name: str) -> dict[str, Range]:
    """Range by name of everything that may be dynamic in graph ``name``."""
    geometry, rows, calibration = manifest.geometry, limits.sequence, manifest.calibration
    per_tile = geometry.num_patches if geometry.tokens_per_tile is None else geometry.tokens_per_tile
    tiles = geometry.typical_tiles
    most_tiles = limits.images * tiles
    tuned_tiles = tiles if calibration is None else min(calibration.tiles.quantile(0.5), most_tiles)
    entering = _rows_entering(manifest, limits, name)
    site = next((site for site in manifest.sites if site.graph == name), None)
    kept = _kept_rows(manifest, limits, site or next(iter(manifest.sites), None))
    typical_text = TEXT_TOKENS if calibration is None else calibration.text_lengths.quantile(0.5)
    text, pictures = min(typical_text, rows - 1), limits.images
    inserted = max(0, geometry.typical_tokens - tiles * geometry.num_patches)
    block = geometry.patches_per_token
    # Where pictures keep their size, the most that one, or all of them, may have.
    unbounded = _any_size(manifest)
    most_tokens = max(rows, limits.images * geometry.typical_tokens)
    # A window is a square of tokens; the last of a row or column may be a strip.
    window_side = max(1, math.isqrt(geometry.vision_window // block))
    windows = max(1, math.ceil(geometry.typical_tokens / window_side**2))
    slots = tiles * geometry.num_patches + inserted
    recycled = 0 if site is None else site.recycled_per_image
    merged = 0 if site is None else site.merged_per_image
    length = 0 if manifest.probe is None else manifest.probe.guide_context_length
    chunks = max(1, math.ceil(rows / (length - _CHUNK_MARKS))) if length > _CHUNK_MARKS else 1
    answer = _ANSWER_TOKENS if calibration is None else math.ceil(calibration.generated_lengths.mean / 2)
    decoding = min(rows - 1, entering + answer)
    return {
        "tiles": (1, tuned_tiles, most_tiles),
        "patch_rows": (1, per_tile, most_tokens)
        if unbounded
        else (per_tile, tuned_tiles * per_tile, most_tiles * per_tile),
        "patches": (block, geometry.typical_tokens * block, most_tokens * block),
        "pictures": (1, 1, pictures),
        "longest_picture": (block, geometry.typical_tokens * block, most_tokens * block),
        "windows": (1, windows, most_tokens // window_side + pictures),
        # A prompt without a picture has no visual tokens; the projector then does not run.
        "visual_tokens": (
            1 if name == "projector" else 0,
            min(geometry.tokens_per_image, rows),
            rows,
        ),
        "sequence": (1, entering, rows),
        "prompt": (1, min(rows, geometry.tokens_per_image + text), rows),
        "past": (0, decoding, rows - 1),
        "past + sequence": (1, decoding + 1, rows),
        "kept": (1, kept, rows),
        names.NUM_KEEP: (0, max(0, kept - text), rows),
        "text_rows": (1, text, rows),
        "context_rows": (1, max(1, entering - text), rows),
        # No grid without a tile of its own, and an overview beside the tiles.
        "grids": (1, min(2, tiles), most_tiles + pictures),
        # The smallest picture has one tile; what is inserted grows with the pictures.
        "slots": (
            1,
            slots,
            most_tokens
            if unbounded
            else most_tiles * geometry.num_patches + pictures * max(inserted, geometry.num_patches),
        ),
        "probe_rows": (0, 1, 1),
        "chunks": (1, 1, chunks),
        "guide_tokens": (length, length, chunks * length),
        "recycled": (recycled, recycled, recycled * pictures),
        "merged": (merged, merged, merged * pictures),
    }


def parse_profile_file(path: Path, manifest: Manifest, limits: Limits) -> dict[str, tuple[ProfileEntry, ...]]:
    """Profiles from a JSON file, those of a single profile per graph for graphs that it does not name.

    The file is an object ``{"GRAPH": [{"DIMENSION": [least, tuned, greatest], …}, …], …}`` with one object per profile;
    a dimension that a profile does not name has its whole range.

    Raises:
        EngineError: It is malformed, or names a graph, a dimension or a size that does not exist.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EngineError(
            f"{path} does not exist: --profiles takes {', '.join(STRATEGIES)} or a file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not readable JSON: {_FORM}") from error
    if not isinstance(data, dict) or not data:
        raise EngineError(f"{path} holds no object of graphs: {_FORM}")
    unknown = sorted(set(data) - set(manifest.graphs))
    if unknown:
        raise EngineError(
            f"{path} names the graph '{unknown[0]}', the bundle has {', '.join(manifest.graphs)}"
        )
    found = profiles(manifest, limits, ONE)
    for name, entries in data.items():
        if not isinstance(entries, list) or not entries:
            raise EngineError(f"{path}: '{name}' is no list of profiles: {_FORM}")
        found[name] = tuple(
            _entry(str(index), _given_ranges(path, name, found[name][0].ranges, entry))
            for index, entry in enumerate(entries)
        )
    return found


_FORM = '{"segment0": [{"sequence": [1, 640, 1024], "past": [0, 0, 0]}, …]}'


def _given_ranges(
    path: Path, name: str, whole: Mapping[str, tuple[int, ...]], entry: Any
) -> dict[str, Range]:
    if not isinstance(entry, dict):
        raise EngineError(f"{path}: a profile of '{name}' is no object of dimensions: {_FORM}")
    ranges: dict[str, Range] = {dim: (sizes[0], sizes[1], sizes[2]) for dim, sizes in whole.items()}
    for dim, sizes in entry.items():
        if dim not in ranges:
            raise EngineError(
                f"{path}: '{name}' has no dimension '{dim}', it has {', '.join(ranges) or 'none'}"
            )
        whole_numbers = isinstance(sizes, list) and all(type(size) is int for size in sizes)
        if not whole_numbers or len(sizes) != 3 or not sizes[0] <= sizes[1] <= sizes[2]:
            raise EngineError(f"{path}: {name}.{dim} is {str(sizes)[:60]}, expected [least, tuned, greatest]")
        least, _, greatest = ranges[dim]
        if not least <= sizes[0] or not sizes[2] <= greatest:
            raise EngineError(f"{path}: {name}.{dim} is {sizes}, outside of {least} … {greatest}")
        ranges[dim] = (sizes[0], sizes[1], sizes[2])
    return ranges


def _any_size(manifest: Manifest) -> bool:
    """Whether pictures keep their size: the tower takes patches instead of tiles."""
    vision = manifest.graphs.get("vision")
    return vision is not None and any("patches" in tensor.shape for tensor in vision.inputs)


def _known(ranges: Mapping[str, Range], dim: str, graph: str) -> Range:
    if dim not in ranges:
        raise EngineError(f"the graph '{graph}' has a dimension '{dim}' without a range: update edgeprune")
    least, tuned, greatest = ranges[dim]
    # Small limits may lie below what is typical.
    greatest = max(least, greatest)
    return least, min(max(least, tuned), greatest), greatest


def _entry(name: str, ranges: Mapping[str, Range]) -> ProfileEntry:
    return ProfileEntry(name, {dim: tuple(sizes) for dim, sizes in ranges.items()})


def _prefill_buckets(manifest: Manifest, limits: Limits, name: str) -> list[Range]:
    """Ranges of the rows that enter a segment in prefill, from 1 to all, one for each profile."""
    calibration, last = manifest.calibration, limits.sequence
    if calibration is None or name not in calibration.prefill:
        return [(1, min(_rows_entering(manifest, limits, name), last), last)]
    fitting = [bucket for bucket in calibration.prefill[name].buckets if bucket.least <= last]
    found = [(bucket.least, bucket.tuned, bucket.greatest) for bucket in fitting]
    # The limits of the build may be other ones than those of the calibration.
    least, tuned, _ = found[-1]
    return [*found[:-1], (least, min(tuned, last), last)]


def _rows_entering(manifest: Manifest, limits: Limits, name: str) -> int:
    """Rows of a typical prompt that enter a graph: a segment, or the site behind it."""
    graphs = [segment.graph for segment in manifest.segments]
    sites = [site.graph for site in manifest.sites]
    index = graphs.index(name) if name in graphs else sites.index(name) if name in sites else 0
    if manifest.calibration is not None:
        return min(limits.sequence, manifest.calibration.sequence_lengths[graphs[index]].quantile(0.5))
    if index:
        return _kept_rows(manifest, limits, manifest.sites[index - 1])
    return _with_text(manifest.geometry.tokens_per_image, limits)


def _kept_rows(manifest: Manifest, limits: Limits, until: SiteEntry | None) -> int:
    """Rows of a typical prompt that leave a site; with None, all."""
    tokens = manifest.geometry.tokens_per_image
    if until is None:
        return _with_text(tokens, limits)
    if manifest.calibration is not None:
        return _rows_entering(manifest, limits, manifest.segments[manifest.sites.index(until) + 1].graph)
    for site in manifest.sites:
        if site.keep_per_image is not None:
            tokens = min(tokens, site.keep_per_image)
        elif site.keep_share is not None:
            tokens = min(tokens, max(1, int(round(manifest.geometry.typical_tokens * site.keep_share, 6))))
        else:
            # It depends on the picture and was not measured: tuned for the half, and all of them fit.
            tokens = max(1, tokens // 2)
        if site is until:
            break
    return _with_text(tokens, limits)


def _with_text(tokens: int, limits: Limits) -> int:
    return min(limits.sequence, tokens + TEXT_TOKENS)
