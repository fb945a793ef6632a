"""ONNX Runtime: on the CPU, or on an NVIDIA GPU with IO binding, by itself or through TensorRT."""

import os
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.available_cores import available_cores
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError
from edgeprune.onnxruntime_module import onnxruntime_module
from edgeprune.runtimes.backend import DeviceTensor, Graph
from edgeprune.runtimes.float16_weights import copies_fit, keep_float16
from edgeprune.runtimes.onnxruntime_providers import (
    check_available,
    find_provider,
    first_line,
    graph_options,
    rtx_devices,
)


class OnnxRuntimeBackend:
    """Runs graphs with ONNX Runtime, whose runs end when the device is done."""

    asynchronous = False

    def __init__(self, provider: str = "cpu", threads: int | None = None, *, fuse_qdq: bool = True) -> None:
        """Choose the execution provider.

        Args:
            provider: "cpu", "cuda", "tensorrt" or "tensorrt_rtx".
            threads: Threads of an operator; None lets ONNX Runtime use all cores.
            fuse_qdq: Whether products between QuantizeLinear and DequantizeLinear may run on integers; FP8 must not,
                because ONNX Runtime 1.31 takes it for INT8 and then finds the graph invalid.

        Raises:
            BackendError: The provider is unknown or this ONNX Runtime was built without it.
            MissingExtraError: ONNX Runtime, or the provider's package, is not installed.
        """
        self._provider = find_provider(provider)
        self.name = f"onnxruntime-{provider}"
        self.device = self._provider.device
        self._ort: Any = onnxruntime_module(extra=self._provider.extra, purpose="to run a bundle")
        check_available(self._ort, self._provider)
        self._threads = threads
        self._fuse_qdq = fuse_qdq
        # On the CPU, opening is the work of one thread: it lays out the weights for the kernels.
        self.loads_at_once = (threads or available_cores()) if self.device == "cpu" else 1
        # By bundle, decided before its first graph takes memory.
        self._copies_fit: dict[Path, bool] = {}
        self._deciding = threading.Lock()

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Open the ONNX file of a graph; on the CPU, float16 weights stay so where float32 copies would not fit."""
        options = graph_options(self._provider, bundle, name)
        with self._deciding:
            if bundle.path not in self._copies_fit:
                self._copies_fit[bundle.path] = self.device != "cpu" or copies_fit(bundle.manifest)
        path = bundle.file(bundle.manifest.graphs[name].file)
        return self.open(path, options, widen_weights=self._copies_fit[bundle.path])

    def longest_sequence(self, bundle: Bundle) -> int | None:  # noqa: ARG002 - of every bundle the same
        """ONNX Runtime takes any size; what its providers build covers the whole context."""
        return None

    def open(
        self, path: Path, provider_options: Mapping[str, str] | None = None, *, widen_weights: bool = True
    ) -> Graph:
        """Open an ONNX file.

        Args:
            path: The file.
            provider_options: What the provider is told of it.
            widen_weights: Whether ONNX Runtime may hold float32 copies of float16 weights
                (:mod:`edgeprune.runtimes.float16_weights`).

        Raises:
            BackendError: ONNX Runtime cannot run it.
        """
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        # A chain of sessions shares the cores: threads that spin after a run slow the next graph by a third.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not self._fuse_qdq:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if not widen_weights:
            keep_float16(self._ort, options)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        told = dict(provider_options or {})
        try:
            for key in ("trt_engine_cache_path", "nv_runtime_cache_path"):
                if key in told:
                    Path(told[key]).mkdir(parents=True, exist_ok=True)
            session = self._session(os.fspath(path), options, told)
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot open {path.name} ({first_line(error)})") from error
        if session.get_providers()[0] != self._provider.title:
            raise BackendError(
                f"ONNX Runtime fell back from {self._provider.title} to {session.get_providers()[0]}: "
                "check the driver, CUDA and cuDNN with edgeprune doctor, or run with --provider cpu"
            )
        return _OnnxRuntimeGraph(self, session, path.name)

    def _session(self, path: str, options: Any, told: dict[str, str]) -> Any:
        if self._provider.name == "tensorrt_rtx":
            # A provider of another package is chosen by its devices.
            options.add_provider_for_devices(rtx_devices(self._ort)[:1], told)
            return self._ort.InferenceSession(path, options)
        providers = [(self._provider.title, told), *self._provider.after]
        return self._ort.InferenceSession(path, options, providers=providers)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """Uninitialised memory; at least one element, because a null pointer is no tensor."""
        if self.device == "cpu":
            array = np.empty(max(1, prod(shape)), dtype)
            return DeviceTensor(array.ctypes.data, shape, dtype, array)
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(
            [max(1, prod(shape))], dtype.type, self.device, 0
        )
        return DeviceTensor(value.data_ptr(), shape, dtype, value)

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """Put a host array on the device."""
        array = np.ascontiguousarray(array)
        if not array.size:
            return self.allocate(array.shape, array.dtype)
        if self.device == "cpu":
            return DeviceTensor(array.ctypes.data, array.shape, array.dtype, array)
        value = self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        return DeviceTensor(value.data_ptr(), array.shape, array.dtype, value)

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Read a tensor that a graph allocated, or a host array."""
        owner: Any = tensor.owner
        if isinstance(owner, np.ndarray):
            first = (tensor.address - owner.ctypes.data) // owner.itemsize
            return owner.reshape(-1)[first : first + prod(tensor.shape)].reshape(tensor.shape)
        array: NDArray[Any] = owner.numpy()
        return array.reshape(tensor.shape)

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _OnnxRuntimeGraph:
    """An opened session."""

    def __init__(self, backend: OnnxRuntimeBackend, session: Any, name: str) -> None:
        self._backend = backend
        self._session = session
        self._name = name
        self._outputs = [value.name for value in session.get_outputs()]
        # The exporter drops inputs that a graph does not read.
        self._inputs = {value.name for value in session.get_inputs()}

    def run(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        """Bind and run; a binding of its own per run, so that threads may share a graph."""
        device = self._backend.device
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            if name in self._inputs:
                binding.bind_input(name, device, 0, tensor.dtype.type, tensor.shape, tensor.address)
        for name in self._outputs:
            bound = outputs.get(name)
            if bound is None:
                binding.bind_output(name, device, 0)
            else:
                binding.bind_output(name, device, 0, bound.dtype.type, bound.shape, bound.address)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {self._name} ({first_line(error)})") from error
        produced: dict[str, DeviceTensor] = {}
        for name, value in zip(self._outputs, binding.get_outputs(), strict=True):
            bound = outputs.get(name)
            if bound is not None:
                produced[name] = bound
                continue
            dtype = _numpy_dtype(value.data_type())
            produced[name] = DeviceTensor(value.data_ptr(), tuple(value.shape()), dtype, value)
        return produced


def _numpy_dtype(ort_type: str) -> np.dtype[Any]:
    """The dtype of ONNX Runtime's type name, such as "tensor(float16)"."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))
