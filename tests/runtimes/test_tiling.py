"""Tiles and pixels are those of transformers' processor on Pillow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_internvl import IMAGE_TOKEN_ID, MEAN, STD, TinyInternvl, internvl_processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from edgeprune.errors import BundleError, PictureError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.runtimes.preprocessing import ImagePreprocessing
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json, preprocessing_to_json
from edgeprune.runtimes.tiling import TilePreprocessing

SIZES = [(1, 1), (24, 24), (25, 23), (48, 48), (60, 40), (40, 61), (500, 10), (10, 500), (1, 900), (333, 250)]


def tile(side: int = 24, **changes) -> ImagePreprocessing:
    fields = {
        "shortest_edge": None,
        "resize_to": (side, side),
        "resample": "bicubic",
        "center_crop": None,
        "rescale_factor": 1 / 255,
        "mean": MEAN,
        "std": STD,
    }
    return ImagePreprocessing(**{**fields, **changes})


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (1, 12), (3, 6), (2, 2)])
def test_pixels_are_those_of_transformers(least, most):
    ours = TilePreprocessing(tile(), least, most)
    processor = internvl_processor(TinyInternvl(min_patches=least, max_patches=most))
    pictures = [picture(*size) for size in SIZES]
    seen = set()
    for image in pictures:
        prepared = ours.prepare([image], (3, 3))
        theirs = processor(text="<IMG_CONTEXT>", images=[image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(prepared.pixel_values, theirs, rtol=0, atol=1e-5)
        assert len(prepared.layout.grids) == len(theirs)
        seen.add(len(theirs))
    assert len(seen) > 1 or most < 3
    prepared = ours.prepare(pictures, (3, 3))
    text = "<IMG_CONTEXT>" * len(pictures)
    theirs = processor(text=text, images=pictures, return_tensors="np")
    np.testing.assert_allclose(prepared.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-5)
    assert sum(prepared.layout.tokens_per_image) == (theirs["input_ids"] == IMAGE_TOKEN_ID).sum()


def test_pixels_of_a_real_size_and_of_other_modes():
    ours = TilePreprocessing(tile(448), 1, 12)
    processor = internvl_processor(TinyInternvl(image_size=448, max_patches=12))
    drawn = check_pictures(1, size=(1200, 901))[0]
    clear = drawn.copy()
    clear.putalpha(Image.linear_gradient("L").resize(drawn.size))
    for image in (drawn, clear, drawn.convert("L"), drawn.convert("P")):
        theirs = processor(text="<IMG_CONTEXT>", images=[image], return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(ours.prepare([image], (16, 16)).pixel_values, theirs, rtol=0, atol=1e-5)
    assert len(theirs) == 13


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    least=st.integers(1, 12),
    more=st.integers(0, 30),
)
def test_tiles_are_those_of_transformers(width, height, least, more):
    expected = get_optimal_tiled_canvas((height, width), (448, 448), least, least + more)
    rows, columns = TilePreprocessing(tile(448), least, least + more).tiles_of(width, height)
    assert (columns, rows) == expected


@pytest.mark.parametrize("side", [24, 448])
def test_equally_near_tiles_are_chosen_by_the_pictures_size(side):
    """Squares and ratios in the middle between two: where the order and the half count."""
    for most in (6, 12):
        ours, found = TilePreprocessing(tile(side), 1, most), set()
        for ratio in (1, 1.5, 2, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5):
            for height in range(4, 4 * side, max(1, side // 12)):
                width = round(height * ratio)
                rows, columns = ours.tiles_of(width, height)
                assert (columns, rows) == get_optimal_tiled_canvas((height, width), (side, side), 1, most)
                found.add((rows, columns))
        assert {(1, 1), (2, 2)} <= found


def test_layout_says_where_tiles_lie():
    layout = TilePreprocessing(tile(), 1, 6).prepare([picture(90, 60), picture(20, 20)], (3, 3)).layout
    boxes = [(grid.image, grid.box, grid.overview) for grid in layout.grids]
    assert boxes == [
        (0, (0, 0, 30, 30), False),
        (0, (30, 0, 60, 30), False),
        (0, (60, 0, 90, 30), False),
        (0, (0, 30, 30, 60), False),
        (0, (30, 30, 60, 60), False),
        (0, (60, 30, 90, 60), False),
        (0, (0, 0, 90, 60), True),
        (1, (0, 0, 20, 20), False),
    ]
    assert layout.tokens_per_image == (63, 9)
    assert layout.places[9 + 5].tolist() == [1, 1, 2]


def test_json_round_trip():
    ours = TilePreprocessing(tile(), 2, 7)
    data = preprocessing_to_json(ours)
    assert data["kind"] == "tiles"
    assert preprocessing_from_json(data) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tiles": 0}, "min_tiles must be a positive integer, not 0"),
        ({"max_tiles": True}, "max_tiles must be a positive integer, not True"),
        ({"min_tiles": 8}, "min_tiles must be at most max_tiles, 7, not 8"),
        ({"max_tiles": 10**6}, "pixels"),
        ({"other": 1}, "unknown or lacks fields other"),
        ({"tile": 3}, "must be an object"),
        (
            {"tile": tile(resize_to=None, shortest_edge=24, center_crop=(24, 24)).to_json()},
            "must have resize_to",
        ),
    ],
)
def test_unusable_settings_are_refused(changes, message):
    data = {**TilePreprocessing(tile(), 2, 7).to_json(), **changes}
    with pytest.raises(BundleError, match="preprocessing") as error:
        TilePreprocessing.from_json(data)
    assert message in str(error.value)


def test_a_picture_that_is_not_rgb_is_refused_if_it_must_be():
    with pytest.raises(PictureError, match="not RGB"):
        TilePreprocessing(tile(convert_rgb=False), 1, 4).prepare([picture(9, 9).convert("L")], (3, 3))
