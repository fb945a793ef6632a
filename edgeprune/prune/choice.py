"""The pruning that an export is asked for: the checkpoint's own, other methods, or none."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.checkpoint import read_methods
from edgeprune.errors import PruningError
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.own_method import load_own_method, names_a_file
from edgeprune.prune.registry import METHODS, method_from_parameters

UNPRUNED = "none"


def choose_methods(
    checkpoint: Path, names: Sequence[str], presets: Sequence[str] = (), settings: Sequence[str] = ()
) -> tuple[PruningMethod, ...] | None:
    """Resolve the methods that a user named.

    A method that the checkpoint's ``pruning.json`` already names starts from the parameters there, because its learned
    weights belong to them.

    Args:
        checkpoint: Folder of the checkpoint.
        names: The methods, by name or as ``path/to/file.py:Class``; empty takes the checkpoint's, "none" exports
            it unpruned.
        presets: Named settings to start from instead, ``PRESET``, or ``METHOD=PRESET`` with several methods.
        settings: Single parameters, ``NAME=VALUE``, or ``METHOD.NAME=VALUE`` with several methods; the value is
            JSON, or a string where it is none.

    Raises:
        PruningError: Unknown names, or settings that belong to no method.
    """
    if not names:
        if presets or settings:
            raise PruningError("--preset and --set change a method's parameters: name it with --method")
        return None
    if UNPRUNED in names:
        if len(names) > 1 or presets or settings:
            raise PruningError(f"--method {UNPRUNED} exports the checkpoint unpruned: leave the rest out")
        return ()
    known = [load_own_method(name).name if names_a_file(name) else name for name in names]
    if unknown := [name for name in known if name not in METHODS]:
        raise PruningError(f"unknown pruning method '{unknown[0]}', known: {', '.join(sorted(METHODS))}")
    preset_of = dict(_preset(text, known) for text in presets)
    values: dict[str, dict[str, Any]] = {name: {} for name in known}
    for text in settings:
        method, name, value = _setting(text, known)
        values[method][name] = value
    own = {method.name: method.parameters() for method in read_methods(checkpoint)}
    return tuple(
        method_from_parameters(name, {**_start(name, preset_of, own), **values[name]}) for name in known
    )


def _start(name: str, presets: Mapping[str, str], own: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return {"preset": presets[name]} if name in presets else own.get(name, {})


def _preset(text: str, methods: Sequence[str]) -> tuple[str, str]:
    method, separator, preset = text.partition("=")
    if separator and method in methods:
        return method, preset
    if separator or len(methods) > 1:
        raise PruningError(
            f"--preset '{text}' belongs to no method: write {methods[0]}=PRESET (methods: {', '.join(methods)})"
        )
    return methods[0], text


def _setting(text: str, methods: Sequence[str]) -> tuple[str, str, Any]:
    """Split [METHOD.]NAME=VALUE; a value that is no JSON is a string."""
    path, separator, value = text.partition("=")
    method, dot, name = path.rpartition(".")
    if not dot and len(methods) == 1:
        method = methods[0]
    if not separator or not name or method not in methods:
        example = f"{methods[0]}.NAME=VALUE" if len(methods) > 1 else "NAME=VALUE"
        raise PruningError(f"--set takes {example}, for example --set layers=[4,14,24]; got '{text}'")
    try:
        return method, name, json.loads(value)
    except json.JSONDecodeError:
        return method, name, value
