"""The operators of domain ``edgeprune`` in an ONNX file, and the file without their functions.

TensorRT before 10.7 takes a function of the model wherever there is one, so the plugin gets a node only in a file
without functions.
"""

from dataclasses import dataclass

from edgeprune.operators.schema import OPERATOR_DOMAIN
from edgeprune.runtimes.onnx_wire import fields, messages, text

# Numbers of the fields in onnx.proto.
MODEL_GRAPH, MODEL_FUNCTIONS = 7, 25
GRAPH_NODE = 1
NODE_OP_TYPE, NODE_ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_STRING = 1, 4


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
    for graph in messages(model, MODEL_GRAPH):
        for node in messages(graph, GRAPH_NODE):
            if text(node, NODE_DOMAIN) != OPERATOR_DOMAIN:
                continue
            modes = [
                text(attribute, ATTRIBUTE_STRING)
                for attribute in messages(node, NODE_ATTRIBUTE)
                if text(attribute, ATTRIBUTE_NAME) == "mode"
            ]
            found.append(OperatorNode(text(node, NODE_OP_TYPE), modes[0] if modes else None))
    return tuple(found)


def without_functions(model: bytes) -> bytes:
    """The same model without its model-local functions.

    Raises:
        BundleError: This is no ONNX file.
    """
    return b"".join(field.encoded for field in fields(model) if field.number != MODEL_FUNCTIONS)
