"""A picture of what was pruned: one panel per site, dropped patches dark, kept ones clear."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edgeprune.errors import PictureError
from edgeprune.runtimes.preprocessing import ImagePreprocessing

Site = tuple[str, Sequence[int], int]
"""A title, the kept indices into the grid (row by row), and how many visual tokens the site was given."""

_MAX_PANELS_PER_ROW = 4
_MIN_PANEL_WIDTH = 360
_PICTURE_BOX = (480, 640)  # pixels a picture is scaled to fit, width and height
_MARGIN = 16
_FONT_SIZE = 17
_LINE_HEIGHT = 23

_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_CELL_BORDER = (255, 255, 255, 70)
_KEPT_BORDER = (255, 196, 0, 255)
_DROPPED_CONTRAST, _DROPPED_BLACK = 0.3, 52  # lifted, so that dark kept patches stand out too
_UNSEEN_FADE = 0.75  # how far the margins that the model's crop leaves out fade into the paper

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def draw_overlay(
    picture: Image.Image,
    preprocessing: ImagePreprocessing,
    grid: tuple[int, int],
    sites: Sequence[Site],
) -> Image.Image:
    """Draw the picture, then for each site the picture with its dropped patches darkened.

    Args:
        picture: As it was given to the model.
        preprocessing: Says which part of the picture the model saw.
        grid: (rows, columns) of visual tokens.
        sites: In the order in which the model prunes.

    Raises:
        PictureError: A kept index lies outside the grid.
    """
    rows, columns = grid
    for title, kept, _ in sites:
        if outside := [index for index in kept if not 0 <= index < rows * columns]:
            raise PictureError(
                f"{title} keeps index {outside[0]}, outside the grid of {rows} × {columns}: "
                "draw with the grid of the bundle that pruned"
            )
    width, height = picture.size
    scale = min(_PICTURE_BOX[0] / width, _PICTURE_BOX[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    clear = preprocessing.to_rgb(picture).resize(size, resample)
    crop = preprocessing.crop_box_in_picture(width, height)
    box = crop[0] * scale, crop[1] * scale, crop[2] * scale, crop[3] * scale

    panels = [(f"picture · {width} by {height} pixels", clear)]
    for title, kept, total in sites:
        panels.append((f"{title} · {len(kept)} of {total} kept", _draw_site(clear, box, grid, kept)))
    return _arrange(panels)


def check_overlay_path(path: str | Path) -> None:
    """Find out early what would keep an overlay from being written.

    Raises:
        PictureError: The extension is unknown, or there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise PictureError(f"{path} has no known extension: use one of {', '.join(_FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        wrong = f"{path} is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise PictureError(f"{path} cannot be written ({wrong}): choose a file in a folder that exists")


def save_overlay(image: Image.Image, path: str | Path) -> None:
    """Write the overlay; an interrupted write leaves what was there.

    Raises:
        PictureError: The extension is unknown, or the file cannot be written.
    """
    path = Path(path)
    check_overlay_path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            image.save(stream, format=_FORMATS[path.suffix.lower()])
        Path(temporary).chmod(0o644)  # mkstemp's own mode is for secrets
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise PictureError(
            f"{path} cannot be written ({error}): free disk space or choose a folder that is writable"
        ) from error


def _draw_site(
    clear: Image.Image, box: tuple[float, float, float, float], grid: tuple[int, int], kept: Sequence[int]
) -> Image.Image:
    """``clear`` with the cells of ``grid`` over ``box`` darkened unless kept, and what is outside faded."""
    rows, columns = grid
    keep = np.zeros((rows, columns), bool)
    keep.flat[list(kept)] = True
    left, top, right, bottom = box
    edges_x = np.linspace(left, right, columns + 1)
    edges_y = np.linspace(top, bottom, rows + 1)

    # The cell of each pixel of the panel; −1 and columns (or rows) are outside of the model's input.
    column = np.searchsorted(edges_x, np.arange(clear.width) + 0.5, side="right") - 1
    row = np.searchsorted(edges_y, np.arange(clear.height) + 0.5, side="right") - 1
    seen = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
    kept_pixel = keep[np.clip(row, 0, rows - 1)[:, None], np.clip(column, 0, columns - 1)[None, :]]

    pixels = np.asarray(clear, np.float32)
    grey = np.asarray(clear.convert("L"), np.float32)[..., None]
    unseen = grey + (255 - grey) * _UNSEEN_FADE
    shown = np.where(kept_pixel[..., None], pixels, grey * _DROPPED_CONTRAST + _DROPPED_BLACK)
    shown = np.where(seen[..., None], shown, unseen)
    panel = Image.fromarray(np.clip(np.rint(shown), 0, 255).astype(np.uint8))
    _draw_borders(panel, keep, edges_x, edges_y)
    return panel


def _draw_borders(
    panel: Image.Image, keep: NDArray[np.bool_], edges_x: NDArray[np.float64], edges_y: NDArray[np.float64]
) -> None:
    """Faint lines between kept cells, bright ones where kept and dropped cells meet."""
    x, y = np.rint(edges_x).astype(int), np.rint(edges_y).astype(int)
    around = np.pad(keep, 1)
    draw = ImageDraw.Draw(panel, "RGBA")
    for border, wanted in ((_CELL_BORDER, 2), (_KEPT_BORDER, 1)):
        for i, j in np.argwhere(around[1:-1, :-1].astype(int) + around[1:-1, 1:] == wanted):
            draw.line((x[j], y[i], x[j], y[i + 1]), fill=border)
        for i, j in np.argwhere(around[:-1, 1:-1].astype(int) + around[1:, 1:-1] == wanted):
            draw.line((x[j], y[i], x[j + 1], y[i]), fill=border)


def _arrange(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels side by side under their titles, at most four in a row."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    width = max(_MIN_PANEL_WIDTH, panels[0][1].width)
    height = panels[0][1].height
    titles = [_wrap(title, font, width) for title, _ in panels]
    title_height = max(map(len, titles)) * _LINE_HEIGHT + 6
    num_columns = min(_MAX_PANELS_PER_ROW, len(panels))
    num_rows = -(-len(panels) // num_columns)
    step_x, step_y = width + _MARGIN, title_height + height + _MARGIN
    sheet = Image.new("RGB", (num_columns * step_x + _MARGIN, num_rows * step_y + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (lines, (_, panel)) in enumerate(zip(titles, panels, strict=True)):
        x = _MARGIN + index % num_columns * step_x
        y = _MARGIN + index // num_columns * step_y
        # The last line sits on the picture whatever the others need.
        first_y = y + title_height - 6 - len(lines) * _LINE_HEIGHT
        for number, line in enumerate(lines):
            draw.text((x, first_y + number * _LINE_HEIGHT), line, fill=_INK, font=font)
        sheet.paste(panel, (x + (width - panel.width) // 2, y + title_height))
    return sheet


def _wrap(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a title between words where it is wider than ``width`` pixels."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
