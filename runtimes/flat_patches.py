"""Pictures of any size as one row of flattened patches, as Qwen2-VL's tower reads them; no torch, no transformers.

The steps and their rounding are those of transformers' ``Qwen2VLImageProcessorPil``. Pictures only, no video.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune import tensor_names as names
from edgeprune.errors import BundleError, PictureError
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.runtimes.preprocessing import (
    MAX_PIXELS,
    RESAMPLING,
    check_pixel_settings,
    normalised_pixels,
    rgb_picture,
)
from edgeprune.runtimes.settings_json import fields_from_json, fields_to_json
from edgeprune.visual_layout import Int64Array, VisualGrid, VisualLayout

# Qwen2-VL was not trained on longer strips.
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class PatchPreprocessing:
    """How pictures keep their aspect ratio and become patches.

    Attributes:
        min_pixels: Smaller pictures are enlarged to at least as many.
        max_pixels: Larger ones are reduced to at most as many.
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Frames of a patch; a picture is repeated as often.
        merge_size: Side in patches of the block that becomes one visual token; sides are multiples of it.
        window_tokens: Side of an attention window in visual tokens; 0 = the tower has no windows.
        resample: A name from :data:`edgeprune.runtimes.preprocessing.RESAMPLING`.
        rescale_factor: Multiplies the 8-bit values; 1 leaves them.
        mean: Per channel, subtracted after rescaling.
        std: Per channel, divides after subtracting the mean.
        convert_rgb: Pictures of other modes are converted; without it they are an error.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_tokens: int
    resample: str
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    convert_rgb: bool = True

    def __post_init__(self) -> None:
        least = {"window_tokens": 0}
        for name in (
            "min_pixels",
            "max_pixels",
            "patch_size",
            "temporal_patch_size",
            "merge_size",
            "window_tokens",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least.get(name, 1):
                raise BundleError(
                    f"preprocessing {name} must be an integer of at least {least.get(name, 1)}, not {value!r}"
                )
        if not self.factor**2 <= self.max_pixels <= MAX_PIXELS or self.min_pixels > self.max_pixels:
            raise BundleError(
                f"preprocessing min_pixels {self.min_pixels} and max_pixels {self.max_pixels} must be in order, "
                f"max_pixels between {self.factor**2} (one visual token) and {MAX_PIXELS}"
            )
        check_pixel_settings(self.resample, self.rescale_factor, self.mean, self.std, self.convert_rgb)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PatchPreprocessing":
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: A field is unknown, missing or invalid.
        """
        return cls(**fields_from_json(cls, data, "preprocessing"))

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return fields_to_json(self)

    @property
    def factor(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch_size * self.merge_size

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, as the model sees it: what is transparent becomes white."""
        return rgb_picture(image, convert=self.convert_rgb)

    def prepare(self, images: Sequence[Image.Image], grid: tuple[int, int]) -> PreparedPictures:
        """Patches of all pictures; see :class:`edgeprune.runtimes.pictures.PicturePreprocessing`.

        Shapes:
            pixel_values: [patches, 3 · frames · side²] float32; patch_positions: [patches, 2];
            picture_rows: [pictures, most patches of one]; window_rows: [windows, patches of a whole one].

        Raises:
            PictureError: A picture's aspect ratio is too extreme, or it is not RGB and must be.
        """
        del grid  # pictures keep their size
        sizes = [self.resized_size(*image.size) for image in images]
        grids = [(height // self.patch_size, width // self.patch_size) for height, width in sizes]
        pixels = [self._patches(image, size) for image, size in zip(images, sizes, strict=True)]
        inputs = {
            names.PIXEL_VALUES: np.concatenate(pixels),
            names.PATCH_POSITIONS: np.concatenate([self._positions(*size) for size in grids]),
            names.PICTURE_ROWS: _picture_rows([rows * columns for rows, columns in grids]),
        }
        if self.window_tokens:
            inputs[names.WINDOW_ROWS] = self._window_rows(grids)
        layout = VisualLayout.of_whole_grids(
            [
                VisualGrid(
                    index,
                    rows // self.merge_size,
                    columns // self.merge_size,
                    (0.0, 0.0, float(image.width), float(image.height)),
                )
                for index, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True))
            ]
        )
        return PreparedPictures(inputs, layout)

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to: multiples of a visual token's side, pixels within the limits.

        Raises:
            PictureError: One side is more than 200 times the other.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise PictureError(
                f"a picture of {width} × {height} pixels is longer than {MAX_ASPECT_RATIO} times its width: "
                "crop it to a less extreme aspect ratio"
            )
        factor = self.factor
        # Python rounds halves to even, as transformers does.
        resized = round(height / factor) * factor, round(width / factor) * factor
        if resized[0] * resized[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return (
                max(factor, math.floor(height / shrink / factor) * factor),
                max(factor, math.floor(width / shrink / factor) * factor),
            )
        if resized[0] * resized[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
        return resized

    def _patches(self, image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
        """[rows · columns, 3 · frames · side²], block by block, a block's patches row by row."""
        height, width = size
        resized = self.to_rgb(image).resize((width, height), resample=RESAMPLING[self.resample])
        side, merge = self.patch_size, self.merge_size
        pixels = normalised_pixels(np.asarray(resized), self.rescale_factor, self.mean, self.std)
        blocks = pixels.reshape(3, height // self.factor, merge, side, width // self.factor, merge, side)
        # Block row, block column, row and column in the block, channel, frame, pixel row, pixel column.
        ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        repeated = np.repeat(ordered, self.temporal_patch_size, axis=5)
        patches: NDArray[np.float32] = repeated.reshape(height * width // side**2, -1)
        return patches

    def _positions(self, rows: int, columns: int) -> Int64Array:
        """[rows · columns, 2], row and column of every patch in the order of :meth:`_patches`."""
        merge = self.merge_size
        blocks = np.mgrid[:rows, :columns].reshape(2, rows // merge, merge, columns // merge, merge)
        positions: Int64Array = blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2).astype(np.int64)
        return positions

    def _window_rows(self, grids: Sequence[tuple[int, int]]) -> Int64Array:
        """[windows, patches of a whole window]; windows at the right and bottom edge may hold fewer."""
        side, per_token = self.window_tokens, self.merge_size**2
        windows: list[Int64Array] = []
        first = 0
        for rows, columns in grids:
            tokens = np.arange(rows * columns // per_token).reshape(
                rows // self.merge_size, columns // self.merge_size
            )
            for top in range(0, tokens.shape[0], side):
                for left in range(0, tokens.shape[1], side):
                    own = tokens[top : top + side, left : left + side].reshape(-1, 1)
                    windows.append((first + own * per_token + np.arange(per_token)).ravel())
            first += rows * columns
        return _padded(windows, side**2 * per_token)


def _picture_rows(counts: Sequence[int]) -> Int64Array:
    """[pictures, most patches of one]."""
    ends = np.cumsum(counts)
    return _padded([np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)], max(counts))


def _padded(groups: Sequence[NDArray[Any]], length: int) -> Int64Array:
    """Rows of indices with -1 behind each one's last."""
    rows = np.full((len(groups), length), -1, np.int64)
    for row, group in zip(rows, groups, strict=True):
        row[: group.size] = group
    return rows
