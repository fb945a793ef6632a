from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import tensor_names as names
from edgeprune.errors import PromptError
from edgeprune.runtimes.layout import SequenceLayout

IMAGE = 7


class Counts(NamedTuple):
    """What a site knows beforehand."""

    keep_per_image: int
    recycled_per_image: int = 0
    merged_per_image: int = 0


def layout_of(*ids, num_images=1):
    return SequenceLayout.from_token_ids(np.array(ids, np.int64), IMAGE, num_images)


def test_rows_of_one_picture():
    layout = layout_of(1, 2, IMAGE, IMAGE, IMAGE, 3, 4)
    assert layout == SequenceLayout(
        num_rows=7, num_text_rows=2, num_images=1, num_visual=3, num_prompt_rows=7
    )
    assert layout.host_input(names.TEXT_ROWS).tolist() == [5, 6]
    assert layout.host_input(names.CONTEXT_ROWS).tolist() == [0, 1, 2, 3, 4]
    assert layout.host_input(names.IMAGE_IDS).tolist() == [0]
    num_keep = layout.host_input(names.NUM_KEEP, Counts(2))
    assert (num_keep.shape, int(num_keep)) == ((), 2)


def test_text_between_pictures_is_context():
    layout = layout_of(IMAGE, IMAGE, 5, 5, IMAGE, IMAGE, 6, num_images=2)
    assert layout.host_input(names.TEXT_ROWS).tolist() == [6]
    assert layout.host_input(names.CONTEXT_ROWS).tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.host_input(names.IMAGE_IDS).tolist() == [0, 1]
    assert int(layout.host_input(names.NUM_KEEP, Counts(2))) == 4


def test_merging_counts_for_all_pictures():
    layout = layout_of(IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 6, 6, num_images=2)
    site = Counts(keep_per_image=2, recycled_per_image=2, merged_per_image=1)
    assert int(layout.host_input(names.NUM_KEEP, site)) == 2
    assert layout.host_input(names.RECYCLED_IDS, site).tolist() == [0, 1, 2, 3]
    assert layout.host_input(names.MERGED_IDS, site).tolist() == [0, 1]
    after = layout.keep(6)
    assert (after.num_visual, after.host_input(names.TEXT_ROWS).tolist()) == (4, [4, 5])
    assert after.host_input(names.PROMPT_TEXT_ROWS).tolist() == [6, 7]


def test_text_alone():
    layout = layout_of(1, 2, 3, num_images=0)
    assert layout == SequenceLayout(3, 3, 0, 0, 3)
    assert layout.host_input(names.TEXT_ROWS).tolist() == [0, 1, 2]
    assert layout.host_input(names.CONTEXT_ROWS).tolist() == []


def test_picture_at_the_end():
    with pytest.raises(PromptError, match="ends with a picture"):
        layout_of(1, IMAGE, IMAGE)


@pytest.mark.parametrize("name", [names.HIDDEN_STATES, names.NUM_KEEP, "other"])
def test_tensors_that_the_host_does_not_give(name):
    with pytest.raises(KeyError, match=name):
        layout_of(1, IMAGE, 2).host_input(name)


@given(st.data())
@settings(deadline=None)
def test_dropping_visual_tokens_leaves_the_layout_of_the_shorter_sequence(data):
    """What ``keep`` computes is what the ids of the kept rows say, as long as a visual token survives."""
    drawn = data.draw(st.lists(st.sampled_from([1, 2, IMAGE]), min_size=1, max_size=12))
    ids = np.array([*drawn, 3], np.int64)
    visual = np.flatnonzero(ids == IMAGE)
    if not visual.size:
        ids, visual = np.append([IMAGE], ids), np.array([0])
    # The last visual token may be dropped: the text after it stays the text rows.
    kept = data.draw(st.sets(st.sampled_from(visual.tolist()), min_size=1)) | {int(visual[-1])}
    rows = [row for row in range(len(ids)) if ids[row] != IMAGE or row in kept]
    before = SequenceLayout.from_token_ids(ids, IMAGE, 1)
    after = before.keep(len(rows))
    shorter = SequenceLayout.from_token_ids(ids[rows], IMAGE, 1)
    assert after == replace(shorter, num_prompt_rows=len(ids))
    text = before.host_input(names.TEXT_ROWS)
    assert ids[rows][after.host_input(names.TEXT_ROWS)].tolist() == ids[text].tolist()
    for layout in (before, after):
        parts = [layout.host_input(name) for name in (names.CONTEXT_ROWS, names.TEXT_ROWS)]
        assert np.concatenate(parts).tolist() == list(range(layout.num_rows))


def test_dropping_the_last_visual_token_keeps_the_text_rows():
    after = layout_of(1, IMAGE, 5, IMAGE, 2, 3).keep(5)
    assert after.host_input(names.TEXT_ROWS).tolist() == [3, 4]
    assert after.host_input(names.CONTEXT_ROWS).tolist() == [0, 1, 2]
    assert after.num_visual == 1
