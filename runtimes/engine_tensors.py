"""The tensors of an engine, and the addresses that they get for a run: a table that is checked before TensorRT sees it.

TensorRT reads and writes wherever it is told to; a wrong type, size or address shows as a wrong answer or not at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from edgeprune.errors import BackendError
from edgeprune.runtimes.backend import ALIGNMENT, DeviceTensor


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        name: Its name.
        dtype: Type of its elements.
        shape: Sizes, -1 where they depend on the profile's.
        on_host: Whether TensorRT reads or writes it in host memory: it is a size to it, not data.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    on_host: bool

    @property
    def is_dynamic(self) -> bool:
        """Whether the shape must be said before a run."""
        return -1 in self.shape


def engine_tensors(trt: Any, engine: Any) -> tuple[tuple[EngineTensor, ...], tuple[EngineTensor, ...]]:
    """Inputs and outputs of a deserialized engine."""
    dtypes: dict[Any, np.dtype[Any]] = {
        trt.DataType.FLOAT: np.dtype(np.float32),
        trt.DataType.HALF: np.dtype(np.float16),
        trt.DataType.INT64: np.dtype(np.int64),
        trt.DataType.INT32: np.dtype(np.int32),
        trt.DataType.BOOL: np.dtype(np.bool_),
    }
    inputs: list[EngineTensor] = []
    outputs: list[EngineTensor] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        tensor = EngineTensor(
            name,
            dtypes[engine.get_tensor_dtype(name)],
            tuple(engine.get_tensor_shape(name)),
            engine.get_tensor_location(name) == trt.TensorLocation.HOST,
        )
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(tensor)
    return tuple(inputs), tuple(outputs)


def input_addresses(
    graph: str, tensors: Sequence[EngineTensor], given: Mapping[str, DeviceTensor]
) -> dict[str, int]:
    """Where the engine reads its inputs on the device.

    Args:
        graph: Its name, for messages.
        tensors: Its inputs; those on the host are left out.
        given: What the chain has; inputs that the engine does not read are ignored.

    Raises:
        BackendError: An input is missing or is none that the engine takes.
    """
    addresses: dict[str, int] = {}
    for tensor in tensors:
        value = given.get(tensor.name)
        if value is None:
            raise _other_engine(graph, f"the engine reads '{tensor.name}', which the bundle's graph does not")
        _check(graph, tensor, value)
        if not tensor.on_host:
            addresses[tensor.name] = value.address
    return addresses


def output_addresses(
    graph: str, tensors: Sequence[EngineTensor], places: Mapping[str, DeviceTensor]
) -> dict[str, int]:
    """Where the engine writes its outputs on the device; arguments as :func:`input_addresses`."""
    return input_addresses(graph, tensors, places)


def check_output_shape(graph: str, name: str, shape: Sequence[int], place: DeviceTensor | None) -> None:
    """Refuse a shape that TensorRT does not know before it runs, or that does not fit where it is to be written.

    Raises:
        BackendError: It is one of these.
    """
    if any(size < 0 for size in shape):
        raise _other_engine(graph, f"the size of '{name}' depends on data ({tuple(shape)})")
    if place is not None and prod(place.shape) != prod(shape):
        raise _other_engine(graph, f"'{name}' has the shape {tuple(shape)}, expected was {place.shape}")


def _check(graph: str, tensor: EngineTensor, value: DeviceTensor) -> None:
    if value.dtype != tensor.dtype:
        raise _other_engine(graph, f"'{tensor.name}' is {tensor.dtype} to the engine and {value.dtype} here")
    fits = len(value.shape) == len(tensor.shape) and all(
        own in (-1, size) for own, size in zip(tensor.shape, value.shape, strict=True)
    )
    if not fits:
        raise _other_engine(graph, f"'{tensor.name}' is {tensor.shape} to the engine and {value.shape} here")
    if not value.address or value.address % ALIGNMENT:
        raise ValueError(f"{graph}: '{tensor.name}' is at {value.address:#x}, which TensorRT does not take")


def _other_engine(graph: str, difference: str) -> BackendError:
    return BackendError(
        f"{graph}: {difference}: build the engines again with edgeprune build BUNDLE --target this"
    )
