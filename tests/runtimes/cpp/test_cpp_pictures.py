"""Pictures, resizing and every kind of preprocessing: the C++ library's pixels and layouts are Python's."""

import io
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from edgeprune.runtimes.preprocessing import RESAMPLING, read_picture, rgb_picture
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json

RNG = np.random.default_rng(0)
PIXELS = {
    "rescale_factor": 1 / 255,
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "convert_rgb": True,
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes with noise, in any mode."""
    rng = np.random.default_rng(width * 1000 + height)
    coarse = rng.integers(0, 256, (max(1, height // 6), max(1, width // 6), 4), dtype=np.uint8)
    return Image.fromarray(coarse, "RGBA").resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def raw(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), dtype).reshape(shape)


@pytest.mark.parametrize("resample", RESAMPLING)
def test_resized_pixels_are_pillows(cpp, resample, tmp_path):
    if PIL.__version__ < "13":
        pytest.skip(f"Pillow {PIL.__version__} resizes in another order: the library does as Pillow 13")
    original = picture(61, 43)
    path = tmp_path / "picture.png"
    original.save(path)
    sizes = [
        (61, 43),
        (20, 43),
        (61, 100),
        (7, 5),
        (1, 1),
        (300, 11),
        (224, 224),
        (33, 42),
        (47, 15),
        (47, 14),
        (60, 40),
    ]
    requests = [
        {"path": str(path), "resize": size, "resample": resample, "target": str(tmp_path / str(index))}
        for index, size in enumerate(sizes)
    ]
    cpp.parts("picture", requests)
    for index, size in enumerate(sizes):
        expected = np.asarray(original.resize(size, RESAMPLING[resample]))
        assert np.array_equal(raw(tmp_path / str(index), expected.shape), expected), size


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "palette with alpha"])
def test_png_files_of_every_mode_are_read_as_pillow_reads_them(cpp, mode, tmp_path):
    path = tmp_path / "picture.png"
    if mode == "I;16":
        Image.fromarray(RNG.integers(0, 400, (21, 33)).astype(np.uint16)).save(path)
    elif mode == "palette with alpha":
        picture(33, 21, "RGB").quantize(16).save(path, transparency=3)
    else:
        picture(33, 21, "RGBA").convert(mode).save(path)
    expected = np.asarray(read_picture(path))
    assert cpp.parts("picture", [{"path": str(path), "target": str(tmp_path / "raw")}]) == [[33, 21]]
    assert np.array_equal(raw(tmp_path / "raw", expected.shape), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_pictures_are_turned_upright(cpp, kind, orientation, tmp_path, has_jpeg):
    if kind == "jpeg" and not has_jpeg:
        pytest.skip("the library was built without libjpeg: install libjpeg's headers")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{kind}"
    picture(40, 24).save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    cpp.parts("picture", [{"path": str(path), "target": str(tmp_path / "raw")}])
    assert np.array_equal(raw(tmp_path / "raw", expected.shape), expected)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "progressive"])
def test_jpeg_pixels_are_pillows(cpp, subsampling, mode, tmp_path, has_jpeg):
    if not has_jpeg:
        pytest.skip("the library was built without libjpeg: install libjpeg's headers")
    path = tmp_path / "picture.jpg"
    source = picture(75, 51, "RGB" if mode == "progressive" else mode)
    source.save(path, quality=80, subsampling=subsampling, progressive=mode == "progressive")
    expected = np.asarray(read_picture(path))
    cpp.parts("picture", [{"path": str(path), "target": str(tmp_path / "raw")}])
    assert np.array_equal(raw(tmp_path / "raw", expected.shape), expected)


def test_what_is_transparent_becomes_white_as_pillow_composes_it(cpp, tmp_path):
    pixels = RNG.integers(0, 256, (16, 256, 4), dtype=np.uint8)
    pixels[..., 3] = np.arange(256)
    request = {"pixels": pixels.ravel().tolist(), "size": [256, 16, 4], "target": str(tmp_path / "raw")}
    cpp.parts("picture", [request])
    expected = np.asarray(rgb_picture(Image.fromarray(pixels), convert=True))
    assert np.array_equal(raw(tmp_path / "raw", expected.shape), expected)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_files_that_are_cut_or_changed_are_refused(cpp, kind, tmp_path, has_jpeg):
    if kind == "jpeg" and not has_jpeg:
        pytest.skip("the library was built without libjpeg: install libjpeg's headers")
    file = io.BytesIO()
    picture(60, 40).save(file, kind)
    whole = file.getvalue()
    # A JPEG has no checksum: a change in its middle is another picture.
    damaged = [whole[:length] for length in (0, 1, 10, 60, len(whole) // 2, len(whole) - 30)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] for at in range(8, len(whole), 13)]
    requests = []
    for index, content in enumerate(damaged):
        (tmp_path / str(index)).write_bytes(content)
        requests.append({"path": str(tmp_path / str(index)), "target": str(tmp_path / "raw")})
    found = cpp.parts("picture", requests)
    surely = found if kind == "png" else found[:6]
    assert all("error" in result for result in surely)


CROP = {"shortest_edge": 24, "resize_to": None, "resample": "bicubic", "center_crop": [24, 24], **PIXELS}
TILE = CROP | {"shortest_edge": None, "resize_to": [24, 24], "center_crop": None}
PATCHES = {
    "kind": "patches",
    "min_pixels": 1024,
    "max_pixels": 8192,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "window_tokens": 3,
    "resample": "bicubic",
    **PIXELS,
}
KINDS = {
    "crop": {"kind": "crop", **CROP},
    "crop that pads": {"kind": "crop", **CROP, "shortest_edge": 15, "resample": "lanczos"},
    "stretched": {"kind": "crop", **TILE, "resample": "bilinear"},
    "pad": {"kind": "pad", "crop": CROP, "fill": [122, 116, 104]},
    "anyres": {
        "kind": "anyres",
        "tile": TILE,
        "pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]],
    },
    "tiles": {"kind": "tiles", "tile": TILE, "min_tiles": 1, "max_tiles": 6},
    "three tiles or more": {"kind": "tiles", "tile": TILE, "min_tiles": 3, "max_tiles": 12},
    "patches": PATCHES,
    "patches without windows": PATCHES
    | {"window_tokens": 0, "merge_size": 1, "max_pixels": 2048, "min_pixels": 16},
}
SIZES = [(60, 40), (37, 61), (7, 5), (24, 24), (2, 90), (200, 13), (96, 96), (25, 49), (331, 17), (1, 1)]


@pytest.mark.parametrize("name", KINDS)
def test_pixels_and_layouts_of_every_kind_are_pythons(cpp, name, tmp_path):
    settings = KINDS[name]
    ours = preprocessing_from_json(settings)
    grid = (3, 4)
    sets = [[size] for size in SIZES] + [SIZES[:3], SIZES[3:7], [SIZES[2], SIZES[4]]]
    requests, expected = [], []
    for index, sizes in enumerate(sets):
        folder = tmp_path / str(index)
        folder.mkdir()
        images = [picture(*size) for size in sizes]
        for number, image in enumerate(images):
            image.save(folder / f"{number}.png")
        prepared = ours.prepare(images, grid)
        tower = prepared.layout.places.shape[0] - prepared.layout.inserted
        # Half of what the tower gives, so that rows are left out and newlines stand between others.
        left = np.sort(np.random.default_rng(index).permutation(tower)[: max(1, tower // 2)])
        shares = [max(1, count // 3) for count in prepared.layout.tokens_per_image]
        expected.append((prepared, left, shares))
        requests.append(
            {
                "settings": settings,
                "images": [str(folder / f"{number}.png") for number in range(len(images))],
                "grid": grid,
                "folder": str(folder),
                "split": shares,
                "patch_slots": left.tolist(),
                "counts": None,
            }
        )
    results = cpp.parts("preprocess", requests)
    for request, result, (prepared, left, shares) in zip(requests, results, expected, strict=True):
        layout = prepared.layout
        assert set(result["inputs"]) == set(prepared.inputs)
        for name_of_input, array in prepared.inputs.items():
            found = raw(Path(request["folder"]) / name_of_input, array.shape, array.dtype)
            assert result["inputs"][name_of_input] == list(array.shape)
            assert np.abs(found - array).max() <= (1e-5 if array.dtype == np.float32 else 0)
        assert result["grids"] == [
            [g.image, g.rows, g.columns, pytest.approx(g.box, abs=1e-9), g.overview] for g in layout.grids
        ]
        assert result["places"] == layout.places.tolist()
        assert result["slots"] == layout.slots.tolist()
        assert result["tokens_per_image"] == list(layout.tokens_per_image)
        assert result["table"] == layout.table.ravel().tolist()
        assert result["split"] == layout.split_over_grids(shares).tolist()
        rows = layout.rows_of(left, None)
        assert result["rows"] == rows.rows.tolist()
        assert result["rows_per_image"] == list(rows.tokens_per_image)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("crop", {"resample": "cubic"}),
        ("crop", {"std": [1, 0, 1]}),
        ("crop", {"rescale_factor": -1}),
        ("crop", {"shortest_edge": None}),
        ("crop", {"center_crop": None}),
        ("crop", {"center_crop": [10**9, 10**9]}),
        ("crop", {"kind": "other"}),
        ("crop", {"more": 1}),
        ("anyres", {"pinpoints": [[25, 24]]}),
        ("tiles", {"max_tiles": 10**9}),
        ("tiles", {"min_tiles": 7}),
        ("patches", {"max_pixels": 10}),
        ("patches", {"patch_size": 10**8}),
    ],
)
def test_unusable_settings_are_refused(cpp, name, changes, tmp_path):
    request = {"settings": KINDS[name] | changes, "images": [], "grid": (3, 3), "folder": str(tmp_path)}
    (result,) = cpp.parts("preprocess", [request])
    assert result["error"].startswith("preprocessing ")
