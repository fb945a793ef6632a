"""Writing the body of an ONNX model-local function node by node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeprune.operators.schema import OPERATOR_DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION

PLUGIN_ATTRIBUTES = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
"""On every operator node: TensorRT ≥ 10.15 and TensorRT for RTX ask for a plugin only where they see them."""


class FunctionBody:
    """A function of domain ``edgeprune`` in the making.

    Every node gets a name, so that an error or a layer of TensorRT leads back to it.

    Args:
        operator: Name of the function, the op_type of the nodes that call it.
        inputs: Names of its inputs.
        opset_version: Version of the standard operators that the body uses.
    """

    def __init__(self, operator: str, inputs: Sequence[str], *, opset_version: int) -> None:
        self._operator = operator
        self._opset_version = opset_version
        self._inputs = {name: ir.Value(name=name) for name in inputs}
        self._nodes: list[ir.Node] = []

    def input(self, name: str) -> ir.Value:
        """The function's input of that name."""
        return self._inputs[name]

    def op(self, op_type: str, *inputs: ir.Value, name: str, **attributes: Any) -> ir.Value:
        """Append a node; it and its first output, which is returned, are both called ``name``."""
        num_outputs = 2 if op_type == "TopK" else 1
        node = ir.node(op_type, inputs, attributes, num_outputs=num_outputs, name=f"{self._operator}/{name}")
        for i, output in enumerate(node.outputs):
            output.name = name if i == 0 else f"{name}_{i}"
        self._nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | float | Sequence[int], *, name: str) -> ir.Value:
        """Append a constant: int64 of a whole number or a list of them, float32 of a fraction."""
        dtype = np.float32 if isinstance(value, float) else np.int64
        return self.op("Constant", name=name, value=ir.tensor(np.array(value, dtype=dtype), name=name))

    def attribute(self, attribute: str, *, name: str) -> ir.Value:
        """Append a float32 constant whose value is the calling node's float attribute."""
        reference = ir.RefAttr("value_float", attribute, ir.AttributeType.FLOAT)
        return self.op("Constant", name=name, value_float=reference)

    def loop(self, trip_count: ir.Value, step: ir.Graph, *carried: ir.Value, name: str) -> list[ir.Value]:
        """Append a Loop that runs ``step`` ``trip_count`` times; returns the carried values after the last.

        ``step`` (from :meth:`loop_step`) returns the condition and the carried values; it may use the values of
        this body.
        """
        always = self.op(
            "Constant", name=f"{name}_always", value=ir.tensor(np.array(True), name=f"{name}_always")
        )
        node = ir.node(
            "Loop",
            [trip_count, always, *carried],
            {"body": step},
            num_outputs=len(carried),
            name=f"{self._operator}/{name}",
        )
        for index, output in enumerate(node.outputs):
            output.name = f"{name}_{index}"
        self._nodes.append(node)
        return list(node.outputs)

    def loop_step(self, carried: Sequence[str]) -> "FunctionBody":
        """A body for the subgraph of a Loop, with inputs "iteration", "going" and the carried values."""
        step = FunctionBody(
            self._operator, ["iteration", "going", *carried], opset_version=self._opset_version
        )
        for name, dtype in (("iteration", ir.DataType.INT64), ("going", ir.DataType.BOOL)):
            # ONNX Runtime wants to know that they are scalars.
            step.input(name).type = ir.TensorType(dtype)
            step.input(name).shape = ir.Shape([])
        return step

    def graph(self, outputs: Sequence[ir.Value], *, name: str) -> ir.Graph:
        """The nodes so far as a subgraph with these outputs."""
        return ir.Graph(list(self._inputs.values()), outputs, nodes=self._nodes, name=name)

    def function(self, outputs: dict[str, ir.Value], attributes: dict[str, ir.AttributeType]) -> ir.Function:
        """The function with these outputs, in this order, and these attributes besides the plugin's two."""
        for name, value in outputs.items():
            value.name = name
        graph = ir.Graph(
            list(self._inputs.values()),
            list(outputs.values()),
            nodes=self._nodes,
            opset_imports={"": self._opset_version},
            name=self._operator,
        )
        plugin = dict.fromkeys(PLUGIN_ATTRIBUTES, ir.AttributeType.STRING)
        return ir.Function(
            OPERATOR_DOMAIN,
            self._operator,
            graph=graph,
            attributes=[ir.Attr(name, kind, None) for name, kind in (attributes | plugin).items()],
        )
