import io

import numpy as np
import pytest
from PIL import Image

from edgeprune.calib.training import Curves
from edgeprune.calib.training_plot import draw_curves, plot_png, smoothed

TARGET_COLOUR = (200, 60, 30)


def curves(steps):
    rng = np.random.default_rng(0)
    falling = np.linspace(3, 1, steps) + 0.2 * rng.random(steps)
    return Curves(falling.tolist(), falling.tolist(), (30 + falling).tolist(), rng.random(steps).tolist())


@pytest.mark.parametrize("steps", [1, 2, 75, 4000])
def test_any_number_of_steps_is_drawn(steps):
    with Image.open(io.BytesIO(plot_png(curves(steps), 31.0, "atp"))) as plot:
        pixels = np.asarray(plot.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5


def test_the_target_is_a_line_at_its_height():
    sheet = np.asarray(draw_curves(curves(50), 31.0, "atp"))
    rows = np.flatnonzero((sheet == TARGET_COLOUR).all(axis=2).sum(axis=1) > 400)
    height = sheet.shape[0] // 3
    assert set(rows // height) == {1}, "in the panel of the tokens alone"


def test_curves_that_do_not_move_are_drawn():
    flat = Curves([0.0] * 9, [0.0] * 9, [20.0] * 9, [1.0] * 9)
    assert draw_curves(flat, 20.0, "atp").size[1] > 600


def test_the_strong_line_is_a_running_mean():
    values = [float(value) for value in range(100)]
    assert smoothed(values)[:3] == [0.0, 0.5, 1.5]
    assert smoothed(values)[-1] == 98.5
    assert smoothed([4.0]) == [4.0]
