import mmap

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.tensor_adapters import TorchTensor

from edgeprune.export.external_data import WeightStore

PAGE = 4096
GENERATOR = torch.Generator().manual_seed(0)


def weight(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


def graph_of(**weights):
    """One Identity per weight, from an initializer of its name."""
    values, nodes = [], []
    for name, tensor in weights.items():
        wrapped = tensor if isinstance(tensor, ir.LazyTensor) else TorchTensor(tensor, name=name)
        type_ = ir.TensorType(wrapped.dtype)
        value = ir.Value(name=name, shape=ir.Shape(wrapped.shape), type=type_, const_value=wrapped)
        output = ir.Value(name=f"{name}.out", shape=ir.Shape(wrapped.shape), type=type_)
        values.append(value)
        nodes.append(ir.node("Identity", [value], outputs=[output]))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 20}, name="graph")
    return ir.Model(graph, ir_version=10)


def save(store, model, name):
    """Externalise and save; returns the data files and, by tensor, (file, offset, length)."""
    files = store.externalise(model, f"{name}.data")
    ir.save(model, store.folder / name)
    proto = onnx.load(store.folder / name, load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    return files, {n: (p["location"], int(p["offset"]), int(p["length"])) for n, p in places.items()}


def outputs_of(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {
        value.name: array for value, array in zip(session.get_outputs(), session.run(None, {}), strict=True)
    }


def test_weights_are_read_back(tmp_path):
    weights = {
        "a": weight(20, 30),
        "half": weight(40, 40, dtype=torch.float16),
        "transposed": weight(50, 10).T,
        "odd": weight(1031),
        "small": weight(3),
    }
    files, places = save(WeightStore(tmp_path), graph_of(**weights), "g.onnx")
    assert files == ["g.onnx.data"]
    # Small tensors stay in the model.
    assert set(places) == set(weights) - {"small"}
    assert all(offset % PAGE == 0 for _, offset, _ in places.values())
    read = outputs_of(tmp_path / "g.onnx")
    for name, tensor in weights.items():
        assert np.array_equal(read[f"{name}.out"], tensor.numpy())
    with (tmp_path / "g.onnx.data").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, (_, offset, length) in places.items():
            assert mapped[offset : offset + length] == weights[name].contiguous().numpy().tobytes()


def test_weight_of_two_graphs_is_written_once(tmp_path):
    store, shared = WeightStore(tmp_path), weight(64, 64)
    first_files, first = save(store, graph_of(shared=shared, own=weight(32, 32)), "first.onnx")
    second_files, second = save(store, graph_of(other=weight(32, 32), renamed=shared), "second.onnx")
    assert second["renamed"] == first["shared"]
    assert first_files == ["first.onnx.data"]
    assert sorted(second_files) == ["first.onnx.data", "second.onnx.data"]
    assert (tmp_path / "second.onnx.data").stat().st_size == 32 * 32 * 4
    assert np.array_equal(outputs_of(tmp_path / "second.onnx")["renamed.out"], shared.numpy())


def test_weight_twice_in_one_graph_is_written_once(tmp_path):
    shared = weight(64, 64)
    _, places = save(WeightStore(tmp_path), graph_of(a=shared, b=shared), "g.onnx")
    assert places["a"] == places["b"]
    assert (tmp_path / "g.onnx.data").stat().st_size == shared.nbytes


def test_graph_that_only_shares_has_no_file_of_its_own(tmp_path):
    store, shared = WeightStore(tmp_path), weight(64, 64)
    save(store, graph_of(a=shared), "first.onnx")
    files, _ = save(store, graph_of(a=shared, small=weight(2)), "second.onnx")
    assert files == ["first.onnx.data"]
    assert not (tmp_path / "second.onnx.data").exists()


def test_graph_without_large_weights_has_no_data(tmp_path):
    files, places = save(WeightStore(tmp_path), graph_of(small=weight(255)), "g.onnx")
    assert (files, places) == ([], {})
    assert {path.name for path in tmp_path.iterdir()} == {"g.onnx"}


def test_views_of_one_memory_are_different_weights(tmp_path):
    """Same address, other shape or stride: other bytes."""
    square = weight(40, 40)
    views = {"all": square, "transposed": square.T, "rows": square[:20], "flat": square.view(1600)}
    _, places = save(WeightStore(tmp_path), graph_of(**views), "g.onnx")
    read = outputs_of(tmp_path / "g.onnx")
    for name, view in views.items():
        assert np.array_equal(read[f"{name}.out"], view.numpy())
    assert places["all"] != places["transposed"]


def test_memory_that_is_used_again_is_not_mistaken_for_the_old_weight(tmp_path):
    """The allocator gives a freed address to the next tensor; the store must not know it then."""
    store, expected = WeightStore(tmp_path), {}
    for index in range(8):
        tensor = torch.full((64, 64), float(index))
        expected[f"g{index}.onnx"] = tensor.sum().item()
        save(store, graph_of(a=tensor), f"g{index}.onnx")
        del tensor
    for name, total in expected.items():
        assert outputs_of(tmp_path / name)["a.out"].sum() == total


def test_lazy_weight_is_made_when_it_is_written(tmp_path):
    made = []

    def make():
        made.append(1)
        return ir.tensor(np.arange(1024, dtype=np.float32))

    lazy = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([1024]), name="lazy")
    model = graph_of(lazy=lazy)
    assert not made
    save(WeightStore(tmp_path), model, "g.onnx")
    assert len(made) == 1
    assert np.array_equal(outputs_of(tmp_path / "g.onnx")["lazy.out"], np.arange(1024))
