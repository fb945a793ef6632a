"""TensorRT and TensorRT for RTX: the engines that ``edgeprune build`` put into a bundle, on the first GPU."""

import hashlib
import mmap
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import plugins
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError
from edgeprune.manifest import EngineEntry, EngineSetEntry, GraphEntry
from edgeprune.runtimes.backend import DeviceTensor, Graph
from edgeprune.runtimes.cuda_device import CudaDevice
from edgeprune.runtimes.device_arena import Arena, MemoryBlock
from edgeprune.runtimes.engine_choice import (
    choose_engines,
    choose_profile,
    dimension_places,
    dimension_sizes,
    longest_sequence,
)
from edgeprune.runtimes.engine_tensors import (
    check_output_shape,
    engine_tensors,
    input_addresses,
    output_addresses,
)
from edgeprune.runtimes.kernel_cache import KernelCache
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary, TensorRtLog, installed_libraries, new_log
from edgeprune.runtimes.user_cache import user_cache

_OUT_OF_MEMORY = re.compile("out ?of ?memory", re.IGNORECASE)
_LESS = "close other programs that use the GPU, or build with --profiles one and a lower --max-sequence"
_AGAIN = (
    "build the engines again with edgeprune build BUNDLE --target this, or run with --backend onnxruntime"
)
_REBUILD = "build it again with edgeprune build BUNDLE --target this; the rest of the bundle is whole"


@dataclass(frozen=True)
class _Uploaded:
    """Memory with what was uploaded to it, where that is a single number: TensorRT reads sizes on the host."""

    block: MemoryBlock
    value: NDArray[Any] | None


@dataclass(frozen=True)
class _Runtime:
    """A TensorRT that deserializes, with the log of its errors and, for RTX, the kernels that it compiled before."""

    library: TensorRtLibrary
    log: TensorRtLog
    runtime: Any
    kernels: KernelCache | None


