"""Pictures made ready for a vision tower."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.visual_layout import VisualGrid, VisualLayout


@dataclass(frozen=True)
class PreparedPictures:
    """What a vision graph takes, and what its output will mean.

    Attributes:
        inputs: The graph's inputs by name; floating-point ones are float32.
        layout: The visual tokens of the pictures.
    """

    inputs: Mapping[str, NDArray[Any]]
    layout: VisualLayout

    @classmethod
    def of_whole_tiles(cls, pixel_values: NDArray[np.float32], grid: tuple[int, int]) -> "PreparedPictures":
        """Pictures of one tile each, from pixels that are ready [M, 3, height, width].

        Args:
            pixel_values: Resized and normalised.
            grid: Visual tokens of a picture, rows and columns.
        """
        box = (0.0, 0.0, float(pixel_values.shape[3]), float(pixel_values.shape[2]))
        grids = [VisualGrid(image, *grid, box) for image in range(pixel_values.shape[0])]
        return cls({PIXEL_VALUES: pixel_values}, VisualLayout.of_whole_grids(grids))

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """The pixels, as the family's own processor gives them."""
        return self.inputs[PIXEL_VALUES]


class PicturePreprocessing(Protocol):
    """How a family turns pictures into tiles and pixels; a bundle holds it as data."""

    def prepare(self, images: Sequence[Image.Image], grid: tuple[int, int]) -> PreparedPictures:
        """Make pictures ready.

        Args:
            images: From :func:`edgeprune.runtimes.preprocessing.read_picture`; at least one.
            grid: Visual tokens of a tile, rows and columns, where tiles have a fixed size.

        Raises:
            PictureError: A picture cannot be made ready; the message says what to do.
        """

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, as the model sees it."""

    def to_json(self) -> dict[str, Any]:
        """All settings, as plain JSON."""
