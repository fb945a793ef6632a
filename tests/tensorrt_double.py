"""A double of the parts of CUDA's and TensorRT's runtime that the TensorRT backend calls.

It is a double because no machine that runs these tests executes engines: that takes an NVIDIA GPU. An "engine" is a
note of which ONNX file it stands for, "device" memory is host memory, and a run is one of ONNX Runtime on it. So it
shows that the backend asks for the right things in the right order, and nothing about TensorRT's kernels or their
speed.

What the real ones demand, it enforces: every tensor of a run has an address of 256-byte alignment inside memory that is
allocated, inputs lie inside the chosen profile's range and equal dimensions are equal, the scratch memory is set, large
enough, and scribbled over by every run; a profile is used by one context at a time; a size that TensorRT needs on the
host is read from the host, when the run is put on the stream. Work waits on the stream until somebody waits for it, as
on a GPU: who reads without waiting reads garbage, and who writes over what is still to be copied uploads that. CUDA
does not say when it reads memory that is not page-locked, so a copy from there must be waited for before anything else
is started.
"""

import ctypes
import enum
import json
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime

from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle
from edgeprune.json_data import to_json
from edgeprune.manifest import EngineEntry, EngineSetEntry, ProfileEntry
from edgeprune.runtimes.engine_profiles import Limits, profiles
from edgeprune.runtimes.engine_store import EngineStore
from edgeprune.targets import GIB, Target

MAGIC = "double of an engine"
LIBRARY, VERSION, SM = "tensorrt_rtx", "1.7.1.116", 89
_STREAM, _GARBAGE, _ALIGNMENT = 7, 0xFF, 256
_SCRATCH_BYTES = 3000
_TYPES = {
    "float32": (np.float32, "FLOAT"),
    "float16": (np.float16, "HALF"),
    "int64": (np.int64, "INT64"),
    "bool": (np.bool_, "BOOL"),
}


