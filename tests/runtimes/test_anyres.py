"""Pictures of any resolution give transformers' tiles and stand where transformers puts their tokens."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import edit_json
from tiny_llava_next import TINY_NEXT, Reference, TinyLlavaNext, pictures, processor_of, with_base
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from edgeprune.errors import BundleError, CheckpointError, PictureError
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.export.prompt import prompt_format_from_checkpoint
from edgeprune.runtimes.anyres import AnyresPreprocessing, best_resolution, unpad
from edgeprune.runtimes.preprocessing import ImagePreprocessing
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json, preprocessing_to_json
from edgeprune.runtimes.prompt import PromptEncoder

TILE = ImagePreprocessing(None, (24, 24), "bicubic", None, 1 / 255, (0.5,) * 3, (0.25,) * 3)
ANYRES = AnyresPreprocessing(TILE, tuple((down, across) for down, across in TINY_NEXT.pinpoints))
PUBLISHED = with_base(TINY_NEXT, image_size=336, patch_size=14)


def saved(folder, spec: TinyLlavaNext, **options) -> AnyresPreprocessing:
    """What we read where transformers has saved its image processor."""
    config = {"vision_config": {"image_size": spec.base.image_size}, "image_grid_pinpoints": spec.pinpoints}
    (folder / "config.json").write_text(json.dumps(config))
    image_processor_of(spec, **options).save_pretrained(folder)
    read = picture_preprocessing_from_checkpoint(folder, "llava_next")
    assert isinstance(read, AnyresPreprocessing)
    return read


def image_processor_of(spec: TinyLlavaNext, **options) -> LlavaNextImageProcessorPil:
    side = spec.base.image_size
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} | options
    return LlavaNextImageProcessorPil(image_grid_pinpoints=spec.pinpoints, **settings)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (PUBLISHED, {}),
        (TINY_NEXT, {}),
        (TINY_NEXT, {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
        (TINY_NEXT, {"do_normalize": False, "size": {"height": 24, "width": 24}}),
        (TINY_NEXT, {"do_rescale": False, "do_center_crop": False}),
        (with_base(TINY_NEXT, image_size=28), {}),
    ],
    ids=["published", "tiny", "bilinear", "not normalised", "neither rescaled nor cropped", "odd"],
)
def test_pixels_are_those_of_transformers(tmp_path, spec, options):
    sizes = [
        (640, 480),
        (333, 1001),
        (5, 7),
        (1, 1),
        (1400, 90),
        (336, 336),
        (672, 671),
        (60, 1),
        (300, 2),
        (3, 900),
    ]
    images = pictures(sizes)
    images.append(images[0].convert("L"))
    images.append(images[1].convert("RGBA"))
    images[-1].putalpha(90)
    ours = saved(tmp_path, spec, **options)
    theirs = image_processor_of(spec, **options)
    grid = (spec.base.image_size // spec.base.patch_size,) * 2
    for image in images:
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        tiles = ours.prepare([image], grid).pixel_values
        assert tiles.shape == expected.shape
        assert np.abs(tiles - expected).max() <= (1e-4 if options.get("do_rescale") is False else 1e-5)
    # Several pictures: one after the other, without transformers' padding to equally many tiles.
    together = ours.prepare(images[:3], grid).pixel_values
    apart = [ours.prepare([image], grid).pixel_values for image in images[:3]]
    assert np.array_equal(together, np.concatenate(apart))
    assert len({tiles.shape[0] for tiles in apart}) > 1


def test_the_best_resolution_is_that_of_transformers():
    rng = np.random.default_rng(0)
    for pinpoints in (PUBLISHED.pinpoints, TINY_NEXT.pinpoints, [[24, 24], [48, 24], [24, 48]]):
        sizes = np.exp(rng.uniform(0, 8, (500, 2))).astype(int).tolist() + [
            [a * 24, b * 24] for a in (1, 2) for b in (1, 2)
        ]
        for width, height in sizes:
            expected = select_best_resolution((height, width), pinpoints)
            assert best_resolution(width, height, [tuple(p) for p in pinpoints]) == expected


def test_unpadding_is_that_of_transformers():
    """Pictures whose exact size is a whole number of rows or columns meet the rounding."""
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.uniform(0, 8, (300, 2))).astype(int).tolist()
    sizes += [[width, height] for width in (600, 700, 900, 1100) for height in range(300, 1200, 50)]
    differs = 0
    for width, height in sizes:
        for rows, columns in ((48, 48), (24, 48), (72, 24), (21, 35)):
            whole = torch.arange(rows * columns).reshape(1, rows, columns)
            expected = unpad_image(whole, (height, width))[0]
            seen = unpad(width, height, rows, columns)
            ours = whole[0, seen.top : seen.top + seen.rows, seen.left : seen.left + seen.columns]
            assert torch.equal(ours, expected)
            wide = width / height > columns / rows
            cut = int(height * (columns / width)) if wide else int(width * (rows / height))
            old = (rows if wide else columns) - 2 * (((rows if wide else columns) - cut) // 2)
            differs += old != (seen.rows if wide else seen.columns)
    assert differs, "no picture would tell the rounding from cutting off at once"


def test_prompts_are_those_of_transformers(llava_next_folder):
    theirs = Reference(llava_next_folder)
    config = json.loads((llava_next_folder / "config.json").read_text())
    prompts = PromptEncoder(
        prompt_format_from_checkpoint(llava_next_folder, config), llava_next_folder / "tokenizer.json"
    )
    ours = picture_preprocessing_from_checkpoint(llava_next_folder, "llava_next")
    for sizes in ([], [(60, 40)], [(40, 60), (3, 3)], [(60, 1), (2, 90), (100, 99)]):
        images = pictures(sizes)
        layout = ours.prepare(images, (6, 6)).layout if images else None
        encoded = prompts.encode_chat("What is it?", layout.tokens_per_image if layout else ())
        expected = theirs.inputs(images, "What is it?")["input_ids"][0].numpy()
        assert np.array_equal(encoded.token_ids, expected)


def test_counts_at_published_sizes_are_those_of_the_processor(llava_next_folder):
    """336 pixels, 24 × 24 tokens: as many placeholders as LlavaNextProcessor writes, for pictures of any size."""
    theirs = processor_of(PUBLISHED, Reference(llava_next_folder).processor.tokenizer)
    tile = replace(TILE, resize_to=(336, 336))
    ours = AnyresPreprocessing(tile, tuple((down, across) for down, across in PUBLISHED.pinpoints))
    sizes = np.exp(np.random.default_rng(2).uniform(2, 8, (200, 2))).astype(int).tolist()
    counts = theirs._get_num_multimodal_tokens([[height, width] for width, height in sizes])[
        "num_image_tokens"
    ]
    assert [ours.layout([(width, height)], (24, 24)).tokens_per_image[0] for width, height in sizes] == counts
    assert len(set(counts)) > 20


def test_layout_of_two_pictures():
    # 60 × 40 becomes 48 × 32 of 48 × 48: rows 2 … 9 of 12 are seen, with rounding. 24 × 48 fills 48 × 24.
    layout = ANYRES.layout([(60, 40), (24, 48)], (6, 6))
    assert [(g.image, g.rows, g.columns, g.overview) for g in layout.grids] == [
        (0, 6, 6, True),
        (0, 8, 13, False),
        (1, 6, 6, True),
        (1, 12, 7, False),
    ]
    assert layout.inserted == 8 + 12
    assert layout.tokens_per_image == (36 + 8 * 13, 36 + 12 * 7)
    num_tower = (5 + 3) * 36
    assert layout.places.shape == (num_tower + 20, 3)
    assert sorted(layout.slots) == sorted(np.flatnonzero(layout.places[:, 0] >= 0))
    # The prompt's third row of the joined grid: the last row of the upper tiles' seen rows is row 5 of each.
    row = layout.slots[36 + 3 * 13 : 36 + 4 * 13]
    assert list(row) == [*range(36 + 30, 36 + 36), *range(72 + 30, 72 + 36), num_tower + 3]
    # Below it begin the lower tiles.
    assert list(layout.slots[36 + 4 * 13 : 36 + 5 * 13])[:7] == [*range(108, 114), 144]
    # Padding: the first two rows of the upper tiles.
    assert (layout.places[36:48, 0] == -1).all()
    # Newlines stand in the last column.
    assert layout.places[num_tower].tolist() == [1, 0, 12]
    assert layout.places[-1].tolist() == [3, 11, 6]
    for grid, expected in ((0, (0, 0, 60, 40)), (1, (0, 0, 65, 40)), (3, (0, 0, 28, 48))):
        assert layout.grids[grid].box == pytest.approx(expected)


def test_places_follow_the_picture():
    """A token's place in its grid, mapped by the grid's box, lies where its tile's patch was cut from."""
    size = (61, 37)
    layout = ANYRES.layout([size], (6, 6))
    grid = layout.grids[1]
    left, top, right, bottom = grid.box
    gradient = np.zeros((*size[::-1], 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 255, size[0])[None]
    gradient[..., 1] = np.linspace(0, 255, size[1])[:, None]
    tiles = ANYRES.tiles(Image.fromarray(gradient))[1:]
    for slot in np.flatnonzero(layout.places[:, 0] == 1):
        if slot >= 36 * 5:
            continue
        tile, patch = divmod(slot - 36, 36)
        y, x = 4 * (patch // 6) + 2, 4 * (patch % 6) + 2
        red, green, _ = tiles[tile].getpixel((int(x), int(y)))
        _, row, column = layout.places[slot]
        across = left + (column + 0.5) * (right - left) / grid.columns
        down = top + (row + 0.5) * (bottom - top) / grid.rows
        if 3 < across < size[0] - 3 and 3 < down < size[1] - 3:
            assert across == pytest.approx(red / 255 * size[0], abs=2)
            assert down == pytest.approx(green / 255 * size[1], abs=2)


def test_tower_pruning_keeps_newlines_and_drops_padding():
    layout = ANYRES.layout([(60, 40)], (6, 6))
    kept = np.concatenate([tile * 36 + np.array([0, 7, 20, 35]) for tile in range(5)])
    rows = layout.rows_of(kept, None)
    # Of the upper tiles only rows 2 … 5 are seen: patches 20 and 35; of the lower ones rows 0 … 3: 0, 7 and 20.
    slots = np.where(rows.rows < 0, -1 - rows.rows, kept[np.maximum(rows.rows, 0)])
    newlines = np.arange(180, 188)
    seen = [0, 7, 20, 35, 56, 71, 92, 107, 108, 115, 128, 144, 151, 164]
    assert sorted(slots) == [*seen, *newlines]
    assert list(slots) == [slot for slot in layout.slots if slot in set(slots)]
    assert rows.tokens_per_image == (14 + 8,)
    assert layout.rows_beforehand(4, 36) is None


def test_thin_pictures_leave_no_row_or_newlines_alone():
    """As in transformers, which has no tokens for less than half a row, but a newline for every row of no column."""
    layout = ANYRES.layout([(300, 2), (2, 90)], (6, 6))
    assert [(grid.rows, grid.columns, grid.overview) for grid in layout.grids] == [
        (6, 6, True),
        (6, 6, True),
        (18, 1, False),
    ]
    assert layout.tokens_per_image == (36, 36 + 18)


def test_modes_that_are_not_rgb(tmp_path):
    strict = saved(tmp_path, TINY_NEXT, do_convert_rgb=False)
    with pytest.raises(PictureError, match="mode L is not RGB"):
        strict.prepare([Image.new("L", (30, 30))], (6, 6))


def test_json_round_trip():
    data = json.loads(json.dumps(preprocessing_to_json(ANYRES)))
    assert data["kind"] == "anyres"
    assert preprocessing_from_json(data) == ANYRES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pinpoints": []}, "pinpoints must be a list of sizes"),
        ({"pinpoints": [[24, 30]]}, r"multiples of 24, not \(24, 30\)"),
        ({"pinpoints": [[24, 0]]}, "multiples of 24"),
        ({"pinpoints": [[24, 24, 24]]}, "multiples of 24"),
        ({"pinpoints": [[24 * 10**4, 24 * 10**4]]}, "pixels"),
        ({"tile": {**TILE.to_json(), "resize_to": [24, 30]}}, "square resize_to"),
        ({"tile": {**TILE.to_json(), "center_crop": [24, 24]}}, "no center_crop"),
        ({"tile": None}, "must be an object"),
        ({"extra": 1}, "unknown or lacks fields extra"),
    ],
)
def test_invalid_json_is_refused(fields, message):
    with pytest.raises(BundleError, match=message):
        preprocessing_from_json({**preprocessing_to_json(ANYRES), **fields})


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor"},
            "use one of LlavaNextImageProc",
        ),
        ("preprocessor_config.json", {"crop_size": {"height": 28, "width": 28}}, "supported: both 24"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 30}}, "supported: both 24"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[24, 48]]}, "different image_grid_pinpoints"),
        ("preprocessor_config.json", {"image_grid_pinpoints": "x"}, "expected pairs"),
        ("preprocessor_config.json", {"image_aspect_ratio": "pad"}, "sets image_aspect_ratio to 'pad'"),
        ("config.json", {"image_grid_pinpoints": [[24, 48]]}, "different image_grid_pinpoints"),
        ("config.json", {"image_grid_pinpoints": ...}, "different image_grid_pinpoints"),
        ("config.json", {"vision_config": {"image_size": 48}}, "supported: both 48"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, file, fields, message):
    saved(tmp_path, TINY_NEXT)
    edit_json(tmp_path / file, **fields)
    with pytest.raises(CheckpointError, match=message) as error:
        picture_preprocessing_from_checkpoint(tmp_path, "llava_next")
    assert "\n" not in str(error.value)


def test_published_settings_are_read(tmp_path):
    """The fields of llava-v1.6-mistral-7b-hf's preprocessor_config.json."""
    settings = {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": PUBLISHED.pinpoints,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 336},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": 336}}))
    read = picture_preprocessing_from_checkpoint(tmp_path, "llava_next")
    assert read.side == 336
    assert read.tile.resample == "bicubic"
    assert read.pinpoints == tuple((a, b) for a, b in PUBLISHED.pinpoints)
    assert math.isclose(read.tile.rescale_factor, 1 / 255)


def test_processor_of_the_tiny_checkpoint_is_on_pillow(llava_next_folder):
    theirs = Reference(llava_next_folder).processor
    assert type(theirs.image_processor) is LlavaNextImageProcessorPil
    assert processor_of(TINY_NEXT, theirs.tokenizer).num_additional_image_tokens == 1
