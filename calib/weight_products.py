"""The matrix products of a graph that have constant weights, and those among them that decide what is pruned."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
# Their results choose rows, or say which of two rows is the better one.
_DECIDING = {
    "ArgMax": (0,),
    "ArgMin": (0,),
    "Equal": (0, 1),
    "Gather": (1,),
    "GatherElements": (1,),
    "GatherND": (1,),
    "Greater": (0, 1),
    "GreaterOrEqual": (0, 1),
    "Less": (0, 1),
    "LessOrEqual": (0, 1),
    "ScatterElements": (1,),
    "ScatterND": (1,),
    "TokenGather": (0,),
    "TopK": (0,),
}
# Their results depend on sizes only.
_SIZES = ("Shape", "Size")


def gemms_as_products(model: Any) -> None:
    """Replace every Gemm with constant weights by MatMul and Add, which is what weight-only quantizers know."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        plain = (
            not attributes.get("transA")
            and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        )
        if (
            node.op_type != "Gemm"
            or node.domain not in ("", "ai.onnx")
            or not plain
            or node.input[1] not in weights
        ):
            nodes.append(node)
            continue
        name = node.input[1]
        if attributes.get("transB"):
            name = f"{node.input[1]}.transposed"
            if name not in weights:
                turned = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[1]]).T)
                weights[name] = numpy_helper.from_array(turned, name)
                graph.initializer.append(weights[name])
        biased = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}.product" if biased else node.output[0]
        nodes.append(
            helper.make_node("MatMul", [node.input[0], name], [product], name=f"{node.name}.product")
        )
        if biased:
            nodes.append(
                helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}.bias")
            )
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def weight_products(model: Any) -> Iterator[tuple[Any, Any]]:
    """Every MatMul of the graph whose second factor is a matrix of weights, with that matrix."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
            weight = weights.get(node.input[1])
            if weight is not None and len(weight.dims) == 2 and weight.data_type in _FLOATS:
                yield node, weight


def deciding_products(model: Any, read: Collection[str]) -> set[str]:
    """Names of the products whose result goes, with no other product between, into a choice of tokens.

    These are the projections to queries and keys in the layers whose attention is scored. A score on hidden states
    sees the error of every layer below, so that there is no product whose precision could save it; the search ends
    where a product is added to the residual stream.

    Args:
        model: The graph.
        read: Outputs that graphs which select read. Choices inside the graph are found by their operators.
    """
    products = {node.output[0]: node.name for node, _ in weight_products(model)}
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    waiting = [value.name for value in model.graph.output if value.name in read]
    for node in model.graph.node:
        operands = _DECIDING.get(node.op_type, ())
        waiting += [node.input[index] for index in operands if index < len(node.input)]
    seen: set[str] = set()
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in products:
            found.add(products[name])
            continue
        node = producers.get(name)
        if node is None or node.op_type in _SIZES:
            continue
        inputs = [operand for operand in node.input if operand and operand not in constants]
        if (
            node.op_type == "Add"
            and len(inputs) == 2
            and any(_is_product(x, products, producers) for x in inputs)
        ):
            continue
        waiting += inputs
    return found


def _is_product(name: str, products: dict[str, str], producers: dict[str, Any]) -> bool:
    """Whether a tensor is a product of weights, or one with its bias."""
    if name in products:
        return True
    node = producers.get(name)
    return node is not None and node.op_type == "Add" and any(operand in products for operand in node.input)
