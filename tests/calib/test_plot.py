"""The plot shows a panel per segment: bars where prompts were, a line where a profile is tuned."""

import numpy as np
import pytest
from calibrations import calibration_of
from PIL import Image
from tiny_manifest import write_files

from edgeprune.calib import plot
from edgeprune.calib.plot import draw_calibration, save_plot
from edgeprune.errors import DataError

PANEL = 248


@pytest.fixture
def calibration(tmp_path):
    """Two segments; the second has prompts of 22 and 42 rows, three and one."""
    manifest = write_files(tmp_path / "bundle")
    context = manifest.geometry.context_length
    buckets = {"segment0": [(1, 29, context)], "segment1": [(1, 22, 30), (31, 42, context)]}
    return calibration_of(manifest, [[2, 2, 2, 22]], buckets)


def columns(panel, color) -> list[int]:
    """Where a colour fills at least a tenth of a panel's height."""
    return np.flatnonzero((panel == color).all(axis=2).sum(axis=0) > PANEL // 10).tolist()


def runs(places: list[int]) -> int:
    return sum(place - 1 not in places for place in places)


def test_a_panel_per_segment(calibration):
    pixels = np.asarray(draw_calibration(calibration))
    assert pixels.shape == (2 * PANEL, 960, 3)
    first, second = pixels[:PANEL], pixels[PANEL:]
    assert runs(columns(first, plot._TUNED)) == 1
    assert runs(columns(second, plot._TUNED)) == 2
    # Both backgrounds, the second bucket's right of the first one's.
    left, right = (columns(second, color) for color in plot._BUCKETS)
    assert max(left) < min(right)
    # A line in front of each bar cuts it in two.
    assert runs(sorted(columns(second, plot._BAR) + columns(second, plot._TUNED))) == 2
    heights = (second == plot._BAR).all(axis=2).sum(axis=0)
    assert heights[:480].max() == pytest.approx(3 * heights[480:].max(), rel=0.1)


def test_it_is_written_whole(calibration, tmp_path):
    path = tmp_path / "plot.png"
    save_plot(calibration, path)
    assert Image.open(path).size == (960, 2 * PANEL)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "plot.png"]


def test_a_name_that_cannot_be(calibration, tmp_path):
    for name, message in (("plot.jpg", r"ends in \.png"), ("none/plot.png", "is no folder")):
        with pytest.raises(DataError, match=message):
            save_plot(calibration, tmp_path / name)
