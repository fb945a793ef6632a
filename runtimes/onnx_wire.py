"""Fields of protobuf messages, as ONNX files are made of: reading and writing them without a package for ONNX.

Devices that build their engines have none, and what is changed before TensorRT parses a graph is a few nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """A field of a message.

    Attributes:
        number: Its number.
        encoded: All of its bytes, its number included.
        content: The bytes of a text or message; empty for numbers.
        value: The value of a whole number; 0 for others.
    """

    number: int
    encoded: bytes
    content: bytes
    value: int


def fields(message: bytes) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        BundleError: This is no message.
    """
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        content, value, kind = b"", 0, tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
        elif kind == _FIXED64:
            place += 8
        elif kind == _FIXED32:
            place += 4
        elif kind == _BYTES:
            length, place = _varint(message, place)
            content = message[place : place + length]
            place += length
        else:
            place = len(message) + 1
        if place > len(message):
            raise _no_model()
        yield Field(tag >> 3, message[start:place], content, value)


def messages(message: bytes, number: int) -> list[bytes]:
    """The contents of the fields of that number."""
    return [field.content for field in fields(message) if field.number == number]


def text(message: bytes, number: int) -> str:
    """The text in the field of that number; empty without one."""
    return b"".join(messages(message, number)).decode("utf-8", "replace")


def bytes_field(number: int, content: bytes) -> bytes:
    """A field that holds a text or a message."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 64:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise _no_model()


def _no_model() -> BundleError:
    return BundleError("an ONNX file of the bundle cannot be read: copy the bundle again or export again")
