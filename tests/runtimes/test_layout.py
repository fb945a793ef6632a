from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import tensor_names as names
from edgeprune.errors import PromptError
from edgeprune.runtimes.layout import SequenceLayout
from edgeprune.visual_layout import VisualGrid, VisualLayout

IMAGE = 7


class Counts(NamedTuple):
    """What a site knows beforehand."""

    keep_per_image: int | None = None
    keep_share: float | None = None
    recycled_per_image: int = 0
    merged_per_image: int = 0


def pictures(*sizes):
    """Pictures of one row of so many tokens each."""
    grids = [VisualGrid(image, 1, size, (0, 0, 1, 1)) for image, size in enumerate(sizes)]
    return VisualLayout.of_whole_grids(grids)


def layout_of(*ids, sizes=None):
    visual = pictures(*(ids.count(IMAGE),) if sizes is None else sizes)
    return SequenceLayout.from_token_ids(np.array(ids, np.int64), IMAGE, visual)


def test_rows_of_one_picture():
    layout = layout_of(1, 2, IMAGE, IMAGE, IMAGE, 3, 4)
    assert (layout.num_rows, layout.num_text_rows, layout.num_visual, layout.num_prompt_rows) == (7, 2, 3, 7)
    assert layout.num_images == 1
    assert layout.host_input(names.TEXT_ROWS).tolist() == [5, 6]
    assert layout.host_input(names.CONTEXT_ROWS).tolist() == [0, 1, 2, 3, 4]
    assert layout.host_input(names.GRID_IDS).tolist() == [0]
    assert layout.host_input(names.VISUAL_PLACES).tolist() == [[0, 0, column, 1, 3] for column in range(3)]
    num_keep = layout.host_input(names.NUM_KEEP, Counts(2))
    assert (num_keep.shape, int(num_keep)) == ((), 2)


def test_text_between_pictures_is_context():
    layout = layout_of(IMAGE, IMAGE, 5, 5, IMAGE, IMAGE, 6, sizes=(2, 2))
    assert layout.host_input(names.TEXT_ROWS).tolist() == [6]
    assert layout.host_input(names.CONTEXT_ROWS).tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.host_input(names.GRID_IDS).tolist() == [0, 1]
    assert int(layout.host_input(names.NUM_KEEP, Counts(2))) == 4


def test_merging_counts_for_all_pictures():
    layout = layout_of(IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 6, 6, sizes=(3, 3))
    site = Counts(keep_per_image=2, recycled_per_image=2, merged_per_image=1)
    assert int(layout.host_input(names.NUM_KEEP, site)) == 2
    assert layout.host_input(names.RECYCLED_IDS, site).tolist() == [0, 1, 2, 3]
    assert layout.host_input(names.MERGED_IDS, site).tolist() == [0, 1]
    after = layout.keep(6)
    assert (after.num_visual, after.host_input(names.TEXT_ROWS).tolist()) == (4, [4, 5])
    assert after.host_input(names.PROMPT_TEXT_ROWS).tolist() == [6, 7]


def test_text_alone():
    layout = SequenceLayout.from_token_ids(np.array([1, 2, 3]), IMAGE, None)
    assert layout == SequenceLayout(3, 3, 0, 3, None)
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
    visual_layout = pictures(len(visual))
    before = SequenceLayout.from_token_ids(ids, IMAGE, visual_layout)
    after = before.keep(len(rows))
    shorter = SequenceLayout.from_token_ids(ids[rows], IMAGE, visual_layout)
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


@pytest.mark.parametrize(
    ("site", "sizes", "left"),
    [
        (Counts(keep_per_image=2), (3, 3), 4),
        (Counts(keep_per_image=5), (3, 3), 6),  # no more than there are
        (Counts(keep_share=0.5), (5, 2), 3),
        (Counts(keep_share=0.1), (5, 2), 2),  # at least one of each picture
        (Counts(keep_share=0.29), (100,), 29),
        (Counts(keep_per_image=0), (3, 3), 0),
        (Counts(), (3, 3), None),
    ],
)
def test_tokens_that_leave_a_site(site, sizes, left):
    layout = layout_of(*[IMAGE] * sum(sizes), 1, sizes=sizes)
    assert layout.visual_tokens_behind(site) == left
