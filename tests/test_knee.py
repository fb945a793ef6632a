"""How far pruning pays on a device."""

from dataclasses import replace

import pytest

from edgeprune.errors import TargetError
from edgeprune.inspection import inspect
from edgeprune.knee import SegmentKnee, TargetKnee, find_knee, knee_sentence

KNEE = TargetKnee("orin", "An Orin", "fp16", 208.0, 52.0, "fixed", ())


def test_the_segments_of_a_bundle(random_bundle):
    knee = find_knee(inspect(random_bundle), "agx-orin-64")
    assert (round(knee.tokens), round(knee.int4_tokens), knee.precision) == (208, 52, "fp16")
    # 9 of 36 tokens stay, behind the tower; with 64 rows of text that is far below the knee.
    (segment,) = knee.segments
    assert (segment.rows, segment.reads_weights_only) == (73, True)


def test_the_sentence_names_the_segments_below():
    knee = replace(KNEE, segments=(SegmentKnee("segment0", 640, False), SegmentKnee("segment1", 126, True)))
    line = knee_sentence(knee)
    assert "\n" not in line
    assert line.endswith("Below: segment1 (126 rows); int4 weights pay more there, down to 52 tokens.")


def test_the_sentence_of_bounds_says_at_most():
    knee = replace(KNEE, counts="unpruned bound", segments=(SegmentKnee("segment0", 126, True),))
    assert "segment0 (at most 126 rows)" in knee_sentence(knee)


def test_the_sentence_where_pruning_pays_everywhere():
    line = knee_sentence(replace(KNEE, segments=(SegmentKnee("segment0", 640, False),)))
    assert line.endswith("No segment is there (640 rows in the last): pruning pays.")


def test_the_sentence_of_bounds_above_the_knee_promises_nothing():
    line = knee_sentence(
        replace(KNEE, counts="unpruned bound", segments=(SegmentKnee("segment0", 640, False),))
    )
    assert "at most 640 rows" in line
    assert "pruning pays" not in line


def test_an_unknown_device(random_bundle):
    with pytest.raises(TargetError, match="'toaster' is unknown"):
        find_knee(inspect(random_bundle), "toaster")
