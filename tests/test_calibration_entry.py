"""The calibration of a manifest is read strictly, and refused where it contradicts itself."""

import json
from dataclasses import replace

import pytest
from calibrations import calibration_of
from tiny_manifest import write_files

from edgeprune.calibration_entry import BucketEntry, CalibrationEntry, DistributionEntry, SegmentBucketsEntry
from edgeprune.errors import BundleError
from edgeprune.manifest import Manifest, manifest_from_json, manifest_to_json


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    """One site between two segments."""
    return write_files(tmp_path)


@pytest.fixture
def entry(manifest) -> CalibrationEntry:
    """Two prompts."""
    context = manifest.geometry.context_length
    ranges = [(1, 4, 6), (7, 9, context)]
    return calibration_of(manifest, [[4, 2]], {"segment0": ranges, "segment1": ranges})


def test_round_trip(manifest, entry, tmp_path):
    calibrated = replace(manifest, calibration=entry)
    path = tmp_path / "other.json"
    path.write_text(manifest_to_json(calibrated), encoding="utf-8")
    assert manifest_from_json(path) == calibrated


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samples", "2", "calibration.samples is"),
        ("samples", 0, "does not cover its own longest prompt"),
        ("max_sequence", 17, "does not cover its own longest prompt"),
        ("cost", "guess", "unknown cost 'guess'"),
        ("fallback", "hope", "fallback 'hope'"),
        ("keep_per_image", {}, "does not fit its segments and sites"),
        ("sequence_lengths", {}, "does not fit its segments and sites"),
        ("tiles", {"values": [1], "counts": [1], "mean": 1.0, "max": 1}, "lacks the field 'quantiles'"),
        ("surprise", 1, "unknown field 'surprise'"),
    ],
)
def test_what_contradicts_itself_is_refused(manifest, entry, tmp_path, field, value, message):
    data = json.loads(manifest_to_json(replace(manifest, calibration=entry)))
    data["calibration"][field] = value
    path = tmp_path / "other.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message) as caught:
        manifest_from_json(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "counts", "most"),
    [
        ((), (), 0),
        ((1, 2), (1,), 2),
        ((2, 1), (1, 1), 1),
        ((1, 1), (1, 1), 1),
        ((1, 2), (1, 0), 2),
        ((1, 2), (1, 1), 3),
    ],
)
def test_a_broken_histogram(values, counts, most):
    with pytest.raises(BundleError, match="broken histogram"):
        DistributionEntry(values, counts, 1.0, most, {})


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_a_broken_bucket(sizes):
    with pytest.raises(BundleError, match="broken bucket"):
        BucketEntry(*sizes, prompts=1)


@pytest.mark.parametrize(
    ("allowed", "ranges"),
    [
        (2, []),
        (1, [(1, 1, 1), (2, 2, 2)]),
        (2, [(2, 2, 2)]),
        (2, [(1, 1, 1), (3, 3, 3)]),
        (2, [(1, 1, 2), (2, 2, 3)]),
    ],
)
def test_buckets_with_gaps_or_overlaps_or_too_many(allowed, ranges):
    with pytest.raises(BundleError, match="gaps or more than allowed"):
        SegmentBucketsEntry(allowed, tuple(BucketEntry(*sizes, prompts=0) for sizes in ranges), 0.0)
