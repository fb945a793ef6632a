import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgeprune.export.passes import fold_transposed_weights

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((5, 3)).astype(np.float32)


def initializer(name, array):
    return ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.tensor(array).dtype),
        const_value=ir.tensor(array, name=name),
    )


def model_of(nodes, inputs, outputs, initializers):
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="graph"
    )
    return ir.Model(graph, ir_version=10)


def value(name, *shape, dtype=ir.DataType.FLOAT):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def run(model, **feed):
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def op_types(model):
    return [node.op_type for node in model.graph]


def linear(weight=WEIGHT, attributes=None):
    """y = x · Transpose(weight)."""
    x, w = value("x", "n", weight.shape[-1]), initializer("weight", weight)
    transpose = ir.node("Transpose", [w], attributes={"perm": [1, 0]} if attributes is None else attributes)
    product = ir.node("MatMul", [x, transpose.outputs[0]], outputs=[value("y", "n", weight.shape[0])])
    return model_of([transpose, product], [x], product.outputs, [w])


@pytest.mark.parametrize("attributes", [{"perm": [1, 0]}, {}], ids=["perm", "default"])
def test_transposed_weight_is_stored_transposed(attributes):
    model = linear(attributes=attributes)
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    (before,) = run(model, x=x)
    fold_transposed_weights.apply(model)
    assert op_types(model) == ["MatMul"]
    (stored,) = model.graph.initializers.values()
    assert (stored.name, list(stored.shape)) == ("weight.transposed", [3, 5])
    assert np.array_equal(stored.const_value.numpy(), WEIGHT.T)
    assert stored.const_value.tobytes() == np.ascontiguousarray(WEIGHT.T).tobytes()
    (after,) = run(model, x=x)
    assert np.allclose(before, x @ WEIGHT.T, atol=1e-6)
    assert np.allclose(after, before, atol=1e-6)


def test_half_precision():
    model = linear(WEIGHT.astype(np.float16))
    fold_transposed_weights.apply(model)
    (stored,) = model.graph.initializers.values()
    assert stored.dtype == ir.DataType.FLOAT16
    assert np.array_equal(stored.const_value.numpy(), WEIGHT.astype(np.float16).T)


def test_several_weights_keep_their_own_values():
    """The tensors are made later, when the weights are written: each must remember its own."""
    weights = [RNG.standard_normal((3, 3)).astype(np.float32) for _ in range(3)]
    hidden = x = value("x", "n", 3)
    nodes, stored = [], []
    for index, array in enumerate(weights):
        stored.append(initializer(f"w{index}", array))
        transpose = ir.node("Transpose", [stored[-1]], attributes={"perm": [1, 0]})
        product = ir.node("MatMul", [hidden, transpose.outputs[0]])
        nodes += [transpose, product]
        hidden = product.outputs[0]
    hidden.name, hidden.shape, hidden.type = "y", ir.Shape(["n", 3]), ir.TensorType(ir.DataType.FLOAT)
    model = model_of(nodes, [x], [hidden], stored)
    feed = RNG.standard_normal((2, 3)).astype(np.float32)
    fold_transposed_weights.apply(model)
    (after,) = run(model, x=feed)
    assert np.allclose(after, feed @ weights[0].T @ weights[1].T @ weights[2].T, atol=1e-5)


def test_weight_that_is_read_both_ways_is_kept():
    x, w = value("x", "n", 3), initializer("weight", WEIGHT[:3])
    transpose = ir.node("Transpose", [w], attributes={"perm": [1, 0]})
    first = ir.node("MatMul", [x, transpose.outputs[0]])
    second = ir.node("MatMul", [first.outputs[0], w], outputs=[value("y", "n", 3)])
    model = model_of([transpose, first, second], [x], second.outputs, [w])
    feed = RNG.standard_normal((2, 3)).astype(np.float32)
    (before,) = run(model, x=feed)
    fold_transposed_weights.apply(model)
    assert op_types(model) == ["MatMul", "MatMul"]
    assert set(model.graph.initializers) == {"weight", "weight.transposed"}
    (after,) = run(model, x=feed)
    assert np.allclose(after, before, atol=1e-5)


def test_weight_that_is_transposed_twice_is_stored_once():
    x, w = value("x", "n", 3), initializer("weight", WEIGHT)
    transposes = [ir.node("Transpose", [w], attributes={"perm": [1, 0]}) for _ in range(2)]
    products = [ir.node("MatMul", [x, t.outputs[0]]) for t in transposes]
    total = ir.node("Add", [p.outputs[0] for p in products], outputs=[value("y", "n", 5)])
    model = model_of([*transposes, *products, total], [x], total.outputs, [w])
    feed = RNG.standard_normal((2, 3)).astype(np.float32)
    fold_transposed_weights.apply(model)
    assert op_types(model) == ["MatMul", "MatMul", "Add"]
    assert set(model.graph.initializers) == {"weight.transposed"}
    (after,) = run(model, x=feed)
    assert np.allclose(after, 2 * feed @ WEIGHT.T, atol=1e-5)


def test_transposed_weight_that_is_an_output_stays_one():
    w = initializer("weight", WEIGHT)
    transpose = ir.node("Transpose", [w], attributes={"perm": [1, 0]}, outputs=[value("y", 3, 5)])
    model = model_of([transpose], [], transpose.outputs, [w])
    fold_transposed_weights.apply(model)
    (after,) = run(model)
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert np.array_equal(after, WEIGHT.T)


@pytest.mark.parametrize(
    ("shape", "perm"), [((2, 3), [0, 1]), ((2, 3, 4), [0, 2, 1]), ((6,), [0])], ids=["identity", "3-D", "1-D"]
)
def test_other_transposes_of_weights_stay(shape, perm):
    array = RNG.standard_normal(shape).astype(np.float32)
    w = initializer("weight", array)
    transpose = ir.node("Transpose", [w], attributes={"perm": perm})
    shape_out = [shape[axis] for axis in perm]
    negated = ir.node("Neg", [transpose.outputs[0]], outputs=[value("y", *shape_out)])
    model = model_of([transpose, negated], [], negated.outputs, [w])
    fold_transposed_weights.apply(model)
    assert op_types(model) == ["Transpose", "Neg"]
    assert np.array_equal(run(model)[0], -array.transpose(perm))


def test_transposed_activations_stay():
    x = value("x", "n", 3)
    transpose = ir.node("Transpose", [x], attributes={"perm": [1, 0]}, outputs=[value("y", 3, "n")])
    model = model_of([transpose], [x], transpose.outputs, [])
    fold_transposed_weights.apply(model)
    assert op_types(model) == ["Transpose"]


def test_transpose_of_another_domain_stays():
    x, w = value("x", "n", 3), initializer("weight", WEIGHT)
    transpose = ir.node("Transpose", [w], domain="other", attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [x, transpose.outputs[0]], outputs=[value("y", "n", 5)])
    model = model_of([transpose, product], [x], product.outputs, [w])
    fold_transposed_weights.apply(model)
    assert op_types(model) == ["Transpose", "MatMul"]
