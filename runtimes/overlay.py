"""A picture of what was pruned: one panel per site, dropped patches dark, kept ones clear."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edgeprune.errors import PictureError
from edgeprune.visual_layout import VisualLayout

Site = tuple[str, Sequence[int]]
"""A title, and the slots of the visual tokens that the site kept."""

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
    visual: VisualLayout,
    image: int,
    entering: Sequence[int],
    sites: Sequence[Site],
) -> Image.Image:
    """Draw the picture, then for each site the picture with its dropped patches darkened.

    A picture that is seen as a whole and in tiles gets two panels per site.

    Args:
        picture: In RGB, as the model saw it.
        visual: Where the visual tokens of the prompt stand.
        image: Which of the prompt's pictures this is.
        entering: Slots of the visual tokens that entered the decoder.
        sites: In the order in which the model prunes.

    Raises:
        PictureError: A kept slot lies outside the layout.
    """
    width, height = picture.size
    scale = min(_PICTURE_BOX[0] / width, _PICTURE_BOX[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resample = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    clear = picture.resize(size, resample)
    own = [index for index, grid in enumerate(visual.grids) if grid.image == image]
    views = {
        " · overview": [index for index in own if visual.grids[index].overview],
        "": [index for index in own if not visual.grids[index].overview],
    }

    panels = [(f"picture · {width} by {height} pixels", clear)]
    before = entering
    for title, kept in sites:
        if outside := [slot for slot in kept if not 0 <= slot < visual.places.shape[0]]:
            raise PictureError(
                f"{title} keeps slot {outside[0]}, outside the {visual.places.shape[0]} of the pictures: "
                "draw with the layout of the prompt that was pruned"
            )
        for view, grids in views.items():
            if not grids:
                continue
            here = [_places_on(visual, slots, grids) for slots in (kept, before)]
            cells = [_cells(visual, index, here[0], scale) for index in grids]
            panels.append(
                (f"{title}{view} · {len(here[0])} of {len(here[1])} kept", _draw_cells(clear, cells))
            )
        before = kept
    return _arrange(panels)


def _places_on(visual: VisualLayout, slots: Sequence[int], grids: Sequence[int]) -> NDArray[np.int64]:
    """[K, 3]: grid, row and column of the slots that lie on some grids."""
    places = visual.places[np.array(slots, np.int64)]
    on_grids: NDArray[np.int64] = places[np.isin(places[:, 0], grids)]
    return on_grids


def _cells(visual: VisualLayout, index: int, places: NDArray[np.int64], scale: float) -> "_Cells":
    grid = visual.grids[index]
    keep = np.zeros((grid.rows, grid.columns), bool)
    own = places[places[:, 0] == index]
    keep[own[:, 1], own[:, 2]] = True
    left, top, right, bottom = (edge * scale for edge in grid.box)
    return _Cells(keep, np.linspace(left, right, grid.columns + 1), np.linspace(top, bottom, grid.rows + 1))


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


class _Cells(NamedTuple):
    """One grid on a panel: which cells are kept [rows, columns], and their edges in pixels."""

    keep: NDArray[np.bool_]
    edges_x: NDArray[np.float64]
    edges_y: NDArray[np.float64]


def _draw_cells(clear: Image.Image, grids: Sequence[_Cells]) -> Image.Image:
    """``clear`` with the cells of grids darkened unless kept, and what is outside of all grids faded."""
    pixels = np.asarray(clear, np.float32)
    grey = np.asarray(clear.convert("L"), np.float32)[..., None]
    shown = grey + (255 - grey) * _UNSEEN_FADE
    dark = grey * _DROPPED_CONTRAST + _DROPPED_BLACK
    for keep, edges_x, edges_y in grids:
        rows, columns = keep.shape
        # The cell of each pixel of the panel; −1 and columns (or rows) are outside of the grid.
        column = np.searchsorted(edges_x, np.arange(clear.width) + 0.5, side="right") - 1
        row = np.searchsorted(edges_y, np.arange(clear.height) + 0.5, side="right") - 1
        seen = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
        kept = keep[np.clip(row, 0, rows - 1)[:, None], np.clip(column, 0, columns - 1)[None, :]]
        shown = np.where(seen[..., None], np.where(kept[..., None], pixels, dark), shown)
    panel = Image.fromarray(np.clip(np.rint(shown), 0, 255).astype(np.uint8))
    for keep, edges_x, edges_y in grids:
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
