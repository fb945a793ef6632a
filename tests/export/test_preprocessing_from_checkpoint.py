"""Settings of image processors, as transformers saves them, give transformers' pixels."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

from edgeprune.errors import CheckpointError
from edgeprune.export.crop_settings import image_preprocessing_from_checkpoint

OPTIONS = {
    "defaults": {},
    "llava": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "stretch": {"size": {"height": 40, "width": 50}, "do_center_crop": False, "resample": 2},
    "stretch and crop": {"size": {"height": 40, "width": 50}, "crop_size": {"height": 32, "width": 60}},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "own factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
}


def write(folder, name, settings):
    (folder / name).write_text(json.dumps(settings))
    return folder


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    return Image.fromarray(values)


def assert_same_pixels(folder):
    theirs = AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="np")["pixel_values"]
    ours = image_preprocessing_from_checkpoint(folder)([picture()])
    np.testing.assert_allclose(ours, theirs.astype(np.float32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_processor(options, tmp_path):
    CLIPImageProcessor(**options).save_pretrained(tmp_path)
    assert_same_pixels(tmp_path)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nested_settings_win(options, tmp_path):
    settings = {**CLIPImageProcessor(**options).to_dict(), "image_processor_type": "CLIPImageProcessor"}
    write(
        tmp_path, "processor_config.json", {"processor_class": "LlavaProcessor", "image_processor": settings}
    )
    write(tmp_path, "preprocessor_config.json", {**settings, "size": {"height": 9, "width": 9}})
    assert_same_pixels(tmp_path)


def test_processor_config_without_nested_settings(tmp_path):
    write(tmp_path, "processor_config.json", {"processor_class": "LlavaProcessor", "patch_size": 14})
    CLIPImageProcessor().save_pretrained(tmp_path)
    assert_same_pixels(tmp_path)


@pytest.mark.parametrize(
    "class_name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"]
)
def test_class_names(class_name, tmp_path):
    write(tmp_path, "preprocessor_config.json", {"image_processor_type": class_name})
    assert image_preprocessing_from_checkpoint(tmp_path).input_size == (224, 224)


def test_settings_of_old_checkpoints(tmp_path):
    """Sizes were numbers, and the class a feature extractor."""
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 20, "resample": 3}
    write(tmp_path, "preprocessor_config.json", old)
    ours = image_preprocessing_from_checkpoint(tmp_path)
    assert (ours.shortest_edge, ours.center_crop) == (30, (20, 20))
    theirs = CLIPImageProcessor(size=30, crop_size=20)(picture(), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours([picture()]), theirs, rtol=0, atol=1e-5)


def test_other_processor(tmp_path):
    SiglipImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="SiglipImageProcessor"):
        image_preprocessing_from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_processor_type": None}, "None"),
        ({"do_pad": True}, "do_pad"),
        ({"image_grid_pinpoints": [[1, 2]]}, "image_grid_pinpoints"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"longest_edge": 8}}, "longest_edge"),
        ({"size": {"shortest_edge": 8, "longest_edge": 9}}, "longest_edge"),
        ({"size": {"shortest_edge": -8}}, "shortest_edge"),
        ({"do_center_crop": False}, "center_crop"),
        ({"crop_size": {"height": 8}}, "width"),
        ({"resample": 17}, "resample"),
        ({"rescale_factor": "x"}, "rescale_factor"),
        ({"image_mean": [0.5]}, "mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "std"),
    ],
)
def test_unsupported_settings(change, named, tmp_path):
    write(tmp_path, "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **change})
    with pytest.raises(CheckpointError, match=named):
        image_preprocessing_from_checkpoint(tmp_path)


def test_no_settings(tmp_path):
    with pytest.raises(CheckpointError, match="save_pretrained"):
        image_preprocessing_from_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\udc80"])
def test_damaged_settings(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="JSON"):
        image_preprocessing_from_checkpoint(tmp_path)
