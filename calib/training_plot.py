"""A picture of a training: what the answers cost, and how many visual tokens there were, step by step."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from edgeprune.calib.training import Curves

_WIDTH, _PLOT_HEIGHT = 960, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 34, 44
_FONT_SIZE, _SMALL_SIZE = 16, 13
_PAPER, _INK, _GREY, _GRID = (255, 255, 255), (32, 33, 36), (120, 124, 130), (232, 234, 237)
_LINE, _FAINT, _TARGET = (38, 90, 160), (190, 208, 232), (200, 60, 30)
_TICKS = 8


def plot_png(curves: Curves, target: float, title: str) -> bytes:
    """The plot as a PNG."""
    data = io.BytesIO()
    draw_curves(curves, target, title).save(data, format="PNG", optimize=True)
    return data.getvalue()


def draw_curves(curves: Curves, target: float, title: str) -> Image.Image:
    """Three panels: the answers' loss, the visual tokens with their target, the share of right answers.

    Faint lines are single steps, the strong one is the mean over a fiftieth of the steps.

    Args:
        curves: At least one step.
        target: Visual tokens aimed at.
        title: What was trained.
    """
    panels = (
        (f"{title}: next-token loss of the answers", curves.answers, None),
        ("visual tokens, mean over layers, under soft masks", curves.tokens, target),
        ("answers right as a whole", curves.right, None),
    )
    step = _TOP + _PLOT_HEIGHT + _BOTTOM
    sheet = Image.new("RGB", (_WIDTH, step * len(panels)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (name, values, line) in enumerate(panels):
        _draw_panel(draw, index * step + _TOP, name, values, line)
    return sheet


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean over the last fiftieth of all values, at least one."""
    width = max(1, len(values) // 50)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(values) + 1)]


def _draw_panel(
    draw: ImageDraw.ImageDraw, top: int, name: str, values: Sequence[float], target: float | None
) -> None:
    font, small = ImageFont.load_default(size=_FONT_SIZE), ImageFont.load_default(size=_SMALL_SIZE)
    shown = [*values, *([] if target is None else [target])]
    low, high = min(shown), max(shown)
    spare = (high - low or abs(high) or 1.0) * 0.06
    low, high = low - spare, high + spare
    bottom, right = top + _PLOT_HEIGHT, _WIDTH - _RIGHT

    def place(index: int, value: float) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * (index + 0.5) / len(values)
        return x, bottom - (value - low) / (high - low) * _PLOT_HEIGHT

    draw.text((_LEFT, top - _TOP + 8), name, fill=_INK, font=font)
    for tick in _ticks(low, high, 4):
        y = place(0, tick)[1]
        draw.line((_LEFT, y, right, y), fill=_GRID)
        draw.text((_LEFT - 6, y), f"{tick:g}", fill=_GREY, font=small, anchor="rm")
    for curve, colour, width in ((values, _FAINT, 1), (smoothed(values), _LINE, 2)):
        draw.line([place(index, value) for index, value in enumerate(curve)], fill=colour, width=width)
    if target is not None:
        y = place(0, target)[1]
        draw.line((_LEFT, y, right, y), fill=_TARGET, width=2)
        # Above the panel, where no curve runs through it.
        draw.text((right, top - _TOP + 8), f"target {target:.1f}", fill=_TARGET, font=font, anchor="ra")
    draw.line((_LEFT, bottom, right, bottom), fill=_INK)
    for tick in _ticks(1, len(values), _TICKS):
        x = place(round(tick) - 1, low)[0]
        draw.line((x, bottom, x, bottom + 4), fill=_INK)
        draw.text((x, bottom + 14), f"{tick:g}", fill=_GREY, font=small, anchor="mm")


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two numbers."""
    span = max(high - low, 1e-9)
    step = next(
        base * 10.0**power
        for power in range(-9, 13)
        for base in (1, 2, 5)
        if span / (base * 10.0**power) <= most
    )
    first = -(-low // step)
    return [round((first + index) * step, 10) for index in range(int((high - first * step) // step) + 1)]
