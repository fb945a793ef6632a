"""Pictures of any resolution as tiles of one size: LLaVA-NeXT's preprocessing, without torch and transformers.

A picture is seen twice: stretched to one tile, and scaled to fit the best of the given resolutions, padded with black
and cut into tiles. The tiles' tokens stand in one joined grid; its rows and columns that show only padding are left
out, and each of its rows ends with a newline token.

Steps and rounding are those of transformers' ``LlavaNextImageProcessor`` on Pillow and of its ``unpad_image``, which
rounds to seven digits before it cuts off (since transformers #34522, in the model, and #35779, in the processor; older
versions cut off at once and differ by a row or column of some pictures).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.errors import BundleError
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.runtimes.preprocessing import MAX_PIXELS, RESAMPLING, ImagePreprocessing
from edgeprune.runtimes.settings_json import fields_from_json, fields_to_json
from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.visual_layout import Int64Array, VisualGrid, VisualLayout

# What transformers' LlavaNextConfig and LlavaNextImageProcessor assume.
DEFAULT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class Padded(NamedTuple):
    """Where a scaled picture lies in the resolution that it was padded to; all in pixels.

    Attributes:
        height: Of the resolution.
        width: Of the resolution.
        top: Padding above the picture.
        left: Padding on its left.
        scaled_height: Of the picture.
        scaled_width: Of the picture.
    """

    height: int
    width: int
    top: int
    left: int
    scaled_height: int
    scaled_width: int


class Unpadded(NamedTuple):
    """The part of a joined grid that shows the picture, newlines not counted.

    Attributes:
        top: Rows of the joined grid above it.
        left: Columns of the joined grid on its left.
        rows: Its rows.
        columns: Its columns.
    """

    top: int
    left: int
    rows: int
    columns: int


def best_resolution(width: int, height: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most of a picture, the smallest of those; the first of equal ones."""

    def rank(pinpoint: tuple[int, int]) -> tuple[int, int]:
        target_height, target_width = pinpoint
        scale = min(target_width / width, target_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - target_height * target_width

    return max(pinpoints, key=rank)


def fit(width: int, height: int, resolution: tuple[int, int]) -> Padded:
    """Scale a picture to fit a resolution; an odd rest of the padding goes to the bottom and right."""
    target_height, target_width = resolution
    scale_x, scale_y = target_width / width, target_height / height
    if scale_x < scale_y:
        scaled_width, scaled_height = target_width, min(math.ceil(height * scale_x), target_height)
    else:
        scaled_width, scaled_height = min(math.ceil(width * scale_y), target_width), target_height
    top, left = (target_height - scaled_height) // 2, (target_width - scaled_width) // 2
    return Padded(target_height, target_width, top, left, scaled_height, scaled_width)


def unpad(width: int, height: int, rows: int, columns: int) -> Unpadded:
    """The part of a joined grid of ``rows`` × ``columns`` tokens that shows a picture of that size."""
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
        return Unpadded(top, 0, rows - 2 * top, columns)
    left = (columns - int(round(width * (rows / height), 7))) // 2
    return Unpadded(0, left, rows, columns - 2 * left)


@dataclass(frozen=True)
class AnyresPreprocessing:
    """How the pictures of a model are cut into tiles, and tiles become pixels.

    Attributes:
        tile: How one tile becomes pixels: ``resize_to`` is its size, square.
        pinpoints: Resolutions (height, width) that a picture may be scaled to; multiples of a tile.
    """

    tile: ImagePreprocessing
    pinpoints: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        size = self.tile.resize_to
        if size is None or size[0] != size[1] or self.tile.center_crop is not None:
            raise BundleError("preprocessing tile must have a square resize_to and no center_crop")
        if not (isinstance(self.pinpoints, tuple) and self.pinpoints):
            raise BundleError(f"preprocessing pinpoints must be a list of sizes, not {self.pinpoints!r}")
        for pinpoint in self.pinpoints:
            if not _is_size(pinpoint) or any(side % size[0] for side in pinpoint):
                raise BundleError(
                    f"preprocessing pinpoint must be a height and width, multiples of {size[0]}, not {pinpoint!r}"
                )
            if pinpoint[0] * pinpoint[1] > MAX_PIXELS:
                raise BundleError(f"preprocessing pinpoint {pinpoint!r} has more than {MAX_PIXELS} pixels")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AnyresPreprocessing":
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: A field is unknown, missing or invalid.
        """
        fields = fields_from_json(cls, data, "preprocessing")
        return cls(**fields | {"tile": ImagePreprocessing.from_json(fields["tile"])})

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return fields_to_json(self)

    @property
    def side(self) -> int:
        """Pixels of a tile's side."""
        return self.tile.input_size[0]

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, as the model sees it: what is transparent becomes white."""
        return self.tile.to_rgb(image)

    def prepare(self, images: Sequence[Image.Image], grid: tuple[int, int]) -> PreparedPictures:
        """Pictures as tiles; see :class:`edgeprune.runtimes.pictures.PicturePreprocessing`."""
        tiles = [tile for image in images for tile in self.tiles(image)]
        sizes = [image.size for image in images]
        return PreparedPictures({PIXEL_VALUES: self.tile(tiles)}, self.layout(sizes, grid))

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        """The picture as a whole, then the tiles of its best resolution, row by row.

        Raises:
            PictureError: The picture is not RGB and must be.
        """
        picture = self.to_rgb(image)
        padded = fit(*picture.size, best_resolution(*picture.size, self.pinpoints))
        resample = RESAMPLING[self.tile.resample]
        canvas = Image.new("RGB", (padded.width, padded.height))
        scaled = picture.resize((padded.scaled_width, padded.scaled_height), resample=resample)
        canvas.paste(scaled, (padded.left, padded.top))
        corners = [
            (left, top)
            for top in range(0, padded.height, self.side)
            for left in range(0, padded.width, self.side)
        ]
        return [
            picture,
            *(canvas.crop((left, top, left + self.side, top + self.side)) for left, top in corners),
        ]

    def layout(self, sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> VisualLayout:
        """Where the tokens of pictures stand.

        Args:
            sizes: (width, height) of each picture.
            grid: Visual tokens of a tile, rows and columns.
        """
        grids: list[VisualGrid] = []
        places: list[Int64Array] = []
        newlines: list[Int64Array] = []
        order: list[Int64Array] = []
        # Newlines get the slots behind those of all tiles.
        pinpoints = [best_resolution(*size, self.pinpoints) for size in sizes]
        num_tiles = [1 + height * width // self.side**2 for height, width in pinpoints]
        next_slot, next_newline = 0, sum(num_tiles) * grid[0] * grid[1]
        for image, ((width, height), pinpoint) in enumerate(zip(sizes, pinpoints, strict=True)):
            box = (0.0, 0.0, float(width), float(height))
            grids.append(VisualGrid(image, *grid, box, overview=True))
            base = _grid_places(len(grids) - 1, *grid)
            base_slots = next_slot + np.arange(base.shape[0], dtype=np.int64)
            places.append(base)
            order.append(base_slots)
            next_slot += base.shape[0]

            tile_rows, tile_columns = pinpoint[0] // self.side, pinpoint[1] // self.side
            rows, columns = tile_rows * grid[0], tile_columns * grid[1]
            # Slots run through a tile before the next one begins.
            slots = next_slot + np.arange(rows * columns, dtype=np.int64)
            joined = (
                slots.reshape(tile_rows, tile_columns, *grid).transpose(0, 2, 1, 3).reshape(rows, columns)
            )
            seen = unpad(width, height, rows, columns)
            shown = joined[seen.top : seen.top + seen.rows, seen.left : seen.left + seen.columns]
            own = np.tile(np.array([-1, 0, 0], np.int64), (rows * columns, 1))
            # A thin picture may leave no row, or no column but that of the newlines.
            if seen.rows:
                index = len(grids)
                own[(shown - next_slot).ravel()] = _grid_places(index, *shown.shape)
                box = self._box(width, height, pinpoint, grid, seen)
                grids.append(VisualGrid(image, seen.rows, seen.columns + 1, box))
                row = np.arange(seen.rows, dtype=np.int64)
                newlines.append(
                    np.stack((np.full_like(row, index), row, np.full_like(row, seen.columns)), axis=1)
                )
                order.append(np.concatenate((shown, next_newline + row[:, None]), axis=1).ravel())
                next_newline += seen.rows
            places.append(own)
            next_slot += rows * columns
        inserted = sum(rows.shape[0] for rows in newlines)
        empty = np.zeros((0, 3), np.int64)
        return VisualLayout(
            tuple(grids), np.concatenate((empty, *places, *newlines)), np.concatenate(order), inserted
        )

    def _box(
        self, width: int, height: int, pinpoint: tuple[int, int], grid: tuple[int, int], seen: Unpadded
    ) -> tuple[float, float, float, float]:
        """Where the joined grid lies in the picture; its last column, the newlines, on the right of it."""
        padded = fit(width, height, pinpoint)
        cell_height, cell_width = self.side / grid[0], self.side / grid[1]
        scale_x, scale_y = width / padded.scaled_width, height / padded.scaled_height
        left = (seen.left * cell_width - padded.left) * scale_x
        top = (seen.top * cell_height - padded.top) * scale_y
        right = left + (seen.columns + 1) * cell_width * scale_x
        return left, top, right, top + seen.rows * cell_height * scale_y


def _grid_places(grid: int, rows: int, columns: int) -> NDArray[np.int64]:
    """Grid, row and column of a grid's cells, row by row, [rows·columns, 3]."""
    row, column = np.mgrid[:rows, :columns]
    places = np.stack((np.full(row.size, grid), row.ravel(), column.ravel()), axis=1)
    return places.astype(np.int64)


def _is_size(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in value)
    )
