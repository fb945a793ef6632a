"""Dataclasses ↔ JSON, checked field by field."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edgeprune.errors import BundleError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Turn dataclasses, tuples and mappings into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(kind: type[T], data: Any, where: str) -> T:
    """Build a dataclass from JSON values.

    Args:
        kind: The dataclass; its fields may be dataclasses, ``tuple[X, ...]``, ``dict[str, X]``, ``X | None``, unions
            of scalars, scalars and ``Any``.
        data: The parsed JSON.
        where: Name of the place, for errors.

    Raises:
        BundleError: A field is missing, unknown, or has another type.
    """
    built: T = _build(kind, data, where)
    return built


def _build(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, where)
    if origin is tuple:
        _expect(isinstance(data, list), where, "a list", data)
        (item, *_) = typing.get_args(kind)
        return tuple(_build(item, entry, f"{where}[{index}]") for index, entry in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        _, item = typing.get_args(kind)
        return {key: _build(item, entry, f"{where}.{key}") for key, entry in data.items()}
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if data is None and type(None) in options:
            return None
        for option in options:
            if option is type(None):
                continue
            # An object or a list is expected to be this one, so that its own fields are named in an error.
            if (
                dataclasses.is_dataclass(option)
                or typing.get_origin(option) in (dict, tuple)
                or _is_scalar(option, data)
            ):
                return _build(option, data, where)
        names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
        raise BundleError(f"{where} is {str(data)[:60]!r}, expected {names}")
    _expect(_is_scalar(kind, data), where, getattr(kind, "__name__", str(kind)), data)
    return float(data) if kind is float else data


def _build_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise BundleError(f"{where} has an unknown field '{unknown[0]}'")
    missing = [
        name
        for name, field in fields.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BundleError(f"{where} lacks the field '{missing[0]}'")
    return kind(**{name: _build(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _is_scalar(kind: Any, data: Any) -> bool:
    if kind is float:
        return isinstance(data, (int, float)) and not isinstance(data, bool)
    if kind is int:
        return isinstance(data, int) and not isinstance(data, bool)
    return isinstance(kind, type) and isinstance(data, kind)


def _expect(condition: bool, where: str, expected: str, data: Any) -> None:
    if not condition:
        raise BundleError(f"{where} is {str(data)[:60]!r}, expected {expected}")
