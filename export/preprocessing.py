"""The image processor settings of a Hugging Face checkpoint, as data for the bundle."""

from collections.abc import Callable
from pathlib import Path

from edgeprune.export.anyres_settings import anyres_preprocessing_from_checkpoint
from edgeprune.export.crop_settings import llava_preprocessing_from_checkpoint
from edgeprune.export.patch_settings import patch_preprocessing_from_checkpoint
from edgeprune.export.tile_settings import tile_preprocessing_from_checkpoint
from edgeprune.runtimes.pictures import PicturePreprocessing

_READERS: dict[str, Callable[[Path], PicturePreprocessing]] = {
    "llava": llava_preprocessing_from_checkpoint,
    "llava_next": anyres_preprocessing_from_checkpoint,
    "internvl": tile_preprocessing_from_checkpoint,
    "qwen2_vl": patch_preprocessing_from_checkpoint,
    "qwen2_5_vl": patch_preprocessing_from_checkpoint,
    "qwen3_vl": patch_preprocessing_from_checkpoint,
}


def picture_preprocessing_from_checkpoint(path: Path, model_type: str) -> PicturePreprocessing:
    """Read the image processor settings of a checkpoint.

    Args:
        path: The checkpoint's folder.
        model_type: Its family.

    Raises:
        CheckpointError: There are no settings, they are for another processor, or an option is not supported.
    """
    return _READERS[model_type](path)
