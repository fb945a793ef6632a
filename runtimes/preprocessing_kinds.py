"""The preprocessing of a bundle, by its kind."""

from collections.abc import Callable, Mapping
from typing import Any

from edgeprune.errors import BundleError
from edgeprune.runtimes.anyres import AnyresPreprocessing
from edgeprune.runtimes.flat_patches import PatchPreprocessing
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.preprocessing import ImagePreprocessing
from edgeprune.runtimes.square_padding import SquarePadding
from edgeprune.runtimes.tiling import TilePreprocessing

KINDS: dict[str, Callable[[Mapping[str, Any]], PicturePreprocessing]] = {
    "anyres": AnyresPreprocessing.from_json,
    "crop": ImagePreprocessing.from_json,
    "pad": SquarePadding.from_json,
    "tiles": TilePreprocessing.from_json,
    "patches": PatchPreprocessing.from_json,
}


def preprocessing_to_json(preprocessing: PicturePreprocessing) -> dict[str, Any]:
    """All settings with their kind, as the manifest holds them."""
    kind = next(
        kind for kind, read in KINDS.items() if getattr(read, "__self__", None) is type(preprocessing)
    )
    return {"kind": kind, **preprocessing.to_json()}


def preprocessing_from_json(data: Mapping[str, Any]) -> PicturePreprocessing:
    """Read what :func:`preprocessing_to_json` wrote.

    Raises:
        BundleError: The kind is unknown, or a setting is unknown, missing or invalid.
    """
    if not isinstance(data, Mapping):
        raise BundleError(f"preprocessing must be an object, not {data!r}: export the bundle again")
    settings = dict(data)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise BundleError(
            f"preprocessing kind is {kind!r}, known: {', '.join(KINDS)}; export the checkpoint again"
        )
    return KINDS[kind](settings)
