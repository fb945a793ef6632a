"""Optimization profiles: every dimension of every graph has a range, and what a range must hold it holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from calibrations import TEXT, calibration_of

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.inspection import TEXT_TOKENS
from edgeprune.manifest import Manifest
from edgeprune.runtimes.engine_profiles import (
    DECODE,
    ONE,
    PREFILL,
    SPLIT,
    WHOLE,
    Limits,
    dynamic_dimensions,
    parse_profile_file,
    profiles,
)

BUNDLES = (
    "atp_bundle",
    "ivtp_bundle",
    "combined_bundle",
    "sparsevlm_bundle",
    "dyrate_bundle",
    "unpruned_bundle",
)


@pytest.fixture
def atp(atp_bundle: Path) -> Manifest:
    """Three sites whose counts depend on the picture; 36 visual tokens, a context of 512."""
    return Bundle.open(atp_bundle).manifest


@pytest.fixture
def combined(combined_bundle: Path) -> Manifest:
    """AdaptPrune keeps 18 of 36 before layer 1, PyramidDrop then shares of 36."""
    return Bundle.open(combined_bundle).manifest


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("strategy", [ONE, SPLIT])
def test_every_dynamic_dimension_of_every_graph_has_a_range(bundle, strategy, request):
    manifest = Bundle.open(request.getfixturevalue(bundle)).manifest
    found = profiles(manifest, Limits.of(manifest), strategy)
    assert set(found) == set(manifest.graphs)
    for name, entries in found.items():
        for entry in entries:
            assert set(entry.ranges) == set(dynamic_dimensions(manifest.graphs[name]))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_what_a_session_feeds_lies_inside(bundle, request):
    """Prompts with no picture to as many as fit, and decoding up to the context."""
    manifest = Bundle.open(request.getfixturevalue(bundle)).manifest
    context, limits = manifest.geometry.context_length, Limits.of(manifest)
    for strategy in (ONE, SPLIT):
        found = profiles(manifest, limits, strategy)
        for segment in manifest.segments:
            if not segment.layers:
                continue
            for sequence, past in ((1, 0), (7, 0), (context, 0), (1, 1), (1, context - 1)):
                assert any(
                    entry.ranges["sequence"][0] <= sequence <= entry.ranges["sequence"][2]
                    and entry.ranges["past"][0] <= past <= entry.ranges["past"][2]
                    for entry in found[segment.graph]
                ), (segment.graph, strategy, sequence, past)


def test_one_profile_is_one(atp):
    assert {entry.name for entries in profiles(atp, Limits.of(atp), ONE).values() for entry in entries} == {
        WHOLE
    }


def test_split_separates_prefill_from_decode(atp):
    found = profiles(atp, Limits.of(atp), SPLIT)
    prefill, decode = found["segment0"]
    assert (prefill.name, decode.name) == (PREFILL, DECODE)
    assert prefill.ranges["sequence"] == (1, 36 + TEXT_TOKENS, 512)
    assert prefill.ranges["past"] == (0, 0, 0)
    assert decode.ranges["sequence"] == (1, 1, 2)
    assert decode.ranges["past"][::2] == (1, 511)
    assert [len(found[name]) for name in ("vision", "site0", "gather")] == [1, 1, 1]


def test_segments_are_tuned_for_the_tokens_that_a_method_leaves(combined):
    found = profiles(combined, Limits.of(combined), SPLIT)
    tuned = [found[segment.graph][0].ranges["sequence"][1] - TEXT_TOKENS for segment in combined.segments]
    # 36, then 18 by count, then 0.3 and 0.1 of 36 by share.
    assert tuned == [36, 18, 10, 3]
    assert found["site0"][0].ranges["num_keep"] == (0, 18, 512)


def test_counts_that_depend_on_the_picture_are_taken_for_half(atp):
    found = profiles(atp, Limits.of(atp), SPLIT)
    tuned = [found[f"segment{index}"][0].ranges["sequence"][1] - TEXT_TOKENS for index in range(4)]
    assert tuned == [36, 18, 9, 4]


BUCKETS = {"segment1": [(1, 38, 40), (41, 44, 50), (51, 55, 512)], "segment2": [(1, 30, 512)]}


@pytest.fixture
def calibrated(atp: Manifest) -> Manifest:
    """Three prompts of 36 visual tokens and 20 of text, of which the sites keep 18, 24 and 35; 8, 10 and 10; 2."""
    kept = [[18, 24, 35], [8, 10, 10], [2, 2, 2]]
    return replace(atp, calibration=calibration_of(atp, kept, BUCKETS))


def test_prefill_has_the_buckets_that_calibration_chose(calibrated):
    found = profiles(calibrated, Limits.of(calibrated), SPLIT)
    assert [entry.name for entry in found["segment1"]] == ["prefill0", "prefill1", "prefill2", "decode"]
    assert [entry.ranges["sequence"] for entry in found["segment1"][:3]] == BUCKETS["segment1"]
    assert {entry.ranges["past"] for entry in found["segment1"][:3]} == {(0, 0, 0)}
    assert [entry.name for entry in found["segment2"]] == ["prefill", "decode"]
    # Without buckets of its own, the calibrated median.
    assert found["segment3"][0].ranges["sequence"] == (1, 2 + TEXT, 512)


def test_everything_else_is_tuned_for_calibrated_medians(calibrated):
    found = profiles(calibrated, Limits.of(calibrated), SPLIT)
    assert found["site1"][0].ranges["sequence"] == (1, 24 + TEXT, 512)
    assert found["site1"][0].ranges["text_rows"][1] == TEXT
    assert found["gather"][0].ranges["kept"] == (1, 24 + TEXT, 512)
    # Half of an answer of 7 tokens.
    assert found["segment1"][-1].ranges["past"] == (1, 24 + TEXT + 4, 511)
    one = profiles(calibrated, Limits.of(calibrated), ONE)
    assert one["segment1"][0].ranges["sequence"] == (1, 24 + TEXT, 512)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (512, BUCKETS["segment1"]),
        (60, [(1, 38, 40), (41, 44, 50), (51, 55, 60)]),
        (52, [(1, 38, 40), (41, 44, 50), (51, 52, 52)]),
        (50, [(1, 38, 40), (41, 44, 50)]),
        (43, [(1, 38, 40), (41, 43, 43)]),
        (37, [(1, 37, 37)]),
    ],
)
def test_a_smaller_limit_at_build_shortens_the_buckets(calibrated, most, expected):
    found = profiles(calibrated, Limits.of(calibrated, 1, most), SPLIT)["segment1"]
    assert [entry.ranges["sequence"] for entry in found[:-1]] == expected
    assert found[-1].name == DECODE


def test_the_cap_of_a_calibration_is_the_limit_of_a_build(atp):
    capped = {name: [(1, 38, 40), (41, 44, 100)] for name in ("segment0", "segment1")}
    calibration = calibration_of(atp, [[18], [8], [2]], capped, max_sequence=100)
    bundle = replace(atp, calibration=calibration)
    assert Limits.of(bundle).sequence == 100
    # A build that wants more gets the last bucket to go on.
    found = profiles(bundle, Limits.of(bundle, sequence=300), SPLIT)["segment1"]
    assert found[1].ranges["sequence"] == (41, 44, 300)


def test_limits_bound_sequence_and_pictures(atp):
    limits = Limits.of(atp, 2, 128)
    whole = profiles(atp, limits, ONE)
    assert whole["segment0"][0].ranges["sequence"] == (1, 100, 128)
    assert whole["vision"][0].ranges["tiles"] == (1, 1, 2)
    assert whole["projector"][0].ranges["patch_rows"] == (36, 36, 72)


@pytest.mark.parametrize(
    ("images", "sequence", "message"),
    [
        (0, None, "--max-images is 0"),
        (None, 513, "--max-sequence 513 exceeds the model's context of 512"),
        (None, 36, "--max-sequence 36 holds no picture of 36 tokens"),
    ],
)
def test_limits_out_of_range(atp, images, sequence, message):
    with pytest.raises(EngineError, match=message):
        Limits.of(atp, images, sequence)


def test_an_unknown_dimension_is_named(atp):
    graph = atp.graphs["gather"]
    odd = replace(graph, inputs=(replace(graph.inputs[0], shape=("frames",)), *graph.inputs[1:]))
    with pytest.raises(EngineError, match="'gather' has a dimension 'frames' without a range"):
        profiles(replace(atp, graphs={**atp.graphs, "gather": odd}), Limits.of(atp), ONE)


def test_a_profile_file(atp, tmp_path):
    file = tmp_path / "profiles.json"
    given = [{"sequence": [1, 80, 100], "past": [0, 0, 0]}, {"sequence": [1, 1, 1]}]
    file.write_text(json.dumps({"segment0": given}))
    found = parse_profile_file(file, atp, Limits.of(atp))
    whole = profiles(atp, Limits.of(atp), ONE)
    first, second = found["segment0"]
    assert first.ranges == {"sequence": (1, 80, 100), "past": (0, 0, 0)}
    assert second.ranges == {"sequence": (1, 1, 1), "past": whole["segment0"][0].ranges["past"]}
    assert {name: entries for name, entries in found.items() if name != "segment0"} == {
        name: entries for name, entries in whole.items() if name != "segment0"
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", "holds no object of graphs"),
        ("{}", "holds no object of graphs"),
        ('{"decoder": [{}]}', "names the graph 'decoder', the bundle has vision"),
        ('{"segment0": {}}', "'segment0' is no list of profiles"),
        ('{"segment0": []}', "'segment0' is no list of profiles"),
        ('{"segment0": [3]}', "is no object of dimensions"),
        ('{"segment0": [{"rows": [1, 1, 1]}]}', "has no dimension 'rows', it has sequence, past"),
        ('{"segment0": [{"sequence": [1, 2]}]}', "expected .least, tuned, greatest."),
        ('{"segment0": [{"sequence": [1, 2.5, 3]}]}', "expected .least, tuned, greatest."),
        ('{"segment0": [{"sequence": [3, 2, 1]}]}', "expected .least, tuned, greatest."),
        ('{"segment0": [{"sequence": [1, 2, 513]}]}', "outside of 1 … 512"),
        ('{"segment0": [{"sequence": [0, 2, 5]}]}', "outside of 1 … 512"),
    ],
)
def test_a_malformed_profile_file(atp, tmp_path, content, message):
    file = tmp_path / "profiles.json"
    file.write_text(content)
    with pytest.raises(EngineError, match=message):
        parse_profile_file(file, atp, Limits.of(atp))
