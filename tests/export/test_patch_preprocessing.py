"""Qwen2-VL's image processor settings, as transformers saves them, give transformers' patches."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen import picture
from transformers import AutoImageProcessor, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from edgeprune.errors import BundleError, CheckpointError, PictureError
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.runtimes.flat_patches import PatchPreprocessing
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json, preprocessing_to_json
from edgeprune.tensor_names import PATCH_POSITIONS, PICTURE_ROWS, WINDOW_ROWS

OPTIONS = {
    "defaults": {},
    "small": {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 6}},
    "bilinear, one mean": {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "no rescale": {"do_rescale": False},
    "no normalize": {"do_normalize": False},
    "other patches": {"patch_size": 4, "merge_size": 3, "temporal_patch_size": 1, "min_pixels": 600},
    "limits by name": {"min_pixels": 4 * 784, "max_pixels": 8 * 784},
}
# Width and height: smaller than a patch, halves of a token's side, wide, tall, beyond the largest.
SIZES = [(5, 3), (28, 28), (42, 70), (14, 98), (300, 8), (9, 250), (83, 61), (1400, 1000)]
DEFAULTS = PatchPreprocessing(
    min_pixels=3136,
    max_pixels=12845056,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_tokens=4,
    resample="bicubic",
    rescale_factor=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def write_config(folder, model_type="qwen2_vl", **options):
    vision = {
        "patch_size": options.get("patch_size", 14),
        "temporal_patch_size": options.get("temporal_patch_size", 2),
        "spatial_merge_size": options.get("merge_size", 2),
    }
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vision_config": vision}))
    return folder


def read(folder, model_type="qwen2_vl"):
    return picture_preprocessing_from_checkpoint(folder, model_type)


def assert_same_patches(folder, sizes):
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    theirs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="np")
    ours = read(folder).prepare(images, (16, 16))
    np.testing.assert_allclose(ours.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-5)
    merge = read(folder).merge_size
    grids = [(1, merge * grid.rows, merge * grid.columns) for grid in ours.layout.grids]
    assert grids == [tuple(row) for row in theirs["image_grid_thw"].tolist()]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_processor(options, tmp_path):
    Qwen2VLImageProcessorPil(**options).save_pretrained(write_config(tmp_path, **options))
    assert_same_patches(tmp_path, SIZES)


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 3136, "max_pixels": 9408},
        {"size": {"min_pixels": 3136, "max_pixels": 9408}, "min_pixels": 3136, "max_pixels": 9408},
        {"size": {"shortest_edge": 3136, "longest_edge": 9408}},
    ],
)
def test_published_settings(limits, tmp_path):
    """preprocessor_config.json as it was written over the years."""
    published = {
        **limits,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    (write_config(tmp_path) / "preprocessor_config.json").write_text(json.dumps(published))
    assert (read(tmp_path).min_pixels, read(tmp_path).max_pixels) == (3136, 9408)
    assert_same_patches(tmp_path, SIZES)


def test_published_settings_of_qwen3_vl(tmp_path):
    """Other patches, means and limits; the processor is named as torchvision's."""
    vision = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config = {"model_type": "qwen3_vl", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    published = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    found = read(tmp_path, "qwen3_vl")
    assert (found.min_pixels, found.max_pixels) == (256**2, 4096**2)
    assert (found.patch_size, found.factor, found.window_tokens, found.mean) == (16, 32, 0, (0.5, 0.5, 0.5))
    # 640 × 480 pixels: 20 × 15 visual tokens.
    (grid,) = found.prepare([picture(640, 480)], (16, 16)).layout.grids
    assert (grid.rows, grid.columns) == (15, 20)
    # What the configuration leaves out is 16 there, and 14 in the processor.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "vision_config": {}}))
    assert read(tmp_path, "qwen3_vl") == found
    published.pop("patch_size")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    with pytest.raises(
        CheckpointError, match=r"has patch_size 14, config.json's vision_config patch_size 16"
    ):
        read(tmp_path, "qwen3_vl")


def test_transparent_and_grey_pictures(tmp_path):
    Qwen2VLImageProcessorPil().save_pretrained(write_config(tmp_path))
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (60, 40), dtype=np.uint8))
    for image in (rgba, grey, grey.convert("P")):
        theirs = AutoImageProcessor.from_pretrained(tmp_path)([image], return_tensors="np")["pixel_values"]
        ours = read(tmp_path).prepare([image], (16, 16)).pixel_values
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), limit=st.integers(1, 4000))
@settings(deadline=None, max_examples=300)
def test_sizes_are_those_of_transformers(width, height, limit):
    chosen = replace(DEFAULTS, min_pixels=784, max_pixels=784 * limit)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(PictureError, match="longer than 200 times"):
            chosen.resized_size(width, height)
        return
    expected = smart_resize(height, width, 28, chosen.min_pixels, chosen.max_pixels)
    assert chosen.resized_size(width, height) == expected


