"""Settings of Qwen2-VL's image processor, which Qwen2.5-VL and Qwen3-VL have, too."""

from pathlib import Path
from typing import Any

from edgeprune.checkpoint_weights import read_json
from edgeprune.errors import BundleError, CheckpointError
from edgeprune.export.processor_settings import (
    RESAMPLE_NAMES,
    checked_settings,
    per_channel,
    read_settings,
)
from edgeprune.runtimes.flat_patches import PatchPreprocessing

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


def patch_preprocessing_from_checkpoint(path: Path) -> PatchPreprocessing:
    """Read processor_config.json or preprocessor_config.json of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend resamples slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, they contradict config.json, or an
            option is not supported.
    """
    source, given = read_settings(path)
    settings = checked_settings(source, given, _PATCH_CLASSES, _PATCH_DEFAULTS)
    if not settings["do_resize"]:
        raise CheckpointError(f"{source} sets do_resize to false: set it to true, pictures have any size")
    config = read_json(path / "config.json")
    vision = config.get("vision_config") or {}
    # What the family's configuration assumes: of Qwen3-VL, other patches than the processor does.
    assumed = {**_PATCH_DEFAULTS, **({"patch_size": 16} if config.get("model_type") == "qwen3_vl" else {})}
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        expected = vision.get(theirs, assumed[ours])
        if settings[ours] != expected:
            raise CheckpointError(
                f"{source} has {ours} {settings[ours]!r}, config.json's vision_config {theirs} {expected!r}: "
                "correct the one that is wrong"
            )
    resample = RESAMPLE_NAMES.get(settings["resample"])
    if resample is None:
        raise CheckpointError(f"{source} has resample {settings['resample']!r}: use one of {RESAMPLE_NAMES}")
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
            mean=per_channel(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0),
            std=per_channel(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0),
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
