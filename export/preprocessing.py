"""The image processor settings of a Hugging Face checkpoint, as data for the bundle."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.errors import BundleError, CheckpointError
from edgeprune.runtimes.anyres import DEFAULT_PINPOINTS, AnyresPreprocessing
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.preprocessing import RESAMPLING, ImagePreprocessing
from edgeprune.runtimes.square_padding import SquarePadding

_CLIP_CLASSES = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)

_LLAVA_CLASSES = ("LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil")
_ANYRES_CLASSES = ("LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil")

# What CLIPImageProcessor assumes for the keys that a checkpoint leaves out.
_CLIP_DEFAULTS: dict[str, Any] = {
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

# Keys that say nothing about the pixels.
_INERT = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_processor_class",
    "_valid_processor_keys",
    "aspect_ratio_setting",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "image_seq_length",
    "input_data_format",
    "return_tensors",
}

# Pillow's numbers, which checkpoints use.
_RESAMPLE_NAMES = {int(filter_): name for name, filter_ in RESAMPLING.items()}


def picture_preprocessing_from_checkpoint(path: Path, model_type: str) -> PicturePreprocessing:
    """Read the image processor settings of a checkpoint.

    Args:
        path: The checkpoint's folder.
        model_type: Its family.

    Raises:
        CheckpointError: There are no settings, they are for another processor, or an option is not supported.
    """
    return _READERS[model_type](path)


def image_preprocessing_from_checkpoint(path: Path) -> ImagePreprocessing:
    """Read processor_config.json or preprocessor_config.json of a LLaVA checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend ("Fast") resamples
    slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, or an option is not supported.
    """
    source, settings = _read_settings(path)
    return _from_clip_settings(source, _checked(source, settings, _CLIP_CLASSES, _CLIP_DEFAULTS))


def llava_preprocessing_from_checkpoint(path: Path) -> PicturePreprocessing:
    """Read the settings of CLIP's image processor, or of LLaVA's own, which may pad pictures to a square.

    Raises:
        CheckpointError: There are no settings, they are for another processor, or an option is not supported.
    """
    source, settings = _read_settings(path)
    if settings.get("image_processor_type") not in _LLAVA_CLASSES:
        return image_preprocessing_from_checkpoint(path)
    checked = _checked(source, settings, _LLAVA_CLASSES, {**_CLIP_DEFAULTS, "do_pad": False})
    crop = _from_clip_settings(source, checked)
    if not checked["do_pad"]:
        return crop
    red, green, blue = (int(255 * value) for value in _per_channel(checked["image_mean"]))
    return SquarePadding(crop, (red, green, blue))


def anyres_preprocessing_from_checkpoint(path: Path) -> AnyresPreprocessing:
    """Read processor_config.json or preprocessor_config.json of a LLaVA-NeXT checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend resamples slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, they contradict config.json, or an
            option is not supported.
    """
    source, settings = _read_settings(path)
    # transformers pads a batch to equally many tiles, which the model takes off again.
    defaults = {**_CLIP_DEFAULTS, "image_grid_pinpoints": DEFAULT_PINPOINTS, "do_pad": True}
    checked = _checked(source, settings, _ANYRES_CLASSES, defaults)
    # A tile has the size of its crop already.
    crop = _from_clip_settings(source, {**checked, "do_center_crop": True})
    side, sizes = crop.input_size[0], {crop.shortest_edge, *(crop.resize_to or ()), *crop.input_size} - {None}
    config = _read_object(path / "config.json")
    expected = (config.get("vision_config") or {}).get("image_size", 336)
    if sizes != {expected}:
        raise CheckpointError(
            f"{source} has size {checked['size']} and crop_size {checked['crop_size']}, supported: both "
            f"{expected}, the side of the vision tower's input"
        )
    pinpoints = _pinpoints(source, checked["image_grid_pinpoints"])
    stated = config.get("image_grid_pinpoints")
    if pinpoints != _pinpoints(path / "config.json", DEFAULT_PINPOINTS if stated is None else stated):
        raise CheckpointError(
            f"{source} and {path / 'config.json'} have different image_grid_pinpoints: correct the one that is wrong"
        )
    try:
        return AnyresPreprocessing(
            replace(crop, shortest_edge=None, resize_to=(side, side), center_crop=None), pinpoints
        )
    except BundleError as error:
        raise CheckpointError(f"{source} does not describe a usable preprocessing: {error}") from error


def clip_preprocessing(side: int) -> ImagePreprocessing:
    """What CLIPImageProcessor does by default, for an input of that size."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return _from_clip_settings(Path("CLIPImageProcessor"), {**_CLIP_DEFAULTS, **sizes})


def _pinpoints(source: Path, value: Any) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(height), int(width)) for height, width in value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} has image_grid_pinpoints {value!r}, expected pairs of height and width"
        ) from error


def _checked(
    source: Path, settings: dict[str, Any], classes: Sequence[str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """The settings with defaults, if they are for one of the classes and nothing in them is unknown."""
    class_name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if class_name not in classes:
        raise CheckpointError(
            f"{source} asks for the image processor {class_name}, which is not supported: "
            f"use one of {', '.join(classes)}"
        )
    for key, value in settings.items():
        if key not in defaults and key not in _INERT and value not in (None, False):
            raise CheckpointError(
                f"{source} sets {key} to {value!r}, which is not supported: "
                "remove it if the model works without it"
            )
    return {**defaults, **{key: value for key, value in settings.items() if value is not None}}


def _from_clip_settings(source: Path, settings: dict[str, Any]) -> ImagePreprocessing:
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
    resample = _RESAMPLE_NAMES.get(settings["resample"])
    if resample is None:
        raise CheckpointError(f"{source} has resample {settings['resample']!r}: use one of {_RESAMPLE_NAMES}")
    try:
        return ImagePreprocessing(
            shortest_edge=size.get("shortest_edge"),
            resize_to=(size["height"], size["width"]) if "height" in size else None,
            resample=resample,
            center_crop=(crop["height"], crop["width"]) if settings["do_center_crop"] else None,
            rescale_factor=settings["rescale_factor"] if settings["do_rescale"] else 1.0,
            mean=_per_channel(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0),
            std=_per_channel(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0),
            convert_rgb=settings["do_convert_rgb"],
        )
    except (BundleError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source} does not describe a usable preprocessing: {error}") from error


_READERS: dict[str, Callable[[Path], PicturePreprocessing]] = {
    "llava": llava_preprocessing_from_checkpoint,
    "llava_next": anyres_preprocessing_from_checkpoint,
}


def _per_channel(value: float | list[float]) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) * 3


def _read_settings(path: Path) -> tuple[Path, dict[str, Any]]:
    """The settings and the file they come from; nested ones win, as in transformers."""
    nested, flat = path / "processor_config.json", path / "preprocessor_config.json"
    if nested.is_file() and isinstance(settings := _read_object(nested).get("image_processor"), dict):
        return nested, settings
    if flat.is_file():
        return flat, _read_object(flat)
    raise CheckpointError(
        f"{path} has no preprocessor_config.json and no image_processor in processor_config.json: "
        "save the checkpoint's processor there with save_pretrained"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}): download the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: download the checkpoint again")
    return data