class TensorRtBackend:
    """Runs engines of TensorRT on one stream of the first GPU.

    The host puts a prompt's graphs on the stream one after the other and waits only where it reads something.

    Raises:
        BackendError: There is no GPU or no TensorRT.
        MissingExtraError: cuda-bindings is not installed.
    """

    asynchronous = True
    loads_at_once = 1

    def __init__(self) -> None:
        from edgeprune.this_machine import this_machine

        machine = this_machine()
        if machine is None:
            raise BackendError(
                "this machine has no NVIDIA GPU with a driver, which TensorRT needs: run with --backend onnxruntime"
            )
        self.name = "tensorrt"
        self.device = CudaDevice()
        self.arena = Arena(self.device.memory)
        # Contexts keep shapes and addresses from one call to the next, so one thread at a time sets and starts them.
        self.enqueueing = threading.Lock()
        self._sm = machine.sm
        self._libraries = installed_libraries()
        self._runtimes: dict[str, _Runtime] = {}

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Deserialize the engine of a graph."""
        engines = self._engines(bundle)
        runtime = self._runtime(engines)
        entry = engines.engines[name]
        engine = _deserialize(runtime, bundle.file(entry.file), entry)
        self.arena.reserve(engine.device_memory_size_v2)
        return _TensorRtGraph(self, runtime, engine, name, bundle.manifest.graphs[name], entry)

    def longest_sequence(self, bundle: Bundle) -> int | None:
        """What the profile of the longest cache holds, so that no answer ends in the middle."""
        return longest_sequence(bundle.manifest, self._engines(bundle))

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """Uninitialised memory, used again when nothing refers to it any more."""
        block = self.device.memory.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return DeviceTensor(block.address, shape, dtype, block)

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """Put a host array on the device, without waiting for it."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        block = self.device.upload(array)
        value = None if array.shape else array.copy()
        return DeviceTensor(block.address, array.shape, array.dtype, _Uploaded(block, value))

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Read a tensor; waits for what writes it."""
        return self.device.download(tensor.address, tensor.shape, tensor.dtype)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.device.synchronize()

    def _engines(self, bundle: Bundle) -> EngineSetEntry:
        versions = {library.name: library.version for library in self._libraries.values()}
        return choose_engines(bundle.manifest, self._sm, versions)[1]

    def _runtime(self, engines: EngineSetEntry) -> _Runtime:
        if engines.builder not in self._runtimes:
            library = self._libraries[engines.builder]
            log = new_log(library.module)
            runtime = library.module.Runtime(log)
            kernels = self._kernels(library) if library.is_rtx else None
            self._runtimes[engines.builder] = _Runtime(library, log, runtime, kernels)
            if engines.plugin_version is not None:
                plugins.load(library.module, needed=engines.plugin_version)
        return self._runtimes[engines.builder]

    def _kernels(self, library: TensorRtLibrary) -> KernelCache:
        """Kept when nothing uses the backend any more, at the latest when Python ends."""
        kernels = KernelCache(user_cache() / f"kernels-{library.version}-sm{self._sm}")
        weakref.finalize(self, kernels.keep)
        return kernels


def _deserialize(runtime: _Runtime, path: Path, entry: EngineEntry) -> Any:
    """The engine of a file whose content is what was built; the file is mapped, not copied."""
    if not path.is_file():
        raise BackendError(f"the engine {path.name} is missing: {_REBUILD}")
    if path.stat().st_size != entry.file.bytes or not entry.file.bytes:
        raise BackendError(f"the engine {path.name} is not the file that was built (truncated?): {_REBUILD}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if hashlib.sha256(content).hexdigest() != entry.file.sha256:
            raise BackendError(
                f"the engine {path.name} is not the file that was built (damaged?): {_REBUILD}"
            )
        runtime.log.clear()
        engine = runtime.runtime.deserialize_cuda_engine(content)
    if engine is None:
        library, reason = runtime.library, runtime.log.first or "no reason given"
        raise BackendError(
            f"{library.name} {library.version} does not take the engine {path.name} ({reason}): "
            f"{_LESS if _OUT_OF_MEMORY.search(reason) else _REBUILD}"
        )
    return engine


class _TensorRtGraph:
    """A deserialized engine with one execution context per profile, made when it is first needed."""

    def __init__(
        self,
        backend: TensorRtBackend,
        runtime: _Runtime,
        engine: Any,
        name: str,
        graph: GraphEntry,
        entry: EngineEntry,
    ) -> None:
        self._backend = backend
        self._library, self._log = runtime.library, runtime.log
        # An engine must not outlive the runtime that made it.
        self._runtime = runtime.runtime
        self._kernels = runtime.kernels
        self._engine = engine
        self._name = name
        self._profiles = entry.profiles
        self._places = dimension_places(graph)
        self._inputs, self._outputs = engine_tensors(runtime.library.module, engine)
        self._contexts: dict[int, _Context] = {}

    def run(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        """Put the graph on the stream."""
        reads = input_addresses(self._name, self._inputs, inputs)
        values = {tensor.name: self._value(inputs[tensor.name]) for tensor in self._inputs if tensor.on_host}
        numbers = {name: int(value) for name, value in values.items()}
        for name, axis in self._places.values():
            if axis is None and name not in numbers:
                numbers[name] = int(self._value(inputs[name]))
        sizes = dimension_sizes(self._places, inputs, numbers)
        profile = choose_profile(self._name, self._profiles, sizes)
        with self._backend.enqueueing:
            self._log.clear()
            try:
                handle = self._context(profile)
                produced, on_host = self._address(handle, inputs, outputs, reads, values)
                if not handle.execute_async_v3(self._backend.device.stream):
                    raise self._failed(profile, "")
            except RuntimeError as error:  # of TensorRT's bindings
                raise self._failed(profile, str(error)) from error
            # What TensorRT takes from the host it has read when it returns; what it gives there is sure after a wait.
            if on_host:
                self._backend.device.synchronize()
            for name, array in on_host.items():
                produced[name] = self._backend.upload(array)
        return produced

    def _address(
        self,
        handle: Any,
        inputs: Mapping[str, DeviceTensor],
        outputs: Mapping[str, DeviceTensor],
        reads: Mapping[str, int],
        values: Mapping[str, NDArray[Any]],
    ) -> tuple[dict[str, DeviceTensor], dict[str, NDArray[Any]]]:
        """Tell a context all shapes and addresses; the outputs as :meth:`_place_outputs` gives them."""
        for tensor in self._inputs:
            if tensor.is_dynamic and not handle.set_input_shape(tensor.name, inputs[tensor.name].shape):
                raise RuntimeError(f"'{tensor.name}' may not be {inputs[tensor.name].shape}")
        for name, address in reads.items():
            handle.set_tensor_address(name, address)
        for name, value in values.items():
            handle.set_tensor_address(name, value.ctypes.data)
        return self._place_outputs(handle, outputs)

    def _place_outputs(
        self, handle: Any, given: Mapping[str, DeviceTensor]
    ) -> tuple[dict[str, DeviceTensor], dict[str, NDArray[Any]]]:
        """Outputs on the device, where they were given a place or in new memory, and those on the host."""
        produced: dict[str, DeviceTensor] = {}
        on_host: dict[str, NDArray[Any]] = {}
        for tensor in self._outputs:
            shape = tuple(handle.get_tensor_shape(tensor.name))
            place = given.get(tensor.name)
            check_output_shape(self._name, tensor.name, shape, place)
            if tensor.on_host:
                on_host[tensor.name] = np.zeros(shape, tensor.dtype)
                handle.set_tensor_address(tensor.name, on_host[tensor.name].ctypes.data)
                continue
            produced[tensor.name] = self._backend.allocate(shape, tensor.dtype) if place is None else place
        on_device = [tensor for tensor in self._outputs if not tensor.on_host]
        for name, address in output_addresses(self._name, on_device, produced).items():
            handle.set_tensor_address(name, address)
        return produced, on_host

    def _value(self, tensor: DeviceTensor) -> NDArray[Any]:
        """A number on the host; it is known there already unless a graph computed it."""
        owner = tensor.owner
        if isinstance(owner, _Uploaded) and owner.value is not None:
            return owner.value
        return self._backend.download(tensor)

    def _context(self, profile: int) -> Any:
        """The execution context of a profile, with its scratch memory."""
        context = self._contexts.get(profile)
        if context is None:
            context = _Context(self._new_context(profile))
            context.handle.set_optimization_profile_async(profile, self._backend.device.stream)
            self._contexts[profile] = context
        arena = self._backend.arena.block()
        if context.arena is not arena:
            context.handle.set_device_memory(arena.address, arena.size)
            context.arena = arena
        return context.handle

    def _new_context(self, profile: int) -> Any:
        trt = self._library.module
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            handle = self._engine.create_execution_context(managed)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            # A cache that grows is a new shape at every token: kernels made for one would never be used again.
            grows = len(set(self._profiles[profile].ranges.get("past", (0, 0, 0)))) > 1
            strategies = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = (
                strategies.NONE if grows else strategies.LAZY
            )
            self._kernels.attach(config)
            handle = self._engine.create_execution_context(config)
        if handle is None:
            raise RuntimeError("no execution context")
        return handle

    def _failed(self, profile: int, reason: str) -> BackendError:
        reason = self._log.first or " ".join(reason.split()) or "no reason given"
        return BackendError(
            f"{self._library.name} {self._library.version} failed in {self._name}, profile "
            f"'{self._profiles[profile].name}' ({reason}): {_LESS if _OUT_OF_MEMORY.search(reason) else _AGAIN}"
        )


@dataclass
class _Context:
    """An execution context and the scratch memory that it was told of."""

    handle: Any
    arena: MemoryBlock | None = None
