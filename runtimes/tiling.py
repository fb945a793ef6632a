"""Pictures cut into tiles of one size, and seen as a whole beside them: InternVL's preprocessing.

Without torch and transformers. A picture is stretched to a rectangle of tiles whose aspect ratio is the nearest to its
own, and to one tile more, the overview; a picture that gets one tile has no overview beside it.

The steps and their rounding are those of transformers' ``GotOcr2ImageProcessor`` on Pillow, as ``InternVLProcessor``
calls it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edgeprune.errors import BundleError
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.runtimes.preprocessing import MAX_PIXELS, RESAMPLING, ImagePreprocessing
from edgeprune.runtimes.settings_json import fields_from_json, fields_to_json
from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.visual_layout import VisualGrid, VisualLayout


@dataclass(frozen=True)
class TilePreprocessing:
    """How the pictures of a model are cut into tiles, and tiles become pixels.

    Attributes:
        tile: How one tile becomes pixels: ``resize_to`` is its size.
        min_tiles: Fewest tiles of a picture, the overview not counted.
        max_tiles: Most tiles of a picture, the overview not counted.
    """

    tile: ImagePreprocessing
    min_tiles: int
    max_tiles: int

    def __post_init__(self) -> None:
        if self.tile.resize_to is None or self.tile.center_crop is not None:
            raise BundleError("preprocessing tile must have resize_to and no center_crop")
        for name in ("min_tiles", "max_tiles"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BundleError(f"preprocessing {name} must be a positive integer, not {value!r}")
        if self.min_tiles > self.max_tiles:
            raise BundleError(
                f"preprocessing min_tiles must be at most max_tiles, {self.max_tiles}, not {self.min_tiles}"
            )
        height, width = self.tile.resize_to
        if self.max_tiles * height * width > MAX_PIXELS:
            raise BundleError(
                f"preprocessing max_tiles {self.max_tiles} of {height} × {width} are more than {MAX_PIXELS} pixels"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TilePreprocessing":
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: A field is unknown, missing or invalid.
        """
        fields = fields_from_json(cls, data, "preprocessing")
        return cls(**fields | {"tile": ImagePreprocessing.from_json(fields["tile"])})

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return fields_to_json(self)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, as the model sees it: what is transparent becomes white."""
        return self.tile.to_rgb(image)

    def prepare(self, images: Sequence[Image.Image], grid: tuple[int, int]) -> PreparedPictures:
        """Pictures as tiles, row by row, the overview last.

        See :class:`edgeprune.runtimes.pictures.PicturePreprocessing`.
        """
        tiles: list[Image.Image] = []
        grids: list[VisualGrid] = []
        for index, image in enumerate(images):
            rows, columns = self.tiles_of(*image.size)
            tiles += self._cut(image, rows, columns)
            width, height = image.size
            grids += [
                VisualGrid(
                    index,
                    *grid,
                    (
                        column * width / columns,
                        row * height / rows,
                        (column + 1) * width / columns,
                        (row + 1) * height / rows,
                    ),
                )
                for row in range(rows)
                for column in range(columns)
            ]
            if rows * columns > 1:
                grids.append(VisualGrid(index, *grid, (0.0, 0.0, float(width), float(height)), overview=True))
        return PreparedPictures({PIXEL_VALUES: self.tile(tiles)}, VisualLayout.of_whole_grids(grids))

    def tiles_of(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles of a picture of that size, the overview not counted.

        The aspect ratio is the nearest to the picture's. Of equally near ones the smallest is taken, unless the
        picture has more than half of the pixels of a larger one.
        """
        tile_height, tile_width = self.tile.input_size
        most = range(1, self.max_tiles + 1)
        candidates = [
            (columns, rows)
            for columns in most
            for rows in most
            if self.min_tiles <= columns * rows <= self.max_tiles
        ]
        best, best_distance = (1, 1), float("inf")
        # Of equally many tiles, the fewest columns first: the order decides between equally near ones.
        for columns, rows in sorted(candidates, key=lambda size: size[0] * size[1]):
            distance = abs(width / height - columns / rows)
            fills = width * height > 0.5 * tile_height * tile_width * columns * rows
            if distance < best_distance or (distance == best_distance and fills):
                best, best_distance = (rows, columns), distance
        return best

    def _cut(self, image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
        """The tiles row by row, then the whole picture."""
        picture = self.to_rgb(image)
        if rows * columns == 1:
            return [picture]
        height, width = self.tile.input_size
        stretched = picture.resize((columns * width, rows * height), RESAMPLING[self.tile.resample])
        cut = [
            stretched.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
            for row in range(rows)
            for column in range(columns)
        ]
        return [*cut, picture]
