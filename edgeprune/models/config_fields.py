"""Typed reading of a Hugging Face ``config.json``, with errors that name the field."""

from collections.abc import Mapping
from typing import Any, TypeVar

from edgeprune.errors import CheckpointError

T = TypeVar("T", int, float, str, bool)


def read_field(config: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """Return ``config[name]`` as ``kind``.

    Args:
        config: A parsed ``config.json`` or one of its sections.
        name: The field.
        kind: ``int``, ``float``, ``str`` or ``bool``; an int is accepted where a float is asked for.
        default: Used when the field is missing or null; without one the field is required.

    Raises:
        CheckpointError: The field is missing without a default, or has another type.
    """
    value = config.get(name)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json lacks the field '{name}': is this a whole checkpoint?")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"config.json: '{name}' is {value!r}, expected {kind.__name__}")
    return value


def require_choice(config: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    """Return a string field that must be one of ``choices``.

    Raises:
        CheckpointError: Another value; the message lists the supported ones.
    """
    value = read_field(config, name, str, default)
    if value not in choices:
        raise CheckpointError(f"config.json: '{name}' is '{value}', supported: {', '.join(choices)}")
    return value
