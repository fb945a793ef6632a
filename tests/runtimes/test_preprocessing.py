"""Pixels are those of transformers' CLIPImageProcessor; pictures that cannot be read say why."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import get_sample_data
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.image_utils import load_image

from edgeprune.errors import BundleError, PictureError
from edgeprune.runtimes import preprocessing
from edgeprune.runtimes.preprocessing import RESAMPLING, ImagePreprocessing, read_picture

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImagePreprocessing(48, None, "bicubic", (48, 48), 1 / 255, MEAN, STD)


def reference(ours: ImagePreprocessing) -> CLIPImageProcessor:
    height_width = ("height", "width")
    return CLIPImageProcessor(
        size={"shortest_edge": ours.shortest_edge}
        if ours.resize_to is None
        else dict(zip(height_width, ours.resize_to, strict=True)),
        resample=int(RESAMPLING[ours.resample]),
        do_center_crop=ours.center_crop is not None,
        crop_size=dict(zip(height_width, ours.center_crop or ours.resize_to, strict=True)),
        rescale_factor=ours.rescale_factor,
        image_mean=list(ours.mean),
        image_std=list(ours.std),
    )


def assert_same_pixels(ours: ImagePreprocessing, picture: Image.Image) -> None:
    expected = reference(ours)(picture, return_tensors="np")["pixel_values"]
    actual = ours([picture])
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return read_picture(get_sample_data("grace_hopper.jpg", asfileobj=False))


def test_photograph_at_the_size_of_llava(photograph):
    assert_same_pixels(replace(CLIP, shortest_edge=336, center_crop=(336, 336)), photograph)


@pytest.mark.parametrize("resample", RESAMPLING)
def test_every_filter(photograph, resample):
    assert_same_pixels(replace(CLIP, resample=resample), photograph)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (333, 250), (48, 48), (47, 49), (1, 48)])
@pytest.mark.parametrize(
    "ours",
    [
        CLIP,
        replace(CLIP, shortest_edge=None, resize_to=(30, 52), center_crop=None),
        replace(CLIP, shortest_edge=None, resize_to=(31, 40), center_crop=(48, 36)),
        replace(CLIP, shortest_edge=33, center_crop=(48, 39)),
        replace(CLIP, center_crop=(33, 21)),
    ],
    ids=["clip", "stretch", "pad and cut", "pad", "cut"],
)
def test_odd_sizes(ours, size):
    assert_same_pixels(ours, noise(*size))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    edge=st.integers(1, 70),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_any_size(width, height, edge, crop):
    assert_same_pixels(replace(CLIP, shortest_edge=edge, center_crop=crop), noise(width, height))


def pictures_of_all_modes() -> dict[str, Image.Image]:
    rgba = noise(60, 50, channels=4)
    palette = noise(60, 50).convert("P", palette=Image.Palette.ADAPTIVE)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    rgb_key = noise(60, 50)
    rgb_key.info["transparency"] = tuple(np.asarray(rgb_key)[0, 0].tolist())
    return {
        "grey": noise(60, 50, channels=1),
        "grey and alpha": rgba.convert("LA"),
        "alpha": rgba,
        "palette": palette,
        "palette with transparency": see_through,
        "colour key": rgb_key,
        "CMYK": noise(60, 50).convert("CMYK"),
        "one bit": noise(60, 50).convert("1"),
        "16 bit": Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (50, 60), dtype=np.uint16)),
    }


@pytest.mark.parametrize("mode", pictures_of_all_modes())
def test_modes_of_pillow_images(mode):
    assert_same_pixels(CLIP, pictures_of_all_modes()[mode])


@pytest.mark.parametrize("mode", pictures_of_all_modes())
def test_modes_of_files(mode, tmp_path):
    file = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    pictures_of_all_modes()[mode].save(file)
    assert np.array_equal(np.asarray(read_picture(file)), np.asarray(load_image(str(file))))
    assert np.array_equal(np.asarray(read_picture(file.read_bytes())), np.asarray(load_image(str(file))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_files(orientation, tmp_path):
    file = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(40, 24).save(file, exif=exif)
    upright = read_picture(file)
    assert np.array_equal(np.asarray(upright), np.asarray(load_image(str(file))))
    assert upright.size == ((24, 40) if orientation >= 5 else (40, 24))


def test_pillow_image_is_taken_as_it_is(tmp_path):
    file = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 24).save(file, exif=exif)
    with Image.open(file) as opened:
        assert read_picture(opened) is opened
        assert_same_pixels(CLIP, opened)


def test_arrays():
    values = np.asarray(noise(20, 10, channels=4))
    assert np.array_equal(np.asarray(read_picture(values)), values)
    assert read_picture(values[..., :3]).mode == "RGB"
    assert np.array_equal(np.asarray(read_picture(values[..., :1])), values[..., 0])
    assert np.array_equal(np.asarray(read_picture(values[..., 0])), values[..., 0])


def test_several_and_no_pictures(photograph):
    batch = CLIP([photograph, noise(9, 5)])
    assert np.array_equal(batch[0], CLIP([photograph])[0])
    assert np.array_equal(batch[1], CLIP([noise(9, 5)])[0])
    assert CLIP([]).shape == (0, 3, 48, 48)


@pytest.mark.parametrize(("width", "height"), [(100, 50), (50, 101), (48, 48), (9, 5)])
@pytest.mark.parametrize(
    "ours",
    [
        replace(CLIP, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        ImagePreprocessing(48, None, "bilinear", (24, 60), 1 / 255, (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_crop_box_says_where_the_pixels_come_from(ours, width, height):
    """A picture whose red is x and green is y shows in the input which pixel of the picture it is."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    ramp = np.zeros((height, width, 3))
    ramp[..., 0], ramp[..., 1], ramp[..., 2] = x, y[:, None], 1
    pixels = ours([Image.fromarray(np.rint(ramp * 255).astype(np.uint8))])[0]
    left, top, right, bottom = ours.crop_box_in_picture(width, height)
    input_height, input_width = ours.input_size
    expected_x = (left + (np.arange(input_width) + 0.5) * (right - left) / input_width) / width
    expected_y = (top + (np.arange(input_height) + 0.5) * (bottom - top) / input_height) / height
    # Half a source pixel at the borders, where the resampling has nothing to interpolate with.
    tolerance = 0.5 / min(width, height) + 1 / 255
    inside = pixels[2] > 0.99
    assert inside.any()
    assert np.array_equal(
        inside, np.outer((expected_y > 0) & (expected_y < 1), (expected_x > 0) & (expected_x < 1))
    )
    assert np.abs(pixels[0] - expected_x)[inside].max() < tolerance
    assert np.abs(pixels[1] - expected_y[:, None])[inside].max() < tolerance


