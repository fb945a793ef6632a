"""Settings of InternVL's image processor."""

from pathlib import Path
from typing import Any

from edgeprune.checkpoint_weights import read_json
from edgeprune.errors import BundleError, CheckpointError
from edgeprune.export.crop_settings import CLIP_DEFAULTS, crop_from_settings
from edgeprune.export.processor_settings import checked_settings, read_settings
from edgeprune.runtimes.tiling import TilePreprocessing

_TILE_CLASSES = ("GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast", "GotOcr2ImageProcessorPil")

# What GotOcr2ImageProcessor assumes; InternVLProcessor tells it to cut pictures into tiles, whatever the file says.
_TILE_DEFAULTS: dict[str, Any] = {
    **CLIP_DEFAULTS,
    "size": {"height": 384, "width": 384},
    "do_center_crop": False,
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 12,
}


def tile_preprocessing_from_checkpoint(path: Path) -> TilePreprocessing:
    """Read processor_config.json or preprocessor_config.json of an InternVL checkpoint.

    The pixels will be those of the Pillow backend; transformers' torchvision backend resamples slightly differently.

    Raises:
        CheckpointError: There are no settings, they are for another processor, they contradict config.json, or an
            option is not supported.
    """
    source, settings = read_settings(path)
    checked = checked_settings(source, settings, _TILE_CLASSES, _TILE_DEFAULTS)
    tile = crop_from_settings(source, checked)
    expected = (read_json(path / "config.json").get("vision_config") or {}).get("image_size", 448)
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
