"""Settings of CLIP's image processor, and of LLaVA's own."""

from pathlib import Path
from typing import Any

from edgeprune.errors import BundleError, CheckpointError
from edgeprune.export.processor_settings import RESAMPLE_NAMES, checked_settings, per_channel, read_settings
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.preprocessing import ImagePreprocessing
from edgeprune.runtimes.square_padding import SquarePadding

_CLIP_CLASSES = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)
_LLAVA_CLASSES = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")

# What CLIPImageProcessor assumes for the keys that a checkpoint leaves out.
CLIP_DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def image_preprocessing_from_checkpoint(path: Path) -> ImagePreprocessing:
    """Read processor_config.json or preprocessor_config.json of a LLaVA checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend ("Fast") resamples
    slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, or an option is not supported.
    """
    source, settings = read_settings(path)
    return crop_from_settings(source, checked_settings(source, settings, _CLIP_CLASSES, CLIP_DEFAULTS))


def llava_preprocessing_from_checkpoint(path: Path) -> PicturePreprocessing:
    """Read the settings of CLIP's image processor, or of LLaVA's own, which may pad pictures to a square.

    Raises:
        CheckpointError: There are no settings, they are for another processor, or an option is not supported.
    """
    source, settings = read_settings(path)
    if settings.get("image_processor_type") not in _LLAVA_CLASSES:
        return image_preprocessing_from_checkpoint(path)
    checked = checked_settings(source, settings, _LLAVA_CLASSES, {**CLIP_DEFAULTS, "do_pad": False})
    crop = crop_from_settings(source, checked)
    if not checked["do_pad"]:
        return crop
    red, green, blue = (int(255 * value) for value in per_channel(checked["image_mean"]))
    return SquarePadding(crop, (red, green, blue))


def clip_preprocessing(side: int) -> ImagePreprocessing:
    """What CLIPImageProcessor does by default, for an input of that size."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return crop_from_settings(Path("CLIPImageProcessor"), {**CLIP_DEFAULTS, **sizes})


def crop_from_settings(source: Path, settings: dict[str, Any]) -> ImagePreprocessing:
    """A resize and a crop, from settings that name every key of ``CLIP_DEFAULTS``.

    Raises:
        CheckpointError: A value is not supported.
    """
    if not settings["do_resize"]:
        raise CheckpointError(f"{source} sets do_resize to false: set it to true, pictures have any size")
    size = settings["size"] if isinstance(settings["size"], dict) else {"shortest_edge": settings["size"]}
    crop = settings["crop_size"]
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    size = {key: value for key, value in size.items() if value is not None}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise CheckpointError(
            f"{source} has size {size}: only shortest_edge, or height and width, are supported"
        )
    resample = RESAMPLE_NAMES.get(settings["resample"])
    if resample is None:
        raise CheckpointError(f"{source} has resample {settings['resample']!r}: use one of {RESAMPLE_NAMES}")
    try:
        return ImagePreprocessing(
            shortest_edge=size.get("shortest_edge"),
            resize_to=(size["height"], size["width"]) if "height" in size else None,
            resample=resample,
            center_crop=(crop["height"], crop["width"]) if settings["do_center_crop"] else None,
            rescale_factor=settings["rescale_factor"] if settings["do_rescale"] else 1.0,
            mean=per_channel(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0),
            std=per_channel(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0),
            convert_rgb=settings["do_convert_rgb"],
        )
    except (BundleError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source} does not describe a usable preprocessing: {error}") from error
