"""The built-in measurement: its graphs are valid and compute, its rates are rates."""

import numpy as np
import onnx
import pytest

from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.profiling.machine_peak import MachinePeak, measure_peak
from edgeprune.runtimes.profiling.tiny_graph import write_tiny_graph


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_written_graph_is_valid_and_multiplies(tmp_path, dtype):
    path = tmp_path / "product.onnx"
    write_tiny_graph(path, "MatMul", dtype, (2, 2), 2)
    onnx.checker.check_model(str(path), full_check=True)
    rng = np.random.Generator(np.random.PCG64(0))
    left, right = rng.standard_normal((3, 5)).astype(dtype), rng.standard_normal((5, 2)).astype(dtype)
    backend = OnnxRuntimeBackend(threads=1)
    inputs = {"input0": backend.upload(left), "input1": backend.upload(right)}
    found = backend.download(backend.open(path).run(inputs, {})["output"])
    assert found.dtype == dtype
    assert np.allclose(found, left @ right, rtol=1e-2, atol=1e-2)


def test_lengths_of_more_than_a_byte(tmp_path):
    write_tiny_graph(tmp_path / "wide.onnx", "Max", "float32", (4,) * 30, 4)
    model = onnx.load(str(tmp_path / "wide.onnx"))
    assert len(model.graph.input) == 30
    assert [len(value.type.tensor_type.shape.dim) for value in model.graph.input] == [4] * 30


def test_the_peak_of_this_machine():
    peak = measure_peak(OnnxRuntimeBackend(threads=1), "float32")
    assert (peak.dtype, peak.matrix_size) == ("float32", 128)
    assert peak.rates.knee_tokens == pytest.approx(2 * peak.flops_per_second / peak.bytes_per_second)


def test_the_best_of_two_measurements():
    best = MachinePeak("float32", 5.0, 9.0, 512).best_of(MachinePeak("float32", 7.0, 8.0, 1024))
    assert best == MachinePeak("float32", 7.0, 9.0, 1024)