def test_json_round_trip():
    for ours in (CLIP, replace(CLIP, shortest_edge=None, resize_to=(30, 52), center_crop=None)):
        assert ImagePreprocessing.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tiling": 3}, "tiling"),
        ({"shortest_edge": 0}, "shortest_edge"),
        ({"shortest_edge": None}, "resize_to"),
        ({"resize_to": [3, 4]}, "exactly one"),
        ({"center_crop": None}, "center_crop or resize_to"),
        ({"center_crop": [48]}, "center_crop"),
        ({"center_crop": [48, True]}, "center_crop"),
        ({"resample": "magic"}, "bicubic"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": "1"}, "rescale_factor"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0.5, 0.0, 0.5]}, "std"),
        ({"std": [0.5, float("nan"), 0.5]}, "std"),
        ({"convert_rgb": 1}, "convert_rgb"),
    ],
)
def test_invalid_json_is_refused(change, named):
    with pytest.raises(BundleError, match=named):
        ImagePreprocessing.from_json({**CLIP.to_json(), **change})


def test_missing_field_is_refused():
    data = CLIP.to_json()
    del data["std"]
    with pytest.raises(BundleError, match="std"):
        ImagePreprocessing.from_json(data)
    with pytest.raises(BundleError, match="object"):
        ImagePreprocessing.from_json([1])


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def is_refused(data: bytes) -> bool:
    try:
        read_picture(data)
    except PictureError:
        return True
    return False


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PictureError, match=r"nothing\.png does not exist"):
        read_picture(tmp_path / "nothing.png")
    with pytest.raises(PictureError, match="cannot be read"):
        read_picture(tmp_path)
    with pytest.raises(PictureError, match="download"):
        read_picture("https://example.org/picture.png")


@pytest.mark.parametrize("data", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n"])
def test_not_a_picture(data):
    with pytest.raises(PictureError, match="not a picture"):
        read_picture(data)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_truncated_pictures_never_raise_anything_else(file_format):
    stream = io.BytesIO()
    noise(64, 64).save(stream, file_format)
    data = stream.getvalue()
    refused = sum(is_refused(data[:length]) for length in np.linspace(1, len(data) - 1, 40).astype(int))
    assert refused >= 35  # a few bytes at the end of a file may be dispensable


def test_truncated_picture():
    with pytest.raises(PictureError, match="truncated or damaged"):
        read_picture(png(noise(64, 64))[:3000])


def test_damaged_bytes_never_raise_anything_else():
    data = np.frombuffer(png(noise(64, 64)), np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(0, 200, 5)] = rng.integers(0, 256, 5)
        refused += is_refused(damaged.tobytes())
    assert refused > 100


def test_empty_pictures():
    with pytest.raises(PictureError, match=r"empty \(0 × 5\)"):
        read_picture(Image.new("RGB", (0, 5)))
    with pytest.raises(PictureError, match="empty"):
        read_picture(np.zeros((0, 5, 3), np.uint8))


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(PictureError, match="uint8"):
        read_picture(array)


@pytest.mark.filterwarnings("error")
def test_decompression_bomb_is_refused_from_its_header(monkeypatch):
    data = png(Image.new("1", (2000, 1000)))
    read_picture(data)
    monkeypatch.setattr(preprocessing, "MAX_PIXELS", 2_000_000 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(PictureError, match=r"2000 × 1000 pixels, more than the 1999999"):
        read_picture(data)


def test_picture_beyond_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match="more than"):
        read_picture(png(noise(20, 20)))


def test_absurd_aspect_ratio():
    with pytest.raises(PictureError, match="aspect ratio"):
        replace(CLIP, shortest_edge=336, center_crop=(336, 336))([Image.new("1", (1, 10_000_000))])


def test_conversion_can_be_forbidden():
    strict = replace(CLIP, convert_rgb=False)
    assert np.array_equal(strict([noise(9, 5)]), CLIP([noise(9, 5)]))
    with pytest.raises(PictureError, match="mode L"):
        strict([noise(9, 5, channels=1)])
