"""Store weights the way MatMul reads them, instead of transposing them at every start of a session.

``nn.Linear`` keeps [out, in]; the exporter emits MatMul(x, Transpose(W)). Runtimes fold that Transpose when they open
the graph, which costs a second copy of every weight in memory. The transposed tensor is made lazily, one at a time,
when the weights are written.
"""

import numpy as np
import onnx_ir as ir

# In a transposed tensor's ``meta``: the weight. Two graphs that transpose the same one share what is written.
SOURCE = "edgeprune.transposed_from"


def apply(model: ir.Model) -> None:
    """Replace every Transpose of a two-dimensional initializer by a transposed initializer."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is None or source.const_value is None or source.name not in graph.initializers:
            continue
        if target.is_graph_output():
            continue
        weight = source.const_value
        permutation = node.attributes.get("perm")
        if len(weight.shape) != 2 or (permutation is not None and list(permutation.as_ints()) != [1, 0]):
            continue
        name = f"{source.name}.transposed"
        if name not in graph.initializers:
            rows, columns = (int(size) for size in weight.shape)
            transposed = ir.LazyTensor(
                lambda weight=weight, name=name: ir.Tensor(np.ascontiguousarray(weight.numpy().T), name=name),
                dtype=weight.dtype,
                shape=ir.Shape([columns, rows]),
                name=name,
            )
            transposed.meta[SOURCE] = weight
            folded = ir.Value(name=name, shape=transposed.shape, type=ir.TensorType(weight.dtype))
            folded.const_value = transposed
            graph.initializers[name] = folded
        ir.convenience.replace_all_uses_with(target, graph.initializers[name])
        graph.remove(node, safe=True)
        if not source.uses():
            del graph.initializers[source.name]
