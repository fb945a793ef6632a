import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgeprune.errors import BackendError
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.session import open_session

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


@pytest.fixture
def backend():
    return OnnxRuntimeBackend(threads=1)


def save_sum(folder: Path, dtype: str = "float32") -> Path:
    """total = left + right over [n, 2], and the sum of it."""
    element = TYPES[dtype]
    nodes = [
        helper.make_node("Add", ["left", "right"], ["total"]),
        helper.make_node("ReduceSum", ["total"], ["sum"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info(name, element, ["n", 2]) for name in ("left", "right")]
    outputs = [
        helper.make_tensor_value_info("total", element, ["n", 2]),
        helper.make_tensor_value_info("sum", element, []),
    ]
    graph = helper.make_graph(nodes, "sum", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "sum.onnx")
    return folder / "sum.onnx"


def test_unknown_provider():
    with pytest.raises(
        BackendError, match="provider 'rocm' is unknown, known: cpu, cuda, tensorrt, tensorrt_rtx"
    ):
        OnnxRuntimeBackend("rocm")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_cuda_is_not_in_this_onnxruntime(atp_bundle):
    with pytest.raises(BackendError, match=r"no CUDAExecutionProvider .*edgeprune\[gpu\]"):
        OnnxRuntimeBackend("cuda")
    with pytest.raises(BackendError, match="no CUDAExecutionProvider"):
        open_session(atp_bundle, provider="cuda")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [3, 1, 0])
def test_run(backend, tmp_path, dtype, rows):
    graph = backend.open(save_sum(tmp_path, dtype))
    left = np.arange(2 * rows).reshape(rows, 2).astype(dtype)
    inputs = {"left": backend.upload(left), "right": backend.upload(left + 1)}
    outputs = graph.run(inputs, {})
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in outputs.items()} == {
        "total": ((rows, 2), np.dtype(dtype)),
        "sum": ((), np.dtype(dtype)),
    }
    assert np.array_equal(backend.download(outputs["total"]), 2 * left + 1)
    assert backend.download(outputs["sum"]) == (2 * left + 1).sum()


def test_bound_output_is_written_in_place(backend, tmp_path):
    graph = backend.open(save_sum(tmp_path))
    ones = backend.upload(np.ones((2, 2), np.float32))
    memory = backend.upload(np.zeros(12, np.float32))
    place = memory.view((2, 2), offset=4)
    outputs = graph.run({"left": ones, "right": ones}, {"total": place})
    assert outputs["total"] is place
    assert backend.download(memory).tolist() == [0.0] * 4 + [2.0] * 4 + [0.0] * 4
    assert backend.download(place).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert float(backend.download(outputs["sum"])) == 8


def test_bound_output_of_the_wrong_size(backend, tmp_path):
    graph = backend.open(save_sum(tmp_path))
    ones = backend.upload(np.ones((2, 2), np.float32))
    with pytest.raises(BackendError, match=r"ONNX Runtime failed in sum\.onnx") as caught:
        graph.run({"left": ones, "right": ones}, {"total": backend.allocate((3, 2), np.dtype("float32"))})
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit(backend, tmp_path):
    graph = backend.open(save_sum(tmp_path))
    with pytest.raises(BackendError, match=r"failed in sum\.onnx"):
        graph.run(
            {
                "left": backend.upload(np.ones((2, 2), np.float32)),
                "right": backend.upload(np.ones((3, 2), np.float32)),
            },
            {},
        )


def test_inputs_that_the_graph_does_not_read_are_ignored(backend, tmp_path):
    graph = backend.open(save_sum(tmp_path))
    ones = backend.upload(np.ones((1, 2), np.float32))
    assert float(backend.download(graph.run({"left": ones, "right": ones, "other": ones}, {})["sum"])) == 4


@pytest.mark.parametrize("content", [None, b"", b"no protobuf", "truncated"])
def test_graphs_that_cannot_be_opened(backend, tmp_path, content):
    path = tmp_path / "graph.onnx"
    if content == "truncated":
        content = save_sum(tmp_path).read_bytes()[:60]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BackendError, match=r"cannot open graph\.onnx") as caught:
        backend.open(path)
    assert "\n" not in str(caught.value)


def test_allocated_memory(backend):
    tensor = backend.allocate((2, 3), np.dtype("float16"))
    assert (tensor.shape, tensor.dtype) == ((2, 3), np.dtype("float16"))
    assert backend.download(tensor).shape == (2, 3)
    empty = backend.allocate((2, 0), np.dtype("int64"))
    assert empty.address != 0
    assert backend.download(empty).shape == (2, 0)


def test_upload_of_arrays_that_are_not_contiguous(backend):
    array = np.arange(12).reshape(3, 4).T
    assert np.array_equal(backend.download(backend.upload(array)), array)


def test_views(backend):
    array = np.arange(12, dtype=np.int64)
    tensor = backend.upload(array)
    assert backend.download(tensor.view((2, 3), offset=5)).tolist() == [[5, 6, 7], [8, 9, 10]]
    # A view of a view starts where that one does.
    assert backend.download(tensor.view((6,), offset=5).view((2,), offset=2)).tolist() == [7, 8]
    assert backend.download(tensor.view((0,), offset=12)).tolist() == []
    for shape, offset in (((13,), 0), ((3, 3), 4), ((1,), -1)):
        with pytest.raises(ValueError, match="does not fit"):
            tensor.view(shape, offset)


def test_onnx_runtime_reports_nothing(tmp_path):
    # Its telemetry begins with a file in the user's cache.
    program = (
        "import sys; from pathlib import Path; from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend\n"
        "OnnxRuntimeBackend('cpu').open(Path(sys.argv[1]))"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    subprocess.run([sys.executable, "-c", program, str(save_sum(tmp_path))], env=environment, check=True)
    assert list(home.rglob("*")) == []
