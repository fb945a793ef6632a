import pytest

from edgeprune.errors import PruningError
from edgeprune.numbering import (
    ORIGINAL,
    RENUMBERED,
    RENUMBERED_PREFILL,
    next_position,
    segment_numberings,
)


def test_a_site_that_leaves_positions_leaves_them_as_an_earlier_one_made_them():
    assert segment_numberings([]) == (ORIGINAL,)
    assert segment_numberings([ORIGINAL, RENUMBERED, ORIGINAL, RENUMBERED_PREFILL]) == (
        ORIGINAL,
        ORIGINAL,
        RENUMBERED,
        RENUMBERED,
        RENUMBERED_PREFILL,
    )


def test_position_of_a_generated_token():
    assert [
        next_position(numbering, 600, 80) for numbering in (ORIGINAL, RENUMBERED, RENUMBERED_PREFILL)
    ] == [600, 80, 600]


def test_unknown_numbering():
    with pytest.raises(PruningError, match="unknown numbering of positions 'mrope', known: original, "):
        segment_numberings(["mrope"])
