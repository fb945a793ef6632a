"""The operators of domain ``edgeprune`` in an ONNX file, and the file without their functions.

TensorRT before 10.7 takes a function of the model wherever there is one, so the plugin gets a node only in a file
without functions. Both need a few fields of the protobuf message and no package that reads ONNX, which devices do not
have.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from edgeprune.errors import BundleError
from edgeprune.operators.schema import OPERATOR_DOMAIN

# Numbers of the fields in onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE = 1
_NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING = 1, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OperatorNode:
    """A node of domain ``edgeprune``.

    Attributes:
        operator: Its op_type.
        mode: Its attribute of that name; None if it has none.
    """

    operator: str
    mode: str | None


def operator_nodes(model: bytes) -> tuple[OperatorNode, ...]:
    """The operators' nodes in the main graph, in order.

    Raises:
        BundleError: This is no ONNX file.
    """
    found = []
    for graph in _messages(model, _MODEL_GRAPH):
        for node in _messages(graph, _GRAPH_NODE):
            if _text(node, _NODE_DOMAIN) != OPERATOR_DOMAIN:
                continue
            modes = [
                _text(attribute, _ATTRIBUTE_STRING)
                for attribute in _messages(node, _NODE_ATTRIBUTE)
                if _text(attribute, _ATTRIBUTE_NAME) == "mode"
            ]
            found.append(OperatorNode(_text(node, _NODE_OP_TYPE), modes[0] if modes else None))
    return tuple(found)


def without_functions(model: bytes) -> bytes:
    """The same model without its model-local functions.

    Raises:
        BundleError: This is no ONNX file.
    """
    return b"".join(
        model[start:end] for number, start, end, _ in _fields(model) if number != _MODEL_FUNCTIONS
    )


def _messages(message: bytes, wanted: int) -> Iterator[bytes]:
    for number, _, _, value in _fields(message):
        if number == wanted:
            yield value


def _text(message: bytes, wanted: int) -> str:
    return b"".join(_messages(message, wanted)).decode("utf-8", "replace")


def _fields(message: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Number, place from its tag to its end, and content of every field; numbers have no content."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        content = place
        kind = tag & 7
        if kind == _VARINT:
            _, place = _varint(message, place)
            content = place
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
            content = place
        elif kind == _BYTES:
            length, content = _varint(message, place)
            place = content + length
        else:
            place = len(message) + 1
        if place > len(message):
            raise _no_model()
        yield tag >> 3, start, place, message[content:place]


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
