"""Overlays show kept patches as they are and dropped ones dark, where the model saw them."""

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image

from edgeprune.errors import PictureError
from edgeprune.runtimes.overlay import draw_overlay, save_overlay
from edgeprune.runtimes.preprocessing import ImagePreprocessing, read_picture

SQUARE = ImagePreprocessing(None, (96, 96), "bilinear", None, 1 / 255, (0.5,) * 3, (0.5,) * 3)
CROP = ImagePreprocessing(96, None, "bicubic", (96, 96), 1 / 255, (0.5,) * 3, (0.5,) * 3)
RED = (255, 60, 60)


def overlay(picture, preprocessing, grid, sites):
    """An overlay of one picture that is one tile; sites are (title, kept, tokens that entered)."""
    visual = preprocessing.prepare([picture], grid).layout
    entering = range(sites[0][2]) if sites else ()
    kept = [(title, indices) for title, indices, _ in sites]
    return draw_overlay(preprocessing.to_rgb(picture), visual, 0, entering, kept)


def panels_of(sheet: Image.Image) -> list[tuple[int, int]]:
    """(left, right) of each panel in the first row: the runs of columns that are not paper."""
    inked = (np.asarray(sheet)[sheet.height * 2 // 3] != 255).any(axis=1)
    edges = np.flatnonzero(np.diff(np.pad(inked, 1).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def top_of(sheet: Image.Image, left: int, right: int) -> int:
    """First row of a panel, below its title: where nearly the whole width is not paper."""
    return int(np.argmax((np.asarray(sheet)[:, left:right] != 255).any(axis=2).mean(axis=1) > 0.9))


def test_kept_patches_are_clear_and_dropped_ones_dark():
    kept = [0, 5, 6, 15]
    sheet = overlay(Image.new("RGB", (96, 96), RED), SQUARE, (4, 4), [("site 0", kept, 16)])
    (_, (left, right)) = panels_of(sheet)
    top, cell = top_of(sheet, left, right), (right - left) / 4
    pixels = np.asarray(sheet)
    for index in range(16):
        row, column = divmod(index, 4)
        centre = pixels[int(top + (row + 0.5) * cell), int(left + (column + 0.5) * cell)].tolist()
        if index in kept:
            assert centre == list(RED)
        else:
            assert max(centre) - min(centre) == 0  # grey
            assert max(centre) < 110


def test_what_the_crop_leaves_out_is_faded():
    """A picture of 2:1 loses a quarter on either side; both panels are 480 pixels wide."""
    sheet = overlay(Image.new("RGB", (200, 100), RED), CROP, (2, 2), [("site 0", [0, 1, 2, 3], 4)])
    (_, (left, right)) = panels_of(sheet)
    assert right - left == 480
    middle = np.asarray(sheet)[top_of(sheet, left, right) + 60, left:right]
    assert middle[60].tolist() == middle[420].tolist()
    assert middle[60].min() > 200
    assert middle[180].tolist() == middle[300].tolist() == list(RED)


@pytest.mark.parametrize("size", [(1, 1), (96, 96), (7, 300), (300, 7), (3000, 2000)])
def test_panels_are_readable_whatever_the_size(size):
    sheet = overlay(Image.new("RGB", size, RED), SQUARE, (3, 3), [("site 0", [4], 9)])
    assert 2 * 360 <= sheet.width <= 2 * 480 + 3 * 16
    assert sheet.height < 800


def test_at_most_four_panels_in_a_row():
    picture = Image.new("RGB", (96, 96), RED)

    def size(num_sites: int) -> tuple[int, int]:
        return overlay(picture, SQUARE, (3, 3), [("site", [4], 9)] * num_sites).size

    assert size(3)[1] == size(1)[1]
    assert size(4)[0] == size(3)[0]
    assert size(4)[1] == size(7)[1] == 2 * size(3)[1] - 16
    assert size(8)[1] == 3 * size(3)[1] - 32


def test_long_titles_are_wrapped():
    picture = Image.new("RGB", (96, 96), RED)
    short = overlay(picture, SQUARE, (3, 3), [("site 0", [4], 9)])
    long = overlay(picture, SQUARE, (3, 3), [("site 0 · " + "before a layer " * 6, [4], 9)])
    assert long.width == short.width
    assert long.height > short.height


def test_no_site_shows_the_picture_alone():
    assert len(panels_of(overlay(Image.new("RGB", (96, 96), RED), SQUARE, (3, 3), []))) == 1


def test_pictures_of_other_modes():
    for mode in ("L", "RGBA", "P", "1"):
        overlay(Image.new(mode, (96, 96)), SQUARE, (3, 3), [("site", [4], 9)])


def test_photograph_and_nothing_kept():
    picture = read_picture(get_sample_data("grace_hopper.jpg", asfileobj=False))
    sheet = overlay(picture, CROP, (24, 24), [("site 0", range(88), 144), ("site 1", [], 88)])
    (_, (a, b), (c, d)) = panels_of(sheet)
    pixels = np.asarray(sheet)
    coloured = [np.ptp(pixels[60:-20, x:y].astype(int), axis=2).max() for x, y in ((a, b), (c, d))]
    assert coloured[0] > 100
    assert coloured[1] == 0


@pytest.mark.parametrize("index", [-1, 9])
def test_index_outside_of_the_grid(index):
    with pytest.raises(PictureError, match=rf"slot {index}, outside the 9 of the pictures"):
        overlay(Image.new("RGB", (9, 9)), SQUARE, (3, 3), [("site", [0, index], 9)])


@pytest.mark.parametrize("extension", [".png", ".JPG", ".webp"])
def test_overlay_is_written(tmp_path, extension):
    file = tmp_path / f"overlay{extension}"
    save_overlay(Image.new("RGB", (20, 10), RED), file)
    assert read_picture(file).size == (20, 10)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "overlay.png"
    save_overlay(Image.new("RGB", (20, 10)), file)

    def save(self, stream, **_):
        stream.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(PictureError, match="No space left"):
        save_overlay(Image.new("RGB", (30, 10)), file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert read_picture(file).size == (20, 10)


def test_overlay_that_cannot_be_written(tmp_path):
    with pytest.raises(PictureError, match=r"use one of \.png"):
        save_overlay(Image.new("RGB", (20, 10)), tmp_path / "overlay.txt")
    with pytest.raises(PictureError, match="cannot be written"):
        save_overlay(Image.new("RGB", (20, 10)), tmp_path / "missing" / "overlay.png")
