"""Pictures padded to a square before they are resized: the preprocessing of LLaVA's own code, ``expand2square``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edgeprune.errors import BundleError, PictureError
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.runtimes.preprocessing import MAX_PIXELS, ImagePreprocessing
from edgeprune.runtimes.settings_json import fields_from_json, fields_to_json
from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.visual_layout import VisualGrid, VisualLayout


@dataclass(frozen=True)
class SquarePadding:
    """How the pictures of a model are padded to a square, resized and normalized.

    Attributes:
        crop: What is done with the square.
        fill: Red, green and blue of the padding, 0 … 255.
    """

    crop: ImagePreprocessing
    fill: tuple[int, int, int]

    def __post_init__(self) -> None:
        valid = isinstance(self.fill, tuple) and len(self.fill) == 3
        if not valid or not all(type(value) is int and 0 <= value <= 255 for value in self.fill):
            raise BundleError(f"preprocessing fill must be three numbers from 0 to 255, not {self.fill!r}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SquarePadding":
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: A field is unknown, missing or invalid.
        """
        fields = fields_from_json(cls, data, "preprocessing")
        return cls(**fields | {"crop": ImagePreprocessing.from_json(fields["crop"])})

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return fields_to_json(self)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, as the model sees it: what is transparent becomes white."""
        return self.crop.to_rgb(image)

    def prepare(self, images: Sequence[Image.Image], grid: tuple[int, int]) -> PreparedPictures:
        """Pictures of one tile each; see :class:`edgeprune.runtimes.pictures.PicturePreprocessing`."""
        grids: list[VisualGrid] = []
        squares: list[Image.Image] = []
        for index, image in enumerate(images):
            square, left, top = self._pad(self.to_rgb(image))
            squares.append(square)
            box = self.crop.crop_box_in_picture(*square.size)
            shifted = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
            grids.append(VisualGrid(index, *grid, shifted))
        return PreparedPictures({PIXEL_VALUES: self.crop(squares)}, VisualLayout.of_whole_grids(grids))

    def _pad(self, picture: Image.Image) -> tuple[Image.Image, int, int]:
        """The square, and how far left and above the picture it begins."""
        side = max(picture.size)
        if side * side > MAX_PIXELS:
            raise PictureError(
                f"a picture of {picture.width} × {picture.height} pixels is too long to be padded to a square: "
                "crop it to a less extreme aspect ratio"
            )
        left, top = (side - picture.width) // 2, (side - picture.height) // 2
        square = Image.new("RGB", (side, side), self.fill)
        square.paste(picture, (left, top))
        return square, left, top
