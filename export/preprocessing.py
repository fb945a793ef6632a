"""The image processor settings of a Hugging Face checkpoint, as data for the bundle."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import BundleError, CheckpointError
from edgeprune.runtimes.flat_patches import PatchPreprocessing
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.preprocessing import RESAMPLING, ImagePreprocessing
from edgeprune.runtimes.tiling import TilePreprocessing

_CLIP_CLASSES = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)

_TILE_CLASSES = ("GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast", "GotOcr2ImageProcessorPil")

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

# What GotOcr2ImageProcessor assumes; InternVLProcessor tells it to cut pictures into tiles, whatever the file says.
_TILE_DEFAULTS: dict[str, Any] = {
    **_CLIP_DEFAULTS,
    "size": {"height": 384, "width": 384},
    "do_center_crop": False,
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 12,
}

_PATCH_CLASSES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")

# What Qwen2VLImageProcessor assumes.
_PATCH_DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {},
    "min_pixels": None,
    "max_pixels": None,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280

# Keys that say nothing about the pixels.
_INERT = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_processor_class",
    "_valid_processor_keys",
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


def tile_preprocessing_from_checkpoint(path: Path) -> TilePreprocessing:
    """Read processor_config.json or preprocessor_config.json of an InternVL checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend resamples slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, they contradict config.json, or an
            option is not supported.
    """
    source, settings = _read_settings(path)
    checked = _checked(source, settings, _TILE_CLASSES, _TILE_DEFAULTS)
    tile = _from_clip_settings(source, checked)
    expected = (_read_object(path / "config.json").get("vision_config") or {}).get("image_size", 448)
    side = expected[0] if isinstance(expected, list) and expected else expected
    if tile.resize_to != (side, side) or tile.center_crop is not None:
        raise CheckpointError(
            f"{source} has size {checked['size']}, supported: height and width {side}, the side of the vision "
            "tower's input, without a crop"
        )
    try:
        return TilePreprocessing(tile, checked["min_patches"], checked["max_patches"])
    except BundleError as error:
        raise CheckpointError(f"{source} does not describe a usable preprocessing: {error}") from error


def patch_preprocessing_from_checkpoint(path: Path) -> PatchPreprocessing:
    """Read processor_config.json or preprocessor_config.json of a Qwen2-VL or Qwen2.5-VL checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend resamples slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, they contradict config.json, or an
            option is not supported.
    """
    source, given = _read_settings(path)
    settings = _checked(source, given, _PATCH_CLASSES, _PATCH_DEFAULTS)
    if not settings["do_resize"]:
        raise CheckpointError(f"{source} sets do_resize to false: set it to true, pictures have any size")
    config = _read_object(path / "config.json")
    vision = config.get("vision_config") or {}
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        expected = vision.get(theirs, _PATCH_DEFAULTS[ours])
        if settings[ours] != expected:
            raise CheckpointError(
                f"{source} has {ours} {settings[ours]!r}, config.json's vision_config {theirs} {expected!r}: "
                "correct the one that is wrong"
            )
    resample = _RESAMPLE_NAMES.get(settings["resample"])
    if resample is None:
        raise CheckpointError(f"{source} has resample {settings['resample']!r}: use one of {_RESAMPLE_NAMES}")
    windows = vision.get("window_size", 112) if config.get("model_type") == "qwen2_5_vl" else 0
    try:
        least, most = _pixel_limits(source, settings)
        return PatchPreprocessing(
            min_pixels=least,
            max_pixels=most,
            patch_size=settings["patch_size"],
            temporal_patch_size=settings["temporal_patch_size"],
            merge_size=settings["merge_size"],
            window_tokens=windows // settings["merge_size"] // settings["patch_size"],
            resample=resample,
            rescale_factor=settings["rescale_factor"] if settings["do_rescale"] else 1.0,
            mean=_per_channel(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0),
            std=_per_channel(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0),
            convert_rgb=settings["do_convert_rgb"],
        )
    except (BundleError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} does not describe a usable preprocessing: {error}") from error


def _pixel_limits(source: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Fewest and most pixels: named since 2024 in three ways, the first of which wins."""
    size = settings["size"]
    known = {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
    if not isinstance(size, dict) or {key for key, value in size.items() if value is not None} - known:
        raise CheckpointError(
            f"{source} has size {size!r}: only shortest_edge and longest_edge, which are numbers of pixels, "
            "are supported"
        )

    def limit(named: str, edge: str, default: int) -> Any:
        found = (settings[named], size.get(edge), size.get(named), default)
        return next(value for value in found if value is not None)

    return limit("min_pixels", "shortest_edge", _MIN_PIXELS), limit("max_pixels", "longest_edge", _MAX_PIXELS)


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
    "llava": image_preprocessing_from_checkpoint,
    "internvl": tile_preprocessing_from_checkpoint,
    "qwen2_vl": patch_preprocessing_from_checkpoint,
    "qwen2_5_vl": patch_preprocessing_from_checkpoint,
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