@given(st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_groups_are_those_of_transformers(tokens, window):
    """Pictures, windows and places of patches, for pictures of any number of tokens."""
    small = replace(DEFAULTS, patch_size=1, min_pixels=1, window_tokens=window, temporal_patch_size=1)
    images = [Image.new("RGB", (2 * columns, 2 * rows)) for rows, columns in tokens]
    inputs = small.prepare(images, (16, 16)).inputs
    grid_thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in tokens])
    np.testing.assert_array_equal(inputs[PATCH_POSITIONS], get_vision_position_ids(grid_thw, 2).numpy())
    ends = get_vision_cu_seqlens(grid_thw).numpy()
    pictures = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    assert groups(inputs[PICTURE_ROWS]) == pictures
    order, ends = get_vision_window_index(grid_thw, 2, window_size=2 * window, patch_size=1)
    patches = (4 * order.numpy()[:, None] + np.arange(4)).ravel()
    windows = [patches[a:b].tolist() for a, b in itertools.pairwise(ends)]
    assert groups(inputs[WINDOW_ROWS]) == windows
    assert inputs[WINDOW_ROWS].shape[1] == 4 * window**2


def groups(rows):
    return [row[row >= 0].tolist() for row in rows]


def test_windows_are_those_of_the_tower(tmp_path):
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    config = {"model_type": "qwen2_5_vl", "vision_config": {"window_size": 84}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read(tmp_path, "qwen2_5_vl").window_tokens == 3
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
    assert read(tmp_path, "qwen2_5_vl").window_tokens == 4
    write_config(tmp_path)
    assert read(tmp_path).window_tokens == 0


def test_as_data():
    data = json.loads(json.dumps(preprocessing_to_json(DEFAULTS)))
    assert data["kind"] == "patches"
    assert preprocessing_from_json(data) == DEFAULTS
    with pytest.raises(BundleError, match="lacks fields merge_size"):
        preprocessing_from_json({name: value for name, value in data.items() if name != "merge_size"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size must be an integer of at least 1, not 0"),
        ({"min_pixels": 3.5}, "min_pixels must be an integer of at least 1, not 3.5"),
        ({"window_tokens": -1}, "window_tokens must be an integer of at least 0, not -1"),
        ({"max_pixels": 700}, "max_pixels between 784"),
        ({"max_pixels": 10**9}, "max_pixels between 784"),
        ({"min_pixels": 13 * 10**6}, "must be in order"),
        ({"resample": "sinc"}, "resample must be one of nearest"),
        ({"rescale_factor": 0.0}, "rescale_factor must be a positive number"),
        ({"mean": (0.0, 0.0)}, "mean must be three numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive"),
        ({"convert_rgb": 1}, "convert_rgb must be true or false"),
    ],
)
def test_values_that_cannot_be(change, message):
    with pytest.raises(BundleError, match=message):
        replace(DEFAULTS, **change)


def test_other_modes_are_an_error_where_they_must_not_be_converted():
    with pytest.raises(PictureError, match="mode L is not RGB"):
        replace(DEFAULTS, convert_rgb=False).prepare([Image.new("L", (30, 30))], (16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor, which is not supported"),
        ({"do_resize": False}, "sets do_resize to false"),
        ({"do_pad": True}, "sets do_pad to True"),
        ({"size": {"height": 8, "width": 8}}, "only shortest_edge and longest_edge"),
        ({"size": 448}, "only shortest_edge and longest_edge"),
        ({"patch_size": 16}, "patch_size 16, config.json's vision_config patch_size 14"),
        ({"merge_size": 4}, "merge_size 4, config.json's vision_config spatial_merge_size 2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size 1, config.json's vision_config"),
        ({"resample": 17}, "has resample 17"),
        ({"max_pixels": 20}, "does not describe a usable preprocessing: .* max_pixels"),
        ({"image_mean": [0.5]}, "mean must be three numbers"),
    ],
)
def test_unsupported_settings(change, message, tmp_path):
    settings_ = {"image_processor_type": "Qwen2VLImageProcessor", **change}
    (write_config(tmp_path) / "preprocessor_config.json").write_text(json.dumps(settings_))
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
