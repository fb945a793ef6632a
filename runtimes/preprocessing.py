"""From a picture file to the pixels that the vision encoder reads, without torch and transformers.

The steps and their rounding are those of transformers' ``CLIPImageProcessor`` on Pillow, so that a bundle
answers what its checkpoint answers.
"""

import io
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edgeprune.errors import BundleError, PictureError
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.runtimes.settings_json import fields_from_json, fields_to_json
from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.visual_layout import VisualGrid, VisualLayout

PictureSource = str | Path | bytes | Image.Image | NDArray[np.uint8]

# Largest picture that is decoded or made by a resize; the size at which Pillow too assumes an attack.
MAX_PIXELS = 178_956_970

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

_NUM_CHANNELS = 3
# What Pillow's decoders raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


def read_picture(source: PictureSource) -> Image.Image:
    """Read one picture.

    A file is turned upright by its EXIF orientation and converted to RGB; a Pillow image is taken as it is.

    Args:
        source: A path, the bytes of a picture file, a Pillow image, or an array [H, W] or
            [H, W, 1, 3 or 4] uint8.

    Raises:
        PictureError: There is no such file, it is not a picture, it is damaged, empty or too large.
    """
    if isinstance(source, Image.Image):
        _check_size("the picture", *source.size)
        return _load("the picture", source)
    if isinstance(source, np.ndarray):
        return _picture_from_array(source)
    name = "the picture" if isinstance(source, bytes) else str(source)
    if name.startswith(("http://", "https://")):
        raise PictureError(f"{name} is an address: download the picture and give its path")
    picture = _open(name, source)
    _check_size(name, *picture.size)
    picture = _load(name, picture)
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except _DAMAGED as error:
        raise PictureError(f"{name} is damaged ({error}): save it again with an image editor") from error


