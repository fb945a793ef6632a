"""Where visual tokens stand, and which rows of a tower's output enter the decoder."""

import numpy as np
import pytest

from edgeprune.errors import PromptError
from edgeprune.positions import MULTIMODAL, SEQUENTIAL, prompt_positions
from edgeprune.visual_layout import VisualGrid, VisualLayout

BOX = (0.0, 0.0, 1.0, 1.0)


def whole(*sizes, images=None):
    images = range(len(sizes)) if images is None else images
    return VisualLayout.of_whole_grids(
        [VisualGrid(image, *size, BOX) for image, size in zip(images, sizes, strict=True)]
    )


def padded_with_newlines():
    """One picture of two tiles of 2 × 2: a whole one, and one whose lower row is padding, with a newline behind it."""
    grids = (VisualGrid(0, 2, 2, BOX, overview=True), VisualGrid(0, 1, 3, BOX))
    places = [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 0, 1),
        (-1, 0, 0),
        (-1, 0, 0),
        (1, 0, 2),
    ]
    return VisualLayout(grids, np.array(places), np.array([0, 1, 2, 3, 4, 5, 8]), inserted=1)


def test_whole_grids():
    layout = whole((1, 2), (2, 2))
    assert layout.places.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert layout.table[:, 3:].tolist() == [[1, 2]] * 2 + [[2, 2]] * 4
    assert (layout.num_images, layout.tokens_per_image) == (2, (2, 4))
    assert whole().num_images == 0


def test_tiles_of_one_picture_count_together():
    layout = whole((2, 2), (2, 2), (1, 3), images=[0, 0, 1])
    assert (layout.num_images, layout.tokens_per_image) == (2, (8, 3))


def test_rows_of_an_unpruned_tower():
    rows = whole((1, 2), (2, 2)).rows_beforehand(None, 4)
    assert (rows.rows.tolist(), rows.tokens_per_image) == ([0, 1, 2, 3, 4, 5], (2, 4))
    rows = padded_with_newlines().rows_beforehand(None, 4)
    assert (rows.rows.tolist(), rows.tokens_per_image) == ([0, 1, 2, 3, 4, 5, -9], (7,))


def test_rows_of_a_tower_that_leaves_the_same_number_of_every_tile():
    layout = whole((2, 2), (2, 2), (2, 2), images=[0, 0, 1])
    rows = layout.rows_beforehand(3, 4)
    assert (rows.rows.tolist(), rows.tokens_per_image) == (list(range(9)), (6, 3))
    assert padded_with_newlines().rows_beforehand(3, 4) is None


def test_rows_of_a_tower_that_leaves_what_it_likes():
    layout = whole((2, 2), (2, 2))
    # Merged tokens need not stand in the order of the picture; their order is kept.
    slots = np.array([3, 0, 1, 6, 4, 5])
    rows = layout.rows_of(slots, np.array([2, 1]))
    assert (rows.rows.tolist(), rows.tokens_per_image) == ([0, 1, 3], (2, 1))
    rows = layout.rows_of(slots, None)
    assert (rows.rows.tolist(), rows.tokens_per_image) == ([0, 1, 2, 3, 4, 5], (3, 3))


def test_rows_behind_padding_and_newlines():
    # Kept: three of the whole tile, out of order; of the other one a visible and two padded ones.
    slots = np.array([2, 0, 3, 7, 4, 6])
    rows = padded_with_newlines().rows_of(slots, None)
    assert (rows.rows.tolist(), rows.tokens_per_image) == ([1, 0, 2, 4, -9], (5,))


def test_sequential_positions():
    ids = np.array([1, 9, 9, 2, 3])
    assert prompt_positions(SEQUENTIAL, ids == 9, whole((1, 2))).tolist() == [[0, 1, 2, 3, 4]]
    assert prompt_positions(SEQUENTIAL, ids == 8, None).tolist() == [[0, 1, 2, 3, 4]]


def test_multimodal_positions():
    """Qwen2-VL, §2.1: text, a picture of 2 × 3 tokens, text, one of 1 × 1, text."""
    is_visual = np.array([False] * 2 + [True] * 6 + [False] * 2 + [True] + [False] * 2)
    positions = prompt_positions(MULTIMODAL, is_visual, whole((2, 3), (1, 1)))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert prompt_positions(MULTIMODAL, np.zeros(2, bool), None).tolist() == [[0, 1]] * 3


def test_multimodal_positions_of_too_few_tokens():
    with pytest.raises(PromptError, match="holds 1 visual tokens, its pictures 6"):
        prompt_positions(MULTIMODAL, np.array([True, False]), whole((2, 3)))
