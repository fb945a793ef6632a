"""AttentionScore and the TokenSelect of its one score as one node, for the plugin ScoreSelect.

The bundle's graph stays as it is; this is done to the copy that TensorRT parses. Between the two operators a method
takes the first score out of [1, 1, S] and makes it [1, S] again: these nodes go, and so does the tensor between.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.operators.schema import (
    ATTENTION_SCORE,
    OPERATOR_DOMAIN,
    SCORE_SELECT,
    SOFT_NMS,
    TOKEN_SELECT,
    TOPK,
)
from edgeprune.runtimes.onnx_operators import (
    ATTRIBUTE_NAME,
    ATTRIBUTE_STRING,
    GRAPH_NODE,
    MODEL_GRAPH,
    NODE_ATTRIBUTE,
    NODE_DOMAIN,
    NODE_OP_TYPE,
)
from edgeprune.runtimes.onnx_wire import bytes_field, fields, messages, text

# Numbers of the fields in onnx.proto.
_GRAPH_INITIALIZER, _GRAPH_OUTPUT, _VALUE_NAME = 5, 12, 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME = 1, 2, 3
_ATTRIBUTE_INT, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 3, 6, 11
_TENSOR_DIMS, _TENSOR_INT64, _TENSOR_NAME, _TENSOR_RAW = 1, 7, 8, 9


@dataclass(frozen=True)
class _Node:
    """A node, as far as the search needs it."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, bytes]
    message: bytes

    @classmethod
    def of(cls, message: bytes) -> "_Node":
        attributes = {text(one, ATTRIBUTE_NAME): one for one in messages(message, NODE_ATTRIBUTE)}
        domain = text(message, NODE_DOMAIN)
        kind = text(message, NODE_OP_TYPE)
        inputs, outputs = (
            tuple(name.decode("utf-8", "replace") for name in messages(message, number))
            for number in (_NODE_INPUT, _NODE_OUTPUT)
        )
        return cls(f"{domain}.{kind}" if domain else kind, inputs, outputs, attributes, message)


@dataclass(frozen=True)
class _Graph:
    """The nodes of a graph and who makes and reads which tensor."""

    nodes: Sequence[_Node]
    outputs: frozenset[str]
    initializers: Mapping[str, bytes]

    @classmethod
    def of(cls, message: bytes) -> "_Graph":
        return cls(
            [_Node.of(one) for one in messages(message, GRAPH_NODE)],
            frozenset(text(one, _VALUE_NAME) for one in messages(message, _GRAPH_OUTPUT)),
            {text(one, _TENSOR_NAME): one for one in messages(message, _GRAPH_INITIALIZER)},
        )

    def maker(self, tensor: str, kind: str) -> int | None:
        """The node of that kind that makes a tensor which one node alone reads."""
        readers = [node for node in self.nodes if tensor in node.inputs]
        makers = [i for i, node in enumerate(self.nodes) if tensor in node.outputs and node.kind == kind]
        return makers[0] if len(readers) == 1 and makers and tensor not in self.outputs else None

    def is_zero(self, tensor: str) -> bool:
        """Whether it is a constant whole number, 0, alone."""
        constant = self.initializers.get(tensor)
        if constant is None or any(size != 1 for size in _dims(constant)):
            return False
        values = b"".join(messages(constant, _TENSOR_RAW))
        if values:
            return len(values) == 8 and struct.unpack("<q", values)[0] == 0
        inside = [field for field in fields(constant) if field.number == _TENSOR_INT64]
        return len(inside) == 1 and (inside[0].content or bytes([inside[0].value & 0xFF])) == b"\0"


def fuse_score_select(model: bytes) -> bytes:
    """The model with one ScoreSelect for each AttentionScore whose only score TokenSelect ranks.

    Raises:
        BundleError: This is no ONNX file.
    """
    out = []
    for field in fields(model):
        fused = _fused(field.content) if field.number == MODEL_GRAPH else None
        out.append(field.encoded if fused is None else bytes_field(MODEL_GRAPH, fused))
    return b"".join(out)


