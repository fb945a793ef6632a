"""Optimization profiles: every dimension of every graph has a range, and what a range must hold it holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

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


def test_calibration_tunes_and_adds_a_profile(atp):
    counts = {
        f"site{index}": {"mean": mean, "max": most} for index, (mean, most) in enumerate(((20, 30), (8, 12)))
    }
    calibrated = replace(atp, calibration={"keep_per_image": counts})
    found = profiles(calibrated, Limits.of(atp), SPLIT)["segment1"]
    assert [entry.name for entry in found] == ["prefill0", "prefill1", "decode"]
    typical, rest, _ = found
    assert typical.ranges["sequence"] == (1, 20 + TEXT_TOKENS, 30 + TEXT_TOKENS)
    assert rest.ranges["sequence"] == (1, 30 + TEXT_TOKENS, 512)
    # A segment behind a site without statistics has one.
    assert len(profiles(calibrated, Limits.of(atp), SPLIT)["segment3"]) == 2


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
