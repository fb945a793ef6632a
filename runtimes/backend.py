"""What a runtime backend offers: graphs that run on tensors of one device."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle

# TensorRT takes no tensor that begins elsewhere (IExecutionContext::setTensorAddress).
ALIGNMENT = 256


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor in a device's memory.

    Attributes:
        address: Of its first element.
        shape: Sizes.
        dtype: Type of the elements.
        owner: Keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.shape):
            raise ValueError(f"negative size in {self.shape}")

    def view(self, shape: tuple[int, ...], offset: int = 0) -> "DeviceTensor":
        """A tensor of ``shape`` in the same memory, ``offset`` elements behind the start.

        Raises:
            ValueError: It would reach beyond the end.
        """
        if offset < 0 or offset + prod(shape) > prod(self.shape):
            raise ValueError(f"a view of {shape} at {offset} does not fit into {self.shape}")
        return DeviceTensor(self.address + offset * self.dtype.itemsize, shape, self.dtype, self.owner)


class Graph(Protocol):
    """An opened graph."""

    def run(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        """Run once.

        Args:
            inputs: Every input by name.
            outputs: Where to write; outputs that are not named are allocated.

        Returns:
            All outputs by name.
        """


class Backend(Protocol):
    """A way of running graphs on one device.

    Attributes:
        name: Of the runtime and its device.
        asynchronous: Whether a graph's ``run`` may return before the device is done.
        loads_at_once: How many threads may ``load`` at the same time, to the good of the machine.
    """

    name: str
    asynchronous: bool
    loads_at_once: int

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Open a graph of a bundle: its ONNX file, or what was built from it.

        Raises:
            BackendError: The backend cannot run it.
        """

    def longest_sequence(self, bundle: Bundle) -> int | None:
        """Most rows of a prompt with its answer that the graphs take; None where the model alone limits them."""

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """Uninitialised memory on the device, aligned to ``ALIGNMENT`` bytes where the backend needs that."""

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """A copy of a host array on the device; on a host backend the array itself."""

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """A host array with the content of a whole tensor; waits for the device."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told; only measurements need it."""


def open_graphs(bundle: Bundle, backend: Backend) -> dict[str, Graph]:
    """Open all graphs of a bundle, by name, as many at once as the backend can.

    Raises:
        BackendError: The backend cannot run one of them.
    """
    names = tuple(bundle.manifest.graphs)
    if backend.loads_at_once == 1:  # on this thread: a device's context may be current on no other
        return {name: backend.load(bundle, name) for name in names}
    with ThreadPoolExecutor(backend.loads_at_once) as pool:
        return dict(zip(names, pool.map(partial(backend.load, bundle), names), strict=True))