def _open(name: str, source: str | Path | bytes) -> Image.Image:
    """Read the header only, so that the size is known before anything is decoded."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError as error:
        raise PictureError(f"{name} does not exist: check the path") from error
    except (OSError, ValueError) as error:
        raise PictureError(
            f"{name} cannot be read ({error}): give the path of a readable picture file"
        ) from error
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the limit below and raises at the limit; we only know one limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{name} has more than the {MAX_PIXELS} pixels that are decoded: scale it down first"
        ) from error
    except _DAMAGED as error:
        raise PictureError(
            f"{name} is not a picture that Pillow can read: convert it to PNG or JPEG"
        ) from error


def _load(name: str, picture: Image.Image) -> Image.Image:
    try:
        picture.load()
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise PictureError(f"{name} is truncated or damaged ({error}): copy or save it again") from error
    return picture


def _check_size(name: str, width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise PictureError(f"{name} is empty ({width} × {height}): give a picture with at least one pixel")
    if width * height > MAX_PIXELS:
        raise PictureError(
            f"{name} has {width} × {height} pixels, more than the {MAX_PIXELS} that are decoded: "
            "scale it down first"
        )


def _picture_from_array(array: NDArray[np.uint8]) -> Image.Image:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
    ):
        raise PictureError(
            f"an array of shape {list(array.shape)} {array.dtype} is not a picture: "
            "give uint8 of shape [height, width] or [height, width, 1, 3 or 4]"
        )
    height, width = array.shape[:2]
    _check_size("the picture", width, height)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def check_pixel_settings(
    resample: str,
    rescale_factor: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    convert_rgb: bool,
) -> None:
    """Refuse what the settings that every kind of preprocessing has cannot be, whatever their type.

    Raises:
        BundleError: With the setting and what it may be.
    """
    if resample not in RESAMPLING:
        raise BundleError(f"preprocessing resample must be one of {', '.join(RESAMPLING)}, not {resample!r}")
    if not _is_finite(rescale_factor) or rescale_factor <= 0:
        raise BundleError(f"preprocessing rescale_factor must be a positive number, not {rescale_factor!r}")
    for name, values in (("mean", mean), ("std", std)):
        if not (_is_tuple(values, _NUM_CHANNELS) and all(map(_is_finite, values))):
            raise BundleError(f"preprocessing {name} must be three numbers, not {values!r}")
    if min(std) <= 0:
        raise BundleError(f"preprocessing std must be positive, not {std!r}")
    if not isinstance(convert_rgb, bool):
        raise BundleError(f"preprocessing convert_rgb must be true or false, not {convert_rgb!r}")


def rgb_picture(image: Image.Image, *, convert: bool) -> Image.Image:
    """The picture in RGB, as models see it: what is transparent becomes white.

    Args:
        image: A picture of any mode.
        convert: Whether another mode than RGB is converted instead of refused.

    Raises:
        PictureError: It is not RGB and must be.
    """
    if not convert:
        if image.mode == "RGB":
            return image
        raise PictureError(f"a picture of mode {image.mode} is not RGB: convert it with .convert('RGB')")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def normalised_pixels(
    pixels: NDArray[np.uint8],
    rescale_factor: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> NDArray[np.float32]:
    """8-bit pixels [H, W, 3] → [3, H, W] float32, (pixels · factor − mean) / std by channel."""
    # transformers multiplies in float64 and normalizes in float32.
    rescaled = (pixels.transpose(2, 0, 1).astype(np.float64) * rescale_factor).astype(np.float32)
    shape = (_NUM_CHANNELS, 1, 1)
    normalised: NDArray[np.float32] = (rescaled - np.array(mean, np.float32).reshape(shape)) / np.array(
        std, np.float32
    ).reshape(shape)
    return normalised


@dataclass(frozen=True)
class ImagePreprocessing:
    """How the pictures of a model are resized, cropped and normalized.

    Attributes:
        shortest_edge: Pixels of the shorter side after the resize, which keeps the aspect ratio; or None.
        resize_to: (height, width) after the resize, or None. Exactly one of the two is given.
        resample: A name from :data:`RESAMPLING`.
        center_crop: (height, width) cut from the middle, padded with black where smaller; or None.
        rescale_factor: Multiplies the 8-bit values; 1 leaves them.
        mean: Per channel, subtracted after rescaling.
        std: Per channel, divides after subtracting the mean.
        convert_rgb: Pictures of other modes are converted; without it they are an error.
    """

    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    resample: str
    center_crop: tuple[int, int] | None
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    convert_rgb: bool = True

    def __post_init__(self) -> None:
        if (self.shortest_edge is None) == (self.resize_to is None):
            raise BundleError("preprocessing needs exactly one of shortest_edge and resize_to")
        if self.shortest_edge is not None and not _is_positive_int(self.shortest_edge):
            raise BundleError(
                f"preprocessing shortest_edge must be a positive integer, not {self.shortest_edge!r}"
            )
        for name in ("resize_to", "center_crop"):
            size = getattr(self, name)
            if size is not None and not (_is_tuple(size, 2) and all(map(_is_positive_int, size))):
                raise BundleError(f"preprocessing {name} must be a positive height and width, not {size!r}")
        if self.resize_to is None and self.center_crop is None:
            raise BundleError(
                "preprocessing needs center_crop or resize_to: the model's input has one fixed size"
            )
        check_pixel_settings(self.resample, self.rescale_factor, self.mean, self.std, self.convert_rgb)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ImagePreprocessing":
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: A field is unknown, missing or invalid.
        """
        return cls(**fields_from_json(cls, data, "preprocessing"))

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return fields_to_json(self)

    def prepare(self, images: Sequence[Image.Image], grid: tuple[int, int]) -> PreparedPictures:
        """Pictures of one tile each; see :class:`edgeprune.runtimes.pictures.PicturePreprocessing`."""
        rows, columns = grid
        grids = [
            VisualGrid(index, rows, columns, self.crop_box_in_picture(*image.size))
            for index, image in enumerate(images)
        ]
        return PreparedPictures({PIXEL_VALUES: self(images)}, VisualLayout.of_whole_grids(grids))

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the model's input in pixels."""
        size = self.center_crop or self.resize_to
        assert size is not None  # __post_init__ sees to it
        return size

    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Pixels of pictures from :func:`read_picture`: pixel_values [images, 3, height, width] float32.

        Raises:
            PictureError: A picture's aspect ratio is too extreme, or it is not RGB and must be.
        """
        height, width = self.input_size
        pixel_values = np.empty((len(images), _NUM_CHANNELS, height, width), np.float32)
        for image, out in zip(images, pixel_values, strict=True):
            _check_size("the picture", *image.size)
            pixels = self._crop(np.asarray(self._resize(self.to_rgb(image))))
            out[...] = normalised_pixels(pixels, self.rescale_factor, self.mean, self.std)
        return pixel_values

    def crop_box_in_picture(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Where the model's input lies in a picture of that size.

        Model input pixel (x, y) is at ``left + x · (right − left) / input_width`` and likewise for y.

        Returns:
            left, top, right, bottom in pixels of the picture; outside of it where the crop pads.
        """
        resized_height, resized_width = self._resized_size(width, height)
        input_height, input_width = self.input_size
        top, left = (resized_height - input_height) // 2, (resized_width - input_width) // 2
        scale_x, scale_y = width / resized_width, height / resized_height
        return left * scale_x, top * scale_y, (left + input_width) * scale_x, (top + input_height) * scale_y

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The picture in RGB, as the model sees it: what is transparent becomes white."""
        return rgb_picture(image, convert=self.convert_rgb)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        if self.resize_to is not None:
            return self.resize_to
        assert self.shortest_edge is not None  # __post_init__ sees to it
        short, long = min(width, height), max(width, height)
        resized_long = int(self.shortest_edge * long / short)
        if resized_long * self.shortest_edge > MAX_PIXELS:
            raise PictureError(
                f"a picture of {width} × {height} pixels is too long to be resized: "
                "crop it to a less extreme aspect ratio"
            )
        return (resized_long, self.shortest_edge) if width <= height else (self.shortest_edge, resized_long)

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self._resized_size(*image.size)
        return image.resize((width, height), resample=RESAMPLING[self.resample])

    def _crop(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut or pad [H, W, 3] to the input size; an odd rest goes to the bottom and right when cutting."""
        height, width = self.input_size
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        inside = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
        if inside.shape[:2] == (height, width):
            return inside
        padded = np.zeros((height, width, _NUM_CHANNELS), np.uint8)
        y, x = max(-top, 0), max(-left, 0)
        padded[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
        return padded


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_tuple(value: object, length: int) -> bool:
    return isinstance(value, tuple) and len(value) == length
