"""Pruning methods by name, and the reading and writing of their parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from edgeprune.errors import PruningError
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.atp import Atp
from edgeprune.prune.cdpruner import CdPruner
from edgeprune.prune.dart import Dart
from edgeprune.prune.dyrate import DyRate
from edgeprune.prune.evit import Evit
from edgeprune.prune.fastv import FastV
from edgeprune.prune.host import Host
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.ivtp_vision import IvtpVision
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.prumerge import PruMerge
from edgeprune.prune.prumerge_plus import PruMergePlus
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.prune.sparsevlm import SparseVlm
from edgeprune.prune.spatial_pooling import SpatialPooling
from edgeprune.prune.tome import Tome
from edgeprune.prune.topk import TopK
from edgeprune.prune.visionzip import VisionZip
from edgeprune.prune.vtw import Vtw

METHODS: dict[str, type[PruningMethod]] = {
    method.name: method
    for method in (
        AdaptPrune,
        Atp,
        CdPruner,
        Dart,
        DyRate,
        Evit,
        FastV,
        Host,
        Ivtp,
        IvtpVision,
        PruMerge,
        PruMergePlus,
        PyramidDrop,
        RandomTokens,
        SparseVlm,
        SpatialPooling,
        Tome,
        TopK,
        VisionZip,
        Vtw,
    )
}


def register_method(method: type[PruningMethod]) -> type[PruningMethod]:
    """Make a method of your own known by its name; usable as a class decorator.

    Raises:
        PruningError: Another class has that name, or a parameter has no default.
    """
    for field in fields(method):
        if field.default is MISSING or field.default == ():
            # A parameter's type is read from its default.
            raise PruningError(f"{method.name}: give the parameter '{field.name}' a non-empty default")
    known = METHODS.setdefault(method.name, method)
    if known is not method:
        raise PruningError(f"a pruning method named '{method.name}' exists already: choose another name")
    return method


def method_from_parameters(name: str, parameters: Mapping[str, Any]) -> PruningMethod:
    """Build a method from JSON values; ``{"preset": NAME, …}`` starts from one of its presets.

    Raises:
        PruningError: Unknown method, preset or parameter, or a value that the method refuses.
    """
    if name not in METHODS:
        raise PruningError(f"unknown pruning method '{name}', known: {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    given = dict(parameters)
    preset = given.pop("preset", None)
    values: dict[str, Any] = {}
    if preset is not None:
        if not isinstance(preset, str) or preset not in method.presets:
            raise PruningError(f"{name}: unknown preset '{preset}', known: {', '.join(method.presets)}")
        values.update(method.presets[preset])
    values.update(given)
    known = {field.name: field.default for field in fields(method)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise PruningError(f"{name}: unknown parameter '{unknown[0]}', known: {', '.join(known)}")
    return method(**{key: _coerce(name, key, value, known[key]) for key, value in values.items()})


def methods_to_json(methods: Sequence[PruningMethod]) -> list[dict[str, Any]]:
    """The methods as ``pruning.json`` and the manifest hold them."""
    return [{"method": method.name, "parameters": method.parameters()} for method in methods]


def _coerce(method: str, name: str, value: Any, default: Any) -> Any:
    """Give a JSON value the type of the parameter's default."""
    if isinstance(default, tuple):
        item = type(default[0])
        if isinstance(value, (list, tuple)) and all(_is(item, entry) for entry in value):
            return tuple(item(entry) for entry in value)
        raise PruningError(f"{method}: '{name}' is {value!r}, expected a list of {item.__name__}")
    if not _is(type(default), value):
        raise PruningError(f"{method}: '{name}' is {value!r}, expected {type(default).__name__}")
    return type(default)(value)


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