def _fused(message: bytes) -> bytes | None:
    """The graph with its pairs fused; None where it has none."""
    graph = _Graph.of(message)
    if any(_has_subgraph(node) for node in graph.nodes):
        return None  # it may read what goes
    replaced: dict[int, bytes | None] = {}
    for index, node in enumerate(graph.nodes):
        chain = _chain(graph, node)
        if chain is not None:
            replaced.update(dict.fromkeys(chain))
            replaced[index] = _score_select(graph.nodes[chain[-1]], node)
    if not replaced:
        return None
    out, index = [], 0
    for field in fields(message):
        if field.number != GRAPH_NODE:
            out.append(field.encoded)
            continue
        changed = replaced.get(index, field.content)
        if changed is not None:
            out.append(bytes_field(GRAPH_NODE, changed))
        index += 1
    return b"".join(out)


def _chain(graph: _Graph, select: _Node) -> tuple[int, ...] | None:
    """The nodes from a TokenSelect's score back to the AttentionScore that makes it, which is last."""
    if select.kind != f"{OPERATOR_DOMAIN}.{TOKEN_SELECT}":
        return None
    if text(select.attributes["mode"], ATTRIBUTE_STRING) not in (TOPK, SOFT_NMS):
        return None
    found = []
    tensor = select.inputs[0]
    # [1, S] ← Unsqueeze ← [S] ← Gather ← [1, S] ← Gather ← [1, 1, S]
    for kind in ("Unsqueeze", "Gather", "Gather"):
        index = graph.maker(tensor, kind)
        if index is None:
            return None
        node = graph.nodes[index]
        axis = node.attributes.get("axis")
        first = axis is None or all(one.value == 0 for one in fields(axis) if one.number == _ATTRIBUTE_INT)
        if not first or not graph.is_zero(node.inputs[1]):
            return None
        found.append(index)
        tensor = node.inputs[0]
    last = graph.maker(tensor, f"{OPERATOR_DOMAIN}.{ATTENTION_SCORE}")
    if last is None:
        return None
    weight = graph.initializers.get(graph.nodes[last].inputs[3])
    if weight is None or len(_dims(weight)) != 2 or _dims(weight)[0] != 1:
        return None  # there may be more than one score
    return (*found, last)


def _score_select(score: _Node, select: _Node) -> bytes:
    """The node that does what both do, with the name of the second."""
    mode = b"".join(
        bytes_field(ATTRIBUTE_NAME, b"score_mode") if field.number == ATTRIBUTE_NAME else field.encoded
        for field in fields(score.attributes["mode"])
    )
    attributes = [score.attributes["scale"], score.attributes["causal"], mode, *select.attributes.values()]
    inputs = [*score.inputs, *select.inputs[1:]]
    return b"".join(
        [
            *(bytes_field(_NODE_INPUT, name.encode()) for name in inputs),
            *(bytes_field(_NODE_OUTPUT, name.encode()) for name in select.outputs),
            bytes_field(_NODE_NAME, text(select.message, _NODE_NAME).encode()),
            bytes_field(NODE_OP_TYPE, SCORE_SELECT.encode()),
            *(bytes_field(NODE_ATTRIBUTE, attribute) for attribute in attributes),
            bytes_field(NODE_DOMAIN, OPERATOR_DOMAIN.encode()),
        ]
    )


def _has_subgraph(node: _Node) -> bool:
    numbers = {field.number for attribute in node.attributes.values() for field in fields(attribute)}
    return bool(numbers & {_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS})


def _dims(tensor: bytes) -> list[int]:
    sizes = []
    for field in fields(tensor):
        if field.number == _TENSOR_DIMS:
            # Packed or one by one; a size of more than 127 is no size that is asked for here.
            sizes += list(field.content) if field.content else [field.value]
    return sizes
