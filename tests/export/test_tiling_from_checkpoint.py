"""Settings of InternVL's image processor, as transformers saves them and as they are published."""

import json

import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from edgeprune.errors import CheckpointError
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint

# preprocessor_config.json of the published checkpoints.
PUBLISHED = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 448, "width": 448},
}


def write(folder, settings, side=448, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(settings))
    config = {"model_type": "internvl", "vision_config": {"image_size": [side, side]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_published_settings_cut_pictures_into_tiles(tmp_path):
    read = picture_preprocessing_from_checkpoint(write(tmp_path, PUBLISHED), "internvl")
    assert read.prepare([Image.new("RGB", (800, 600))], (16, 16)).pixel_values.shape == (13, 3, 448, 448)


def test_saved_and_nested_settings(tmp_path):
    GotOcr2ImageProcessorPil(
        size={"height": 24, "width": 24}, max_patches=5, min_patches=2, resample=2, image_mean=0.5
    ).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    flat = picture_preprocessing_from_checkpoint(write(tmp_path, saved, 24), "internvl")
    assert (flat.min_tiles, flat.max_tiles, flat.tile.resample) == (2, 5, "bilinear")
    assert (flat.tile.resize_to, flat.tile.mean) == ((24, 24), (0.5, 0.5, 0.5))
    nested = write(tmp_path, {"image_processor": saved}, 24, "processor_config.json")
    write(nested, {**saved, "max_patches": 9}, 24)
    assert picture_preprocessing_from_checkpoint(nested, "internvl") == flat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "use one of GotOcr2ImageProcessor"),
        ({"size": {"height": 336, "width": 336}}, "supported: height and width 448"),
        ({"size": {"height": 448, "width": 224}}, "supported: height and width 448"),
        ({"size": {"shortest_edge": 448}, "do_center_crop": True, "crop_size": 448}, "without a crop"),
        ({"do_resize": False}, "sets do_resize to false"),
        ({"max_patches": 0}, "max_tiles must be a positive integer"),
        ({"min_patches": 13}, "min_tiles must be at most max_tiles"),
        ({"resample": 9}, "has resample 9"),
        ({"do_pad": True}, "sets do_pad to True, which is not supported"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError) as error:
        picture_preprocessing_from_checkpoint(write(tmp_path, {**PUBLISHED, **changes}), "internvl")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
