"""Imports of optional dependencies, with an error that names the extra to install."""

import importlib
from types import ModuleType

from edgeprune.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Name of the module, for example ``"onnxruntime"``.
        extra: The extra of edgeprune that installs it, for example ``"cpu"``.
        purpose: What it is needed for; completes the sentence "… is needed …".

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{module} is needed {purpose} and is not installed: pip install 'edgeprune[{extra}]'"
        ) from error