def view(address: int, size: int) -> np.ndarray:
    """Bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    INFO = 3


@dataclass
class GpuDouble:
    """A machine with a GPU.

    Attributes:
        capacity: Bytes of its memory.
        waits: How often the host waited for the stream.
        read_bytes: Bytes that the host read.
        uploads: Bytes of every copy to the device.
        runs: Name of the graph and of the profile of every run.
        contexts: Name of the graph and of the profile of every context that was made.
        strategies: Of kernel specialisation, by graph and profile.
        mallocs: How often memory was allocated.
        kernels_read: Bytes of compiled kernels that were read from a file.
    """

    capacity: int = 1 << 30
    version: str = VERSION
    waits: int = 0
    read_bytes: int = 0
    mallocs: int = 0
    kernels_read: int = 0
    uploads: list[int] = field(default_factory=list)
    runs: list[tuple[str, str]] = field(default_factory=list)
    contexts: list[tuple[str, str]] = field(default_factory=list)
    strategies: dict[tuple[str, str], str] = field(default_factory=dict)
    memory: dict[int, np.ndarray] = field(default_factory=dict)
    page_locked: dict[int, np.ndarray] = field(default_factory=dict)
    pending: list[Callable[[], None]] = field(default_factory=list)
    pageable: bool = False
    working: Any = field(default_factory=threading.RLock)

    def install(self, monkeypatch: Any, library: str = LIBRARY, sm: int = SM) -> None:
        """Make this process believe that it runs on the machine."""
        other = {"tensorrt": "tensorrt_rtx", "tensorrt_rtx": "tensorrt"}[library]
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda())
        monkeypatch.setitem(sys.modules, library, self.tensorrt(library))
        monkeypatch.setitem(sys.modules, other, None)
        target = Target("this", "double", sm, GIB, False, 0, {}, ("fp32",), ("10.3", "11"), True, "x86_64")
        monkeypatch.setattr("edgeprune.this_machine.this_machine", lambda: target)

    def used(self) -> int:
        return sum(block.nbytes for block in list(self.memory.values()))

    def check_range(self, what: str, address: int, size: int) -> None:
        """The bytes lie inside one allocation of the device."""
        for start, block in list(self.memory.items()):
            if start <= address and address + size <= start + block.nbytes - _ALIGNMENT:
                return
        raise AssertionError(f"{what}: {size} bytes at {address:#x} are not allocated")

    def flush(self) -> None:
        """Do what is on the stream, in its order."""
        with self.working:
            while self.pending:
                self.pending.pop(0)()
            self.pageable = False

    def is_page_locked(self, address: int, size: int) -> bool:
        return any(
            start <= address and address + size <= start + block.nbytes
            for start, block in list(self.page_locked.items())
        )

    def put_on_stream(self, work: Callable[[], None]) -> None:
        assert not self.pageable, "a copy from memory that is not page-locked was not waited for"
        self.pending.append(work)

    def cuda(self) -> types.ModuleType:
        """``cuda.bindings.runtime``."""
        module = types.ModuleType("cuda.bindings.runtime")
        kinds = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

        def malloc(size: int) -> tuple[int, int]:
            assert size > 0
            if self.used() + size > self.capacity:
                return 2, 0
            self.mallocs += 1
            block = np.full(size + _ALIGNMENT, _GARBAGE, np.uint8)
            address = block.ctypes.data + -block.ctypes.data % _ALIGNMENT
            self.memory[address] = block
            return 0, address

        def free(address: int) -> tuple[int]:
            self.flush()  # cudaFree waits for the device
            del self.memory[address]
            return (0,)

        def malloc_host(size: int) -> tuple[int, int]:
            block = np.full(size, _GARBAGE, np.uint8)
            self.page_locked[block.ctypes.data] = block
            return 0, block.ctypes.data

        def free_host(address: int) -> tuple[int]:
            self.flush()
            del self.page_locked[address]
            return (0,)

        def copy(target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
            assert stream == _STREAM
            if kind == kinds.cudaMemcpyHostToDevice:
                self.check_range("copy to the device", target, size)
                self.uploads.append(size)
                self.put_on_stream(lambda: np.copyto(view(target, size), view(source, size)))
                self.pageable = not self.is_page_locked(source, size)
            else:
                self.check_range("copy to the host", source, size)
                assert self.is_page_locked(target, size), "a copy to other memory would hold up the stream"
                self.read_bytes += size
                self.put_on_stream(lambda: np.copyto(view(target, size), view(source, size)))
            return (0,)

        def synchronize(stream: int) -> tuple[int]:
            assert stream == _STREAM
            self.waits += 1
            self.flush()
            return (0,)

        module.__dict__.update(
            cudaMemcpyKind=kinds,
            cudaStreamNonBlocking=1,
            cudaStreamCreateWithFlags=lambda _flags: (0, _STREAM),
            cudaStreamDestroy=lambda _stream: (0,),
            cudaMalloc=malloc,
            cudaFree=free,
            cudaMallocHost=malloc_host,
            cudaFreeHost=free_host,
            cudaMemcpyAsync=copy,
            cudaStreamSynchronize=synchronize,
            cudaGetLastError=lambda: (2,),
            cudaGetErrorString=lambda _status: (0, b"double"),
        )
        return module

    def tensorrt(self, name: str) -> types.ModuleType:
        """``tensorrt`` or ``tensorrt_rtx``."""
        module = types.ModuleType(name)
        gpu = self

        class Runtime:
            def __init__(self, log: Any) -> None:
                self.log = log

            def deserialize_cuda_engine(self, content: Any) -> "EngineDouble | None":
                try:
                    note = json.loads(bytes(content))
                    assert note["magic"] == MAGIC
                except (ValueError, AssertionError):
                    self.log.log(Severity.ERROR, "Assertion bufferSize >= minBufferSize failed")
                    self.log.log(Severity.ERROR, "another one that follows from it")
                    return None
                if note["fails"] == "memory":
                    self.log.log(Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 5 bytes.)")
                    return None
                return EngineDouble(gpu, module, note, self.log)

        class Logger:
            ERROR, INTERNAL_ERROR = Severity.ERROR, Severity.INTERNAL_ERROR

        module.__dict__.update(
            __version__=self.version,
            Builder=object,
            ILogger=Logger,
            Runtime=Runtime,
            DataType=enum.Enum("DataType", ["FLOAT", "HALF", "INT64", "INT32", "BOOL"]),
            TensorLocation=enum.Enum("TensorLocation", ["DEVICE", "HOST"]),
            TensorIOMode=enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"]),
            ExecutionContextAllocationStrategy=enum.Enum(
                "Allocation", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
            ),
        )
        if name == "tensorrt_rtx":
            module.__dict__["DynamicShapesKernelSpecializationStrategy"] = enum.Enum(
                "Specialization", ["LAZY", "EAGER", "NONE"]
            )
        return module


class EngineDouble:
    """``ICudaEngine``."""

    def __init__(self, gpu: GpuDouble, trt: Any, note: dict[str, Any], log: Any) -> None:
        self.gpu, self.trt, self.note, self.log = gpu, trt, note, log
        self.tensors = {tensor["name"]: tensor for tensor in (*note["inputs"], *note["outputs"])}
        self.inputs = [tensor["name"] for tensor in note["inputs"]]
        self.outputs = [tensor["name"] for tensor in note["outputs"]]
        self.session = _session(note["onnx"])
        self.contexts: weakref.WeakSet[ContextDouble] = weakref.WeakSet()
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = note["scratch"]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType[_TYPES[self.tensors[name]["dtype"]][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.tensors[name]["shape"])

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.HOST if self.on_host(name) else self.trt.TensorLocation.DEVICE

    def on_host(self, name: str) -> bool:
        return name in self.note["on_host"]

    def create_runtime_config(self) -> "ConfigDouble":
        return ConfigDouble(self.gpu)

    def create_execution_context(self, given: Any) -> "ContextDouble":
        rtx = isinstance(given, ConfigDouble)
        assert rtx == hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy")
        assert (
            given.allocation if rtx else given
        ) is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if rtx:
            given.cache.kernels += b"k"
        context = ContextDouble(self, given.dynamic_shapes_kernel_specialization_strategy.name if rtx else "")
        self.contexts.add(context)
        return context


class ConfigDouble:
    """``IRuntimeConfig`` of TensorRT for RTX."""

    allocation: Any = None
    cache: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, gpu: GpuDouble) -> None:
        self.gpu = gpu

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> "CacheDouble":
        return CacheDouble(self.gpu)

    def set_runtime_cache(self, cache: "CacheDouble") -> bool:
        self.cache = cache
        return True


class CacheDouble:
    """``IRuntimeCache``: one byte per context that was made with it."""

    def __init__(self, gpu: GpuDouble) -> None:
        self.kernels, self.gpu = b"", gpu

    def deserialize(self, blob: Any) -> bool:
        self.kernels = bytes(blob)
        self.gpu.kernels_read = len(self.kernels)
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.kernels)


class ContextDouble:
    """``IExecutionContext``."""

    def __init__(self, engine: EngineDouble, strategy: str) -> None:
        self.engine, self.strategy = engine, strategy
        self.profile: int | None = None
        self.scratch: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {
            name: engine.get_tensor_shape(name)
            for name in engine.inputs
            if -1 not in engine.get_tensor_shape(name)
        }
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == _STREAM
        assert all(other is self or other.profile != index for other in self.engine.contexts)
        self.profile = index
        key = (self.engine.note["graph"], self.ranges_entry["name"])
        self.engine.gpu.contexts.append(key)
        self.engine.gpu.strategies[key] = self.strategy
        return True

    @property
    def ranges_entry(self) -> dict[str, Any]:
        assert self.profile is not None, "no profile was chosen"
        entry: dict[str, Any] = self.engine.note["profiles"][self.profile]
        return entry

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % _ALIGNMENT == 0
        assert size >= self.engine.device_memory_size_v2
        self.engine.gpu.check_range("scratch memory", address, size)
        self.scratch = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.inputs
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output, from the sizes of the inputs, before anything runs."""
        sizes = self.sizes()
        known = [_resolve(dim, sizes) for dim in self.engine.tensors[name]["shape"]]
        if None not in known:
            return tuple(size for size in known if size is not None)
        # The bundle does not say it: a run with zeros does, because no size depends on data.
        return self.run({name: np.zeros(self.shapes[name], self.dtype(name)) for name in self.on_device()})[
            name
        ].shape

    def on_device(self) -> list[str]:
        return [name for name in self.engine.inputs if not self.engine.on_host(name)]

    def sizes(self) -> dict[str, int]:
        """Size by dimension; equal dimensions are equal, and in the range of the profile."""
        sizes: dict[str, int] = {}
        for name in self.engine.inputs:
            assert name in self.shapes, f"the shape of {name} was not said"
            declared = self.engine.tensors[name]["shape"]
            assert len(declared) == len(self.shapes[name])
            for dim, size in zip(declared, self.shapes[name], strict=True):
                assert size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim), (name, dim)
        if names.NUM_KEEP in self.engine.inputs and self.engine.on_host(names.NUM_KEEP):
            sizes[names.NUM_KEEP] = int(self.host_value(names.NUM_KEEP))
        for dim, (least, _, greatest) in self.ranges_entry["ranges"].items():
            # TensorRT has a range for a value only where it makes sizes of it.
            if dim not in sizes:
                assert dim == names.NUM_KEEP, dim
                continue
            assert least <= sizes[dim] <= greatest, f"{dim} is {sizes[dim]}, outside of {least} … {greatest}"
        return sizes

    def dtype(self, name: str) -> Any:
        return np.dtype(_TYPES[self.engine.tensors[name]["dtype"]][0])

    def host_value(self, name: str) -> np.ndarray:
        address = self.addresses[name]
        for start, block in list(self.engine.gpu.memory.items()):
            end = start + block.nbytes - _ALIGNMENT
            assert not start <= address < end, f"{name} must be on the host"
        return view(address, 8).copy().view(np.int64).reshape(())

    def run(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        host = {name: self.host_value(name) for name in self.engine.inputs if self.engine.on_host(name)}
        return dict(
            zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, values | host), strict=True)
        )

    def execute_async_v3(self, stream: int) -> bool:
        """Check everything that TensorRT would, and put the run on the stream."""
        gpu, engine = self.engine.gpu, self.engine
        assert stream == _STREAM
        self.sizes()
        assert self.scratch is not None, "no scratch memory was set"
        scratch = self.scratch
        if engine.note["fails"] == "raises":
            raise RuntimeError("Error in\nenqueue")
        if engine.note["fails"]:
            engine.log.log(Severity.ERROR, "a kernel failed")
            return False
        gpu.runs.append((engine.note["graph"], self.ranges_entry["name"]))
        shapes = {name: self.shapes[name] for name in engine.inputs}
        shapes |= {name: self.get_tensor_shape(name) for name in engine.outputs}
        places: dict[str, tuple[int, int]] = {}
        for name in engine.tensors:
            address = self.addresses[name]
            size = int(np.prod(shapes[name], dtype=np.int64)) * self.dtype(name).itemsize
            if not engine.on_host(name):
                assert address, f"{name} has no address"
                assert address % _ALIGNMENT == 0, f"{name} is not aligned"
                gpu.check_range(name, address, size)
                places[name] = (address, size)
        host = {name: self.host_value(name) for name in engine.inputs if engine.on_host(name)}
        host_outputs = {name: self.addresses[name] for name in engine.outputs if engine.on_host(name)}

        def read(name: str) -> np.ndarray:
            address, size = places[name]
            return view(address, size).copy().view(self.dtype(name)).reshape(shapes[name])

        def work() -> None:
            inputs = {name: read(name) for name in engine.inputs if name in places} | host
            view(*scratch)[:] = _GARBAGE
            produced = engine.session.run(engine.outputs, inputs)
            for name, value in zip(engine.outputs, produced, strict=True):
                assert value.shape == shapes[name], (name, value.shape, shapes[name])
                if name in places and value.nbytes:
                    view(*places[name])[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        # A size that TensorRT gives on the host is known without the device.
        if host_outputs:
            values = self.run({name: np.zeros(shapes[name], self.dtype(name)) for name in self.on_device()})
            for name, address in host_outputs.items():
                view(address, values[name].nbytes)[:] = values[name].reshape(-1).view(np.uint8)
        gpu.put_on_stream(work)
        # What comes next must say everything again that may have changed: nothing of this run is left over.
        self.addresses.clear()
        return True


def _resolve(dim: int | str, sizes: dict[str, int]) -> int | None:
    if isinstance(dim, int):
        return dim
    if all(part in sizes for part in dim.split(" + ")):
        return sum(sizes[part] for part in dim.split(" + "))
    return None


@lru_cache(maxsize=64)
def _session(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def add_engines(
    folder: Path,
    strategy: str,
    *,
    builder: str = LIBRARY,
    version: str = VERSION,
    sm: int = SM,
    target: str = "double",
    limits: tuple[int, int] | None = None,
    chosen: Mapping[str, tuple[ProfileEntry, ...]] | None = None,
    plugin: str | None = None,
    on_host: tuple[str, ...] = (names.NUM_KEEP,),
    failing: Mapping[str, str] = MappingProxyType({}),
) -> EngineSetEntry:
    """Enter doubles of engines into a bundle, with the profiles that a build would give them."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    store = EngineStore(bundle, target)
    entries: dict[str, EngineEntry] = {}
    if chosen is None:
        chosen = profiles(manifest, Limits.of(manifest, *(limits or (None, None))), strategy)
    for index, (name, graph) in enumerate(manifest.graphs.items()):
        note = {
            "magic": MAGIC,
            "graph": name,
            "onnx": str(folder / graph.file.path),
            "inputs": to_json(graph.inputs),
            "outputs": to_json(graph.outputs),
            "profiles": to_json(chosen[name]),
            "scratch": _SCRATCH_BYTES + 1000 * index,
            "on_host": on_host,
            "fails": failing.get(name, ""),
        }
        entries[name] = store.add(name, "0" * 64, json.dumps(note).encode(), chosen[name], 0.0)
    engines = EngineSetEntry("0" * 64, builder, version, sm, "fp32", plugin, strategy, {strategy: 1}, entries)
    store.publish(engines)
    return engines
