"""ONNX Runtime: on the CPU, or on an NVIDIA GPU with IO binding."""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BackendError
from edgeprune.extras import require
from edgeprune.runtimes.backend import DeviceTensor, Graph

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXTRA = {"cpu": "cpu", "cuda": "gpu"}


class OnnxRuntimeBackend:
    """Runs graphs with ONNX Runtime, whose runs end when the device is done."""

    asynchronous = False

    def __init__(self, provider: str = "cpu", threads: int | None = None) -> None:
        """Choose the execution provider.

        Args:
            provider: "cpu" or "cuda".
            threads: Threads of an operator; None lets ONNX Runtime use all cores.

        Raises:
            BackendError: The provider is unknown or this ONNX Runtime was built without it.
            MissingExtraError: ONNX Runtime is not installed.
        """
        if provider not in PROVIDERS:
            raise BackendError(f"provider '{provider}' is unknown, known: {', '.join(PROVIDERS)}")
        self.name = f"onnxruntime-{provider}"
        self.device = provider
        self._ort: Any = require("onnxruntime", extra=_EXTRA[provider], purpose="to run a bundle")
        available = self._ort.get_available_providers()
        if PROVIDERS[provider] not in available:
            raise BackendError(
                f"this onnxruntime has no {PROVIDERS[provider]} (it has {', '.join(available)}): "
                "pip uninstall onnxruntime, then pip install 'edgeprune[gpu]'"
            )
        self._threads = threads

    def load(self, path: Path) -> Graph:
        """Open a graph."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        # A chain of sessions shares the cores: threads that spin after a run slow the next graph by a third.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        providers = [PROVIDERS[self.device]]
        if self.device != "cpu":
            providers.append(PROVIDERS["cpu"])
        try:
            session = self._ort.InferenceSession(os.fspath(path), options, providers=providers)
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot open {path.name} ({_first_line(error)})") from error
        if session.get_providers()[0] != PROVIDERS[self.device]:
            raise BackendError(
                f"ONNX Runtime fell back from {PROVIDERS[self.device]} to {session.get_providers()[0]}: "
                "check the driver, CUDA and cuDNN with edgeprune doctor, or run with --provider cpu"
            )
        return _OnnxRuntimeGraph(self, session, path.name)

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
            raise BackendError(f"ONNX Runtime failed in {self._name} ({_first_line(error)})") from error
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
