"""A picture of a calibration: for every segment the lengths that were seen, and the profiles chosen for them."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edgeprune.calibration_entry import CalibrationEntry, DistributionEntry, SegmentBucketsEntry
from edgeprune.errors import DataError
from edgeprune.whole_file import write_whole

_WIDTH, _PLOT_HEIGHT = 960, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 34, 44
_FONT_SIZE, _SMALL_SIZE = 16, 13
_PAPER, _INK, _GREY = (255, 255, 255), (32, 33, 36), (120, 124, 130)
_BAR = (38, 90, 160)
_TUNED = (200, 60, 30)
_BUCKETS = ((232, 240, 250), (252, 242, 224))
_MOST_BARS = 160
_TICKS = 8


def check_plot_path(path: str | Path) -> None:
    """Find out early what would keep a plot from being written.

    Raises:
        DataError: It is no PNG, or there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise DataError(f"{path} is no PNG: give --plot a name that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        wrong = f"{path} is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise DataError(f"{path} cannot be written ({wrong}): choose a file in a folder that exists")


def save_plot(calibration: CalibrationEntry, path: str | Path) -> None:
    """Write the plot; an interrupted write leaves what was there.

    Raises:
        DataError: It cannot be written.
    """
    path = Path(path)
    check_plot_path(path)
    data = io.BytesIO()
    draw_calibration(calibration).save(data, format="PNG", optimize=True)
    try:
        write_whole(path, data.getvalue())
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}): free disk space or choose another folder"
        ) from error


def draw_calibration(calibration: CalibrationEntry) -> Image.Image:
    """One panel per segment with attention: a bar for every number of rows that was seen, its height the prompts.

    The background shows the profiles in turn, a line the rows that each is tuned for. The axis ends behind the most
    that was seen; the last profile goes on to the greatest.
    """
    step = _TOP + _PLOT_HEIGHT + _BOTTOM
    sheet = Image.new("RGB", (_WIDTH, step * len(calibration.prefill)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (name, segment) in enumerate(calibration.prefill.items()):
        _draw_panel(draw, index * step + _TOP, name, calibration.sequence_lengths[name], segment)
    return sheet


def _draw_panel(
    draw: ImageDraw.ImageDraw, top: int, name: str, rows: DistributionEntry, segment: SegmentBucketsEntry
) -> None:
    font, small = ImageFont.load_default(size=_FONT_SIZE), ImageFont.load_default(size=_SMALL_SIZE)
    spare = max(2, (rows.max - rows.values[0]) // 12)
    first, last = max(0, rows.values[0] - spare), rows.max + spare
    bottom, right = top + _PLOT_HEIGHT, _WIDTH - _RIGHT
    scale = (right - _LEFT) / (last + 1 - first)

    def x(value: float) -> float:
        return _LEFT + (min(max(value, first), last + 1) - first) * scale

    title = f"{name}: rows that enter in prefill, {rows.total} prompts; {len(segment.buckets)} profiles"
    draw.text((_LEFT, top - _TOP + 8), f"{title}, expected gain {segment.gain:.2%}", fill=_INK, font=font)
    for index, bucket in enumerate(segment.buckets):
        if bucket.least <= last and bucket.greatest >= first:
            span = (x(bucket.least), top, x(bucket.greatest + 1), bottom)
            draw.rectangle(span, fill=_BUCKETS[index % 2])
    width = -(-(last + 1 - first) // _MOST_BARS)
    bars = _binned(rows, first, width)
    highest = max(bars)
    for index, count in enumerate(bars):
        if count:
            begin = first + index * width
            height = max(1.0, (_PLOT_HEIGHT - 22) * count / highest)
            edges = (x(begin), x(begin + width))
            draw.rectangle(
                (
                    edges[0],
                    bottom - height,
                    max(edges[0], edges[1] - (1 if scale * width > 3 else 0)),
                    bottom,
                ),
                fill=_BAR,
            )
    for bucket in segment.buckets:
        if first <= bucket.tuned <= last:
            place = x(bucket.tuned + 0.5)
            draw.line((place, top, place, bottom), fill=_TUNED, width=2)
            label = f"{bucket.tuned} for {bucket.least} … {bucket.greatest}"
            side = place + 5
            if side + draw.textlength(label, font=small) > right:
                side = place - 5 - draw.textlength(label, font=small)
            draw.text((side, top + 2), label, fill=_TUNED, font=small)
    draw.line((_LEFT, bottom, right, bottom), fill=_INK)
    draw.text((_LEFT - 6, top + 18), str(highest), fill=_GREY, font=small, anchor="rm")
    draw.text((_LEFT - 6, bottom), "0", fill=_GREY, font=small, anchor="rm")
    for tick in _ticks(first, last):
        place = x(tick + 0.5)
        draw.line((place, bottom, place, bottom + 4), fill=_INK)
        draw.text((place, bottom + 14), str(tick), fill=_GREY, font=small, anchor="mm")


def _binned(rows: DistributionEntry, first: int, width: int) -> list[int]:
    """Prompts by run of ``width`` numbers of rows."""
    bars = [0] * ((rows.max - first) // width + 1)
    for value, count in zip(rows.values, rows.counts, strict=True):
        bars[(value - first) // width] += count
    return bars


def _ticks(first: int, last: int) -> Sequence[int]:
    """Round numbers between two numbers, no more than the axis has room for."""
    step = next(
        step
        for power in range(12)
        for step in (10**power, 2 * 10**power, 5 * 10**power)
        if (last - first) // step < _TICKS * 2
    )
    return range(-(-first // step) * step, last + 1, step)
