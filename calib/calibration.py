"""Calibrating a bundle: run it on example data, note the lengths, choose the profiles, write both into its manifest."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import edgeprune
from edgeprune.bundle import Bundle
from edgeprune.calib.buckets import PrefillTime, choose_buckets
from edgeprune.calib.journal import Journal
from edgeprune.calib.prefill_time import SegmentFlops, read_latency_tables
from edgeprune.calib.record import Record, sample_sha256
from edgeprune.calib.runner import LocalRunner, SampleRunner
from edgeprune.calib.samples import BadSample, Sample, choose_samples, no_samples, read_samples
from edgeprune.calib.statistics import check_quantiles, distribution, quantiles_for, with_quantiles
from edgeprune.calibration_entry import (
    FLOPS,
    LATENCY_TABLE,
    ONNX_GRAPHS,
    CalibrationEntry,
    DistributionEntry,
    SegmentBucketsEntry,
)
from edgeprune.errors import BundleError, DataError, PictureError
from edgeprune.manifest import MANIFEST_FILE, Manifest, manifest_from_json, manifest_to_json
from edgeprune.whole_file import write_whole

DEFAULT_PROFILES = 2
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure and how to choose.

    Attributes:
        samples: How many to draw; None takes all.
        seed: Of the draw.
        max_new_tokens: Most tokens to generate for a sample.
        profiles: Most prefill profiles that a segment may have; one for decoding comes on top.
        quantiles: Shares to tell; None takes the usual ones that the number of samples allows.
        max_sequence: Most rows that profiles cover; None is the model's context.
        latency: A file of measured times instead of the cost model.
    """

    samples: int | None = None
    seed: int = 0
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    profiles: int = DEFAULT_PROFILES
    quantiles: tuple[float, ...] | None = None
    max_sequence: int | None = None
    latency: Path | None = None

    def __post_init__(self) -> None:
        for option, value in (
            ("samples", self.samples),
            ("max-new-tokens", self.max_new_tokens),
            ("profiles", self.profiles),
        ):
            if value is not None and value < 1:
                raise DataError(f"--{option} is {value}: give at least 1")
        if self.seed < 0:
            raise DataError(f"--seed is {self.seed}: give at least 0")
        check_quantiles(self.quantiles or ())


class CalibrationProgress(Protocol):
    """Sees how a calibration gets on."""

    def samples(self, done: int, total: int, skipped: int) -> None:
        """So many of the samples are done, and so many lines and pictures were of no use."""

    def bad(self, sample: BadSample) -> None:
        """One cannot be used."""


class Silent:
    """Shows nothing."""

    def samples(self, done: int, total: int, skipped: int) -> None:
        """See :class:`CalibrationProgress`."""

    def bad(self, sample: BadSample) -> None:
        """See :class:`CalibrationProgress`."""


def calibrate(
    bundle: str | Path,
    data: str | Path | None,
    options: CalibrationOptions | None = None,
    *,
    prompt: str | None = None,
    runner: SampleRunner | None = None,
    restart: bool = False,
    progress: CalibrationProgress | None = None,
) -> CalibrationEntry:
    """Run a bundle on example data and write statistics and profiles into its manifest.

    What is interrupted goes on where it was when it is called again; the manifest changes in one step at the end.

    Args:
        bundle: The folder.
        data: A JSONL file or a folder of pictures (:func:`edgeprune.calib.samples.read_samples`); None chooses the
            profiles anew from the lengths that the last calibration saw.
        options: What to measure and how to choose.
        prompt: The question about every picture of a folder.
        runner: What runs the samples; this process by default.
        restart: Forget what an interrupted calibration has done.
        progress: Is told how it gets on.

    Raises:
        DataError: The data is missing, unreadable or too little, or an option is unusable.
        BundleError: No bundle, or it cannot be written.
        BackendError: The bundle cannot be run here.
    """
    options = options or CalibrationOptions()
    opened = Bundle.open(bundle)
    times = _times(opened.manifest, options.latency)
    greatest = _greatest(opened.manifest, options.max_sequence)
    if data is None:
        entry = opened.manifest.calibration
        if entry is None:
            raise DataError("the bundle is not calibrated yet: give samples with --data")
    else:
        entry = _measure(
            opened,
            read_samples(data, prompt),
            options,
            runner or LocalRunner(),
            progress or Silent(),
            restart=restart,
        )
    entry = _choose(entry, opened.manifest, options, times, greatest)
    _publish(opened, entry)
    if data is not None:
        Journal.delete_all(opened.path)
    return entry


def _measure(
    bundle: Bundle,
    data: Iterable[Sample | BadSample],
    options: CalibrationOptions,
    runner: SampleRunner,
    progress: CalibrationProgress,
    *,
    restart: bool,
) -> CalibrationEntry:
    """Statistics without buckets."""
    samples, bad = choose_samples(data, options.samples, options.seed)
    quantiles_for(len(samples), options.quantiles)
    for line in bad:
        progress.bad(line)
    settings: dict[str, str | int] = {
        "max_new_tokens": options.max_new_tokens,
        "backend": runner.engine.backend,
        "provider": runner.engine.provider or "cpu",
    }
    found: dict[int, Record] = {}
    malformed = len(bad)

    def skip(sample: BadSample) -> None:
        bad.append(sample)
        progress.bad(sample)

    def tell() -> None:
        progress.samples(len(found) + len(bad) - malformed, len(samples), len(bad))

    with Journal(bundle, settings, restart=restart) as journal:
        left = _not_journaled(samples, journal, found, skip)
        tell()
        if left:
            for sample, result in runner.run(bundle.path, left, options.max_new_tokens):
                if isinstance(result, BadSample):
                    skip(result)
                else:
                    journal.add(result)
                    found[sample.number] = result
                tell()
    if not found:
        raise DataError(no_samples(bad))
    return _statistics([found[number] for number in sorted(found)], len(bad), bundle.manifest, options)


