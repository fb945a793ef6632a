"""Settings of a bundle between dataclass and JSON: every field by its name, nothing unknown."""

from collections.abc import Mapping
from typing import Any

from edgeprune.errors import BundleError


def fields_from_json(kind: type, data: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The fields of a dataclass, lists made tuples.

    Args:
        kind: The dataclass.
        data: What JSON gave.
        what: Whose settings they are, for messages.

    Raises:
        BundleError: No object, or a field is unknown or missing.
    """
    if not isinstance(data, Mapping):
        raise BundleError(f"{what} must be an object, not {data!r}: export the bundle again")
    expected: Mapping[str, object] = kind.__dict__["__dataclass_fields__"]
    if wrong := sorted(set(expected).symmetric_difference(data)):
        raise BundleError(
            f"{what} has unknown or lacks fields {', '.join(map(str, wrong))}: export the bundle again"
        )
    return {name: _tuples(value) for name, value in data.items()}


def fields_to_json(settings: Any) -> dict[str, Any]:
    """All fields as plain JSON: tuples as lists, settings inside settings as objects."""
    return {name: _plain(getattr(settings, name)) for name in settings.__dataclass_fields__}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return fields_to_json(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
