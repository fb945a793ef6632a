"""The first NVIDIA GPU: memory, one stream, and copies between it and the host; thin over cuda-bindings."""

import ctypes
import threading
import weakref
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BackendError
from edgeprune.extras import require
from edgeprune.runtimes.device_arena import MemoryBlock, MemoryPool
from edgeprune.runtimes.upload_staging import UploadStaging

# Page-locked memory for uploads: a picture of 336 × 336 pixels and the index tensors of several prompts.
_UPLOAD_BYTES = 4 << 20
# What a download begins with: more than one integer and less than a vocabulary; it grows to what is read.
_READ_BYTES = 1 << 16
# cudaError_t of driver_types.h
_OUT_OF_MEMORY, _INSUFFICIENT_DRIVER, _NO_DEVICE = 2, 35, 100


class CudaDevice:
    """Memory and a stream of the first GPU.

    Everything runs on one stream: memory that is given back may be taken again at once, because whatever uses it next
    comes later on the stream.
    """

    def __init__(self) -> None:
        """Open the GPU.

        Raises:
            BackendError: There is no GPU, or its driver is too old.
            MissingExtraError: cuda-bindings is not installed.
        """
        self._cuda: Any = require(
            "cuda.bindings.runtime", extra="tensorrt", purpose="to run TensorRT engines"
        )
        self._kinds = self._cuda.cudaMemcpyKind
        handle = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(handle)
        self.memory = MemoryPool(partial(_malloc, self._cuda), self._cuda.cudaFree)
        self._read_buffer: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._reading = threading.Lock()
        self._upload_buffer = self._page_locked(_UPLOAD_BYTES)
        self._staging = UploadStaging(_UPLOAD_BYTES)
        # Again by the thread that has it, because an upload may have to wait for the stream.
        self._uploading = threading.RLock()
        weakref.finalize(self, self._cuda.cudaStreamDestroy, handle)

    def upload(self, array: NDArray[Any]) -> MemoryBlock:
        """A copy of a contiguous host array; the array may change when this returns.

        The copy goes through page-locked memory: from other memory CUDA may wait for the stream, and does not say when
        it has read it. What is larger than that memory, as a prompt's many tiles, is waited for.
        """
        block = self.memory.allocate(array.nbytes)
        if not array.nbytes:
            return block
        to_device = self._kinds.cudaMemcpyHostToDevice
        if array.nbytes > self._staging.size:
            self._copy(block.address, array.ctypes.data, array.nbytes, to_device)
            self.synchronize()
            return block
        with self._uploading:
            offset = self._staging.place(array.nbytes)
            if offset is None:
                self.synchronize()
                offset = self._staging.place(array.nbytes)
                assert offset is not None
            staged = self._upload_buffer[offset : offset + array.nbytes]
            staged[:] = array.reshape(-1).view(np.uint8)
            self._copy(block.address, staged.ctypes.data, array.nbytes, to_device)
        return block

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A host array with what is at an address when the stream has come here; waits for it.

        The copy goes through page-locked memory, so it does not hold up what other threads put on the stream.
        """
        size = prod(shape) * dtype.itemsize
        with self._reading:
            if self._read_buffer.nbytes < size:
                self._read_buffer = self._page_locked(max(size, _READ_BYTES))
            if size:
                self._copy(self._read_buffer.ctypes.data, address, size, self._kinds.cudaMemcpyDeviceToHost)
            self.synchronize()
            read: NDArray[Any] = self._read_buffer[:size].copy().view(dtype).reshape(shape)
            return read

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        with self._uploading:
            mark = self._staging.mark()
        self._call("cudaStreamSynchronize", self.stream)
        with self._uploading:
            self._staging.release(mark)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def _page_locked(self, size: int) -> NDArray[np.uint8]:
        address = int(self._call("cudaMallocHost", size))
        memory = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address)
        array: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
        return array

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cuda, name)(*arguments)
        _check(self._cuda, status)
        return values[0] if values else None


def _malloc(cuda: Any, size: int) -> int | None:
    status, address = cuda.cudaMalloc(size)
    if int(status) == _OUT_OF_MEMORY:
        # The failure stays with the thread until somebody asks for it.
        cuda.cudaGetLastError()
        return None
    _check(cuda, status)
    return int(address)


def _check(cuda: Any, status: Any) -> None:
    if not int(status):
        return
    text = cuda.cudaGetErrorString(status)[1].decode()
    if int(status) in (_INSUFFICIENT_DRIVER, _NO_DEVICE):
        raise BackendError(
            f"CUDA cannot use a GPU here ({text}): update the NVIDIA driver, or install the cuda-bindings of its CUDA "
            "version (pip install 'cuda-bindings==12.6.*' on JetPack 6), or run with --backend onnxruntime"
        )
    raise BackendError(
        f"CUDA failed ({text}): what ran before on the GPU may have caused it; open the bundle again, and if it fails "
        "again build its engines again"
    )