def _not_journaled(
    samples: Sequence[Sample], journal: Journal, found: dict[int, Record], skip: Callable[[BadSample], None]
) -> list[Sample]:
    """The samples that are still to be run; the records of the others go to ``found``."""
    if not journal.records:
        return list(samples)
    left = []
    for sample in samples:
        try:
            record = journal.records.get(sample_sha256(sample))
        except PictureError as error:
            skip(BadSample(sample.number, sample.name, str(error)))
            continue
        if record is None:
            left.append(sample)
        else:
            found[sample.number] = record
    return left


def _statistics(
    records: Sequence[Record], skipped: int, manifest: Manifest, options: CalibrationOptions
) -> CalibrationEntry:
    quantiles = quantiles_for(len(records), options.quantiles)
    lengths = zip(*(record.sequence_lengths for record in records), strict=True)
    kept = zip(*(record.kept for record in records), strict=True)
    return CalibrationEntry(
        edgeprune_version=edgeprune.__version__,
        data_sha256=hashlib.sha256("".join(record.sample_sha256 for record in records).encode()).hexdigest(),
        samples=len(records),
        skipped=skipped,
        max_new_tokens=options.max_new_tokens,
        keep_per_image={
            site.graph: distribution((count for counts in pictures for count in counts), quantiles)
            for site, pictures in zip(manifest.sites, kept, strict=True)
        },
        sequence_lengths={
            segment.graph: distribution(rows, quantiles)
            for segment, rows in zip(manifest.segments, lengths, strict=True)
        },
        text_lengths=distribution((record.text_length for record in records), quantiles),
        generated_lengths=distribution((record.generated_length for record in records), quantiles),
        tiles=distribution((record.tiles for record in records), quantiles),
        cost=FLOPS,
        max_sequence=manifest.geometry.context_length,
        fallback=None,
        prefill={},
    )


def _times(manifest: Manifest, latency: Path | None) -> dict[str, PrefillTime]:
    """Of every segment that has attention, and so a prefill of its own."""
    with_attention = {s.graph: index for index, s in enumerate(manifest.segments) if s.layers}
    if latency is not None:
        return dict(read_latency_tables(latency, list(with_attention)))
    return {name: SegmentFlops.of(manifest, index) for name, index in with_attention.items()}


def _greatest(manifest: Manifest, max_sequence: int | None) -> int:
    context = manifest.geometry.context_length
    if max_sequence is None:
        return context
    if not 2 <= max_sequence <= context:
        raise DataError(f"--max-sequence is {max_sequence}: give 2 to {context}, the model's context")
    return max_sequence


def _choose(
    entry: CalibrationEntry,
    manifest: Manifest,
    options: CalibrationOptions,
    times: dict[str, PrefillTime],
    greatest: int,
) -> CalibrationEntry:
    """The statistics with quantiles and buckets as the options want them."""
    quantiles = quantiles_for(entry.samples, options.quantiles)
    prefill = {}
    for name, time in times.items():
        chosen = choose_buckets(
            _up_to(entry.sequence_lengths[name], greatest), time, options.profiles, greatest
        )
        prefill[name] = SegmentBucketsEntry(options.profiles, chosen.buckets, chosen.gain)
    return replace(
        entry,
        keep_per_image={site: with_quantiles(kept, quantiles) for site, kept in entry.keep_per_image.items()},
        sequence_lengths={
            name: with_quantiles(rows, quantiles) for name, rows in entry.sequence_lengths.items()
        },
        text_lengths=with_quantiles(entry.text_lengths, quantiles),
        generated_lengths=with_quantiles(entry.generated_lengths, quantiles),
        tiles=with_quantiles(entry.tiles, quantiles),
        cost=FLOPS if options.latency is None else LATENCY_TABLE,
        max_sequence=greatest,
        fallback=None if greatest == manifest.geometry.context_length else ONNX_GRAPHS,
        prefill=prefill,
    )


def _up_to(rows: DistributionEntry, greatest: int) -> DistributionEntry:
    """Without the prompts that profiles do not cover."""
    fitting = [
        value
        for value, count in zip(rows.values, rows.counts, strict=True)
        for _ in range(count)
        if value <= greatest
    ]
    if not fitting:
        raise DataError(
            f"all prompts are longer than --max-sequence {greatest}, the shortest has {rows.values[0]} rows: raise it"
        )
    return distribution(fitting, ())


def _publish(bundle: Bundle, entry: CalibrationEntry) -> None:
    """Replace the manifest, which is the one step that changes the bundle."""
    path = bundle.path / MANIFEST_FILE
    # Read again: engines may have been built meanwhile.
    now = manifest_from_json(path)
    if replace(now, calibration=None, engines={}) != replace(bundle.manifest, calibration=None, engines={}):
        raise BundleError(f"{bundle.path} was exported again meanwhile: calibrate it again")
    try:
        write_whole(path, manifest_to_json(replace(now, calibration=entry)).encode())
    except OSError as error:
        raise BundleError(
            f"cannot write {path} ({error.strerror or error}): free disk space or copy the bundle elsewhere"
        ) from error
