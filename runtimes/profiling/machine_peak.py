"""What this machine reaches at its best, measured with the runtime that the bundle runs on."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.roofline import Rates
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.profiling.tiny_graph import write_tiny_graph

# A product is repeated with larger matrices until it takes this long, or is this large.
_ENOUGH_SECONDS, _LARGEST = 0.02, 8192
_SMALLEST = 512
_COPIED_BYTES = 128 * 2**20  # beyond any cache
_REPEATS = 6
_BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True)
class MachinePeak:
    """The best of several measurements.

    Attributes:
        dtype: Of the matrices.
        flops_per_second: Of a product of square matrices.
        bytes_per_second: Of copying what no cache holds, bytes read and bytes written counted.
        matrix_size: Rows and columns of the matrices.
    """

    dtype: str
    flops_per_second: float
    bytes_per_second: float
    matrix_size: int

    def __post_init__(self) -> None:
        if self.flops_per_second <= 0 or self.bytes_per_second <= 0:
            raise ValueError("a machine's peak rates are above 0")

    @property
    def rates(self) -> Rates:
        """For the roofline."""
        width = _BYTES[self.dtype]
        return Rates(self.flops_per_second, self.bytes_per_second, width, width)

    def best_of(self, other: "MachinePeak") -> "MachinePeak":
        """The higher rates of two measurements."""
        product = max(self, other, key=lambda peak: peak.flops_per_second)
        bandwidth = max(self.bytes_per_second, other.bytes_per_second)
        return MachinePeak(self.dtype, product.flops_per_second, bandwidth, product.matrix_size)


def measure_peak(backend: OnnxRuntimeBackend, dtype: str) -> MachinePeak:
    """Multiply matrices and copy memory; takes about a second.

    Raises:
        BackendError: The runtime cannot.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-peak-") as folder:
        size, rate = _product_rate(backend, Path(folder), dtype)
        return MachinePeak(dtype, rate, _copy_rate(backend, Path(folder)), size)


def _product_rate(backend: OnnxRuntimeBackend, folder: Path, dtype: str) -> tuple[int, float]:
    write_tiny_graph(folder / "product.onnx", "MatMul", dtype, (2, 2), 2)
    size, best = _SMALLEST, 0.0
    while True:
        matrix = np.full((size, size), 1 / size, dtype)
        seconds = _best_seconds(backend, folder / "product.onnx", [matrix, matrix])
        best = max(best, 2 * size**3 / seconds)
        if seconds >= _ENOUGH_SECONDS or size >= _LARGEST:
            return size, best
        size *= 2


def _copy_rate(backend: OnnxRuntimeBackend, folder: Path) -> float:
    # Negation, because a runtime may leave a plain copy away.
    write_tiny_graph(folder / "copy.onnx", "Neg", "float32", (1,), 1)
    array = np.ones(_COPIED_BYTES // 4, np.float32)
    return 2 * array.nbytes / _best_seconds(backend, folder / "copy.onnx", [array])


def _best_seconds(backend: OnnxRuntimeBackend, path: Path, inputs: list[np.ndarray]) -> float:
    graph = backend.open(path)
    tensors = {f"input{index}": backend.upload(array) for index, array in enumerate(inputs)}
    outputs = {"output": backend.allocate(inputs[0].shape, inputs[0].dtype)}
    graph.run(tensors, outputs)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        graph.run(tensors, outputs)
        backend.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
