"""Emitting a node of domain ``edgeprune`` while torch.onnx.export translates a custom operator.

The exporter reads the annotations of a translation: an argument of type ``Any`` is a value, any other an
attribute.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript.values import Op, Opset

from edgeprune.export.operators.function_body import PLUGIN_ATTRIBUTES
from edgeprune.operators.schema import OPERATOR_DOMAIN, OPERATOR_VERSION

_ATTRIBUTE_TYPES = {
    float: onnx.defs.OpSchema.AttrType.FLOAT,
    int: onnx.defs.OpSchema.AttrType.INT,
    list: onnx.defs.OpSchema.AttrType.INTS,
    str: onnx.defs.OpSchema.AttrType.STRING,
}
_TENSOR_TYPES = [
    f"tensor({name})"
    for name in ("float", "float16", "bfloat16", "double", "int32", "int64", "uint8", "bool")
]


def emit(
    operator: str, inputs: Mapping[str, ir.Value], outputs: Sequence[str], attributes: Mapping[str, Any]
) -> Sequence[ir.Value]:
    """Record one node in the graph being exported.

    The exporter inlines functions, so the node stays opaque here; ``attach_functions`` gives it its function.

    Args:
        operator: The op_type.
        inputs: Values by the operator's names for them, in order.
        outputs: Names of the outputs, in order.
        attributes: Attributes besides those that every operator has for the TensorRT plugin.
    """
    attributes = {**attributes, **PLUGIN_ATTRIBUTES}
    schema = onnx.defs.OpSchema(
        operator,
        OPERATOR_DOMAIN,
        OPERATOR_VERSION,
        # The exporter reads arity and names from the schema; the types come from the traced values.
        inputs=[onnx.defs.OpSchema.FormalParameter(name, f"T_{name}") for name in inputs],
        outputs=[onnx.defs.OpSchema.FormalParameter(name, f"T_{name}") for name in outputs],
        type_constraints=[(f"T_{name}", _TENSOR_TYPES, "") for name in [*inputs, *outputs]],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, _ATTRIBUTE_TYPES[type(value)], required=True)
            for name, value in attributes.items()
        ],
    )
    result = Op(Opset(OPERATOR_DOMAIN, OPERATOR_VERSION), operator, schema)(*inputs.values(), **attributes)
    return result if isinstance(result, Sequence) else [result]
