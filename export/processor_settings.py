"""The settings of a Hugging Face checkpoint's image processor: found, and refused where they say too much."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.checkpoint_weights import read_json
from edgeprune.errors import CheckpointError
from edgeprune.runtimes.preprocessing import RESAMPLING

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
RESAMPLE_NAMES = {int(filter_): name for name, filter_ in RESAMPLING.items()}


def read_settings(path: Path) -> tuple[Path, dict[str, Any]]:
    """The settings and the file they come from; nested ones win, as in transformers."""
    nested, flat = path / "processor_config.json", path / "preprocessor_config.json"
    if nested.is_file() and isinstance(settings := read_json(nested).get("image_processor"), dict):
        return nested, settings
    if flat.is_file():
        return flat, read_json(flat)
    raise CheckpointError(
        f"{path} has no preprocessor_config.json and no image_processor in processor_config.json: "
        "save the checkpoint's processor there with save_pretrained"
    )


def checked_settings(
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


def per_channel(value: float | list[float]) -> Any:
    """Three values of a setting that may be one for all channels."""
    return tuple(value) if isinstance(value, list) else (value,) * 3
