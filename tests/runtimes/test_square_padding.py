"""Pictures padded to a square give the pixels of transformers' LlavaImageProcessor with padding."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_llava_next import pictures
from transformers import LlavaImageProcessorPil

from edgeprune.errors import BundleError, PictureError
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.runtimes.preprocessing import ImagePreprocessing
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json, preprocessing_to_json
from edgeprune.runtimes.square_padding import SquarePadding

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CROP = ImagePreprocessing(28, None, "bicubic", (28, 28), 1 / 255, MEAN, STD)
PADDING = SquarePadding(CROP, (122, 116, 104))


def test_pixels_are_those_of_transformers():
    theirs = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    images = pictures([(64, 48), (33, 100), (28, 28), (1, 9), (7, 5)])
    expected = theirs(images, return_tensors="np")["pixel_values"]
    assert np.abs(PADDING.prepare(images, (7, 7)).pixel_values - expected).max() <= 1e-5
    # Padding does something.
    assert np.abs(CROP.prepare(images, (7, 7)).pixel_values - expected).max() > 0.1


@pytest.mark.parametrize("options", [{}, {"do_pad": True}, {"do_pad": True, "do_normalize": False}])
def test_the_processor_of_a_checkpoint_is_read(tmp_path, options):
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    theirs = LlavaImageProcessorPil(**sizes, **options)
    theirs.save_pretrained(tmp_path)
    ours = picture_preprocessing_from_checkpoint(tmp_path, "llava")
    images = pictures([(64, 48), (33, 100)])
    expected = theirs(images, return_tensors="np")["pixel_values"]
    assert np.abs(ours.prepare(images, (7, 7)).pixel_values - expected).max() <= 1e-5
    assert isinstance(ours, SquarePadding) == bool(options)


def test_grids_lie_on_the_square():
    layout = PADDING.prepare(pictures([(64, 48), (33, 100)]), (7, 7)).layout
    assert [(grid.image, grid.rows, grid.columns) for grid in layout.grids] == [(0, 7, 7), (1, 7, 7)]
    assert layout.grids[0].box == pytest.approx((0, -8, 64, 56))
    assert layout.grids[1].box == pytest.approx((-33, 0, 67, 100))
    assert layout.tokens_per_image == (49, 49)


def test_json_round_trip():
    data = json.loads(json.dumps(preprocessing_to_json(PADDING)))
    assert data["kind"] == "pad"
    assert preprocessing_from_json(data) == PADDING


@pytest.mark.parametrize("fill", [[1, 2], [1, 2, 256], [1.5, 2, 3], "grey", [True, 1, 1]])
def test_invalid_fill_is_refused(fill):
    with pytest.raises(BundleError, match="three numbers from 0 to 255"):
        preprocessing_from_json({**preprocessing_to_json(PADDING), "fill": fill})


def test_a_picture_too_long_is_refused():
    with pytest.raises(PictureError, match="too long to be padded"):
        PADDING.prepare([Image.new("RGB", (20000, 1))], (7, 7))
