"""Calibrations for tests that need no samples."""

from collections.abc import Mapping, Sequence

from edgeprune.calib.statistics import distribution
from edgeprune.calibration_entry import BucketEntry, CalibrationEntry, SegmentBucketsEntry
from edgeprune.manifest import Manifest

TEXT = 20


def calibration_of(
    manifest: Manifest,
    kept: Sequence[Sequence[int]],
    buckets: Mapping[str, Sequence[tuple[int, int, int]]] | None = None,
    max_sequence: int | None = None,
) -> CalibrationEntry:
    """What prompts of one picture and 20 rows of text show, of which the sites keep so many tokens.

    Args:
        manifest: Of the bundle.
        kept: By site, the tokens kept of every picture.
        buckets: By segment.
        max_sequence: Most rows that they cover; the context by default.
    """
    pictures = len(kept[0]) if kept else 1
    entering = [[manifest.geometry.tokens_per_image] * pictures, *kept]
    text = distribution([TEXT] * pictures, ())
    prefill = {
        name: SegmentBucketsEntry(
            len(ranges), tuple(BucketEntry(*sizes, prompts=1) for sizes in ranges), 0.125
        )
        for name, ranges in (buckets or {}).items()
    }
    return CalibrationEntry(
        edgeprune_version="0.1.0",
        data_sha256="7" * 64,
        samples=pictures,
        skipped=3,
        max_new_tokens=64,
        keep_per_image={
            site.graph: distribution(counts, ()) for site, counts in zip(manifest.sites, kept, strict=True)
        },
        sequence_lengths={
            segment.graph: distribution([count + TEXT for count in counts], ())
            for segment, counts in zip(manifest.segments, entering, strict=True)
        },
        text_lengths=text,
        generated_lengths=distribution([7] * pictures, ()),
        tiles=distribution([1] * pictures, ()),
        cost="flops",
        max_sequence=max_sequence or manifest.geometry.context_length,
        fallback="onnx graphs" if max_sequence else None,
        prefill=prefill,
    )
