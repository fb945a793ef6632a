"""ONNX graphs of one node, written without the onnx package: a device that runs bundles does not have it."""

from collections.abc import Sequence
from pathlib import Path

# Field numbers of onnx.proto, and TensorProto.DataType.
_ELEMENT_TYPES = {"float32": 1, "float16": 10}
_IR_VERSION, _OPSET = 8, 17  # old enough for every runtime that reads bundles


def write_tiny_graph(path: Path, operator: str, dtype: str, inputs: Sequence[int], output_rank: int) -> None:
    """Write a graph with one node and sizes of any value.

    Args:
        path: Where.
        operator: Of ONNX's own domain, without attributes.
        dtype: Of all tensors.
        inputs: Their ranks; they are called "input0", "input1" …
        output_rank: Rank of "output".
    """
    names = [f"input{index}" for index in range(len(inputs))]
    node = b"".join(_text(1, name) for name in names) + _text(2, "output") + _text(4, operator)
    graph = _field(1, node) + _text(2, operator)
    for name, rank in zip(names, inputs, strict=True):
        graph += _field(11, _value_info(name, dtype, rank))
    graph += _field(12, _value_info("output", dtype, output_rank))
    path.write_bytes(_number(1, _IR_VERSION) + _field(7, graph) + _field(8, _number(2, _OPSET)))


def _value_info(name: str, dtype: str, rank: int) -> bytes:
    dimensions = b"".join(_field(1, _text(2, f"{name}_{axis}")) for axis in range(rank))
    tensor = _number(1, _ELEMENT_TYPES[dtype]) + _field(2, dimensions)
    return _text(1, name) + _field(2, _field(1, tensor))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _field(field, content.encode())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
