"""FP8 products with explicit QuantizeLinear and DequantizeLinear.

ONNX Runtime's quantizer takes FP8 scales from the standard deviation and needs all activations in arrays of one shape,
which prompts of different lengths are not. Here a scale is the largest magnitude by the largest number of E4M3, as
TensorRT expects: of an activation over the calibration samples, of weights by column.
"""

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeprune.calib.weight_products import weight_products

_LARGEST = 448.0  # of E4M3
_E4M3 = onnx.TensorProto.FLOAT8E4M3FN


def quantize_to_float8(model: Any, products: Collection[str], magnitudes: Mapping[str, float]) -> None:
    """Quantize weights and activations of products in place.

    Args:
        model: The graph.
        products: Names of the products.
        magnitudes: By activation: its largest magnitude.
    """
    graph = model.graph
    chosen = {id(node): (node, weight) for node, weight in weight_products(model) if node.name in products}
    weights: dict[str, str] = {}
    activations: dict[str, str] = {}
    nodes: list[Any] = []
    for node in graph.node:
        if id(node) in chosen:
            weight = chosen[id(node)][1]
            activation = node.input[0]
            if activation not in activations:
                new, activations[activation] = _activation(graph, activation, magnitudes[activation], weight)
                nodes += new
            if weight.name not in weights:
                new, weights[weight.name] = _weight(graph, weight)
                nodes += new
            node.input[0], node.input[1] = activations[activation], weights[weight.name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _activation(graph: Any, name: str, magnitude: float, weight: Any) -> tuple[list[Any], str]:
    scale = _scale(np.array(magnitude), weight)
    quantized, restored = f"{name}.fp8", f"{name}.fp8.restored"
    graph.initializer.extend(
        (numpy_helper.from_array(scale, f"{quantized}.scale"), _zero(f"{quantized}.zero"))
    )
    operands = [f"{quantized}.scale", f"{quantized}.zero"]
    return [
        helper.make_node("QuantizeLinear", [name, *operands], [quantized], name=f"{quantized}.quantize"),
        helper.make_node(
            "DequantizeLinear", [quantized, *operands], [restored], name=f"{quantized}.dequantize"
        ),
    ], restored


def _weight(graph: Any, weight: Any) -> tuple[list[Any], str]:
    values = numpy_helper.to_array(weight)
    scale = _scale(np.abs(values.astype(np.float32)).max(axis=0), weight)
    codes = np.clip(values.astype(np.float32) / scale.astype(np.float32), -_LARGEST, _LARGEST)
    name, restored = f"{weight.name}.fp8", f"{weight.name}.fp8.restored"
    graph.initializer.extend(
        (
            helper.make_tensor(
                name, _E4M3, values.shape, codes.astype(ml_dtypes.float8_e4m3fn).tobytes(), raw=True
            ),
            numpy_helper.from_array(scale, f"{name}.scale"),
        )
    )
    node = helper.make_node(
        "DequantizeLinear", [name, f"{name}.scale"], [restored], name=f"{name}.dequantize", axis=1
    )
    return [node], restored


def _scale(magnitude: NDArray[Any], weight: Any) -> NDArray[Any]:
    """As the type of the weights; a column of zeros has any."""
    dtype = numpy_helper.to_array(weight).dtype
    scale = np.asarray(magnitude, np.float32) / _LARGEST
    result: NDArray[Any] = np.maximum(scale, np.finfo(dtype).tiny).astype(dtype)
    return result


def _zero(name: str) -> Any:
    return helper.make_tensor(name, _E4M3, [], b"\0", raw=True)
