"""Settings of LLaVA-NeXT's image processor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeprune.checkpoint_weights import read_json
from edgeprune.errors import BundleError, CheckpointError
from edgeprune.export.crop_settings import CLIP_DEFAULTS, crop_from_settings
from edgeprune.export.processor_settings import checked_settings, read_settings
from edgeprune.runtimes.anyres import DEFAULT_PINPOINTS, AnyresPreprocessing

_ANYRES_CLASSES = ("LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil")


def anyres_preprocessing_from_checkpoint(path: Path) -> AnyresPreprocessing:
    """Read processor_config.json or preprocessor_config.json of a LLaVA-NeXT checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend resamples slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, they contradict config.json, or an
            option is not supported.
    """
    source, settings = read_settings(path)
    # transformers pads a batch to equally many tiles, which the model takes off again.
    defaults = {**CLIP_DEFAULTS, "image_grid_pinpoints": DEFAULT_PINPOINTS, "do_pad": True}
    checked = checked_settings(source, settings, _ANYRES_CLASSES, defaults)
    # A tile has the size of its crop already.
    crop = crop_from_settings(source, {**checked, "do_center_crop": True})
    side, sizes = crop.input_size[0], {crop.shortest_edge, *(crop.resize_to or ()), *crop.input_size} - {None}
    config = read_json(path / "config.json")
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


def _pinpoints(source: Path, value: Any) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(height), int(width)) for height, width in value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} has image_grid_pinpoints {value!r}, expected pairs of height and width"
        ) from error
