"""The pruning that an export is asked for: the checkpoint's own, another method, or none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.checkpoint import read_methods
from edgeprune.errors import PruningError
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.registry import method_from_parameters

UNPRUNED = "none"


def choose_methods(
    checkpoint: Path, name: str | None, preset: str | None = None, settings: Mapping[str, Any] | None = None
) -> tuple[PruningMethod, ...] | None:
    """Resolve the method that a user named.

    A method that the checkpoint's ``pruning.json`` already names starts from the parameters there, because its learned
    weights belong to them.

    Args:
        checkpoint: Folder of the checkpoint.
        name: The method; None takes the checkpoint's, "none" exports it unpruned.
        preset: Named settings to start from instead.
        settings: Single parameters.

    Raises:
        PruningError: Unknown names, or settings without a method.
    """
    settings = settings or {}
    if name is None:
        if preset or settings:
            raise PruningError("--preset and --set change a method's parameters: name it with --method")
        return None
    if name == UNPRUNED:
        return ()
    own = {method.name: method.parameters() for method in read_methods(checkpoint)}
    start = {"preset": preset} if preset else own.get(name, {})
    return (method_from_parameters(name, {**start, **settings}),)
