"""KV caches of the segments: each segment has its own number of rows, because tokens are dropped between them."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from edgeprune import tensor_names as names
from edgeprune.runtimes.backend import ALIGNMENT, Backend, DeviceTensor, Graph

_Namer = Callable[[int], str]


class SegmentCache:
    """Keys and values of the layers of one segment.

    A graph reads the cached rows and writes all rows, the new ones included, so there are two buffers that swap roles:
    nothing is copied between steps. Both are allocated once, at the rows that entered the segment plus the tokens
    that may be generated.
    """

    def __init__(
        self,
        backend: Backend,
        layers: tuple[int, ...],
        *,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: np.dtype[Any],
    ) -> None:
        """Allocate.

        Args:
            backend: Where.
            layers: Layers whose attention the segment holds.
            num_kv_heads: Key/value heads.
            head_dim: D.
            capacity: Most rows.
            dtype: Of keys and values.
        """
        self.layers = layers
        self.length = 0
        self.capacity = capacity
        self._backend = backend
        self._heads, self._width, self._dtype = num_kv_heads, head_dim, dtype
        self._front = 0
        self._allocate()

    @property
    def nbytes(self) -> int:
        """Memory of both buffers."""
        return sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in self._buffers)

    def past(self) -> dict[str, DeviceTensor]:
        """The cached rows, as a segment's inputs."""
        return self._tensors(self._buffers[self._front], self.length, names.past_key, names.past_value)

    def present(self, num_new: int) -> dict[str, DeviceTensor]:
        """Where the segment writes all rows, as its outputs.

        Raises:
            ValueError: The rows do not fit; the caller checks the context before.
        """
        length = self.length + num_new
        if length > self.capacity:
            raise ValueError(f"{length} rows do not fit into a cache of {self.capacity}")
        return self._tensors(self._buffers[1 - self._front], length, names.present_key, names.present_value)

    def advance(self, num_new: int) -> None:
        """The segment has run: what it wrote is the cache now."""
        self.length += num_new
        self._front = 1 - self._front

    def compact(self, graph: Graph, rows: DeviceTensor) -> None:
        """Keep some of the rows only, in buffers that are smaller by the others.

        Args:
            graph: The bundle's graph "compact".
            rows: [K] int64, ascending.
        """
        kept = rows.shape[0]
        past = self.past()
        self.capacity -= self.length - kept
        self.length = kept
        self._allocate()
        target = self.past()
        for layer in self.layers:
            key, value = names.past_key(layer), names.past_value(layer)
            graph.run(
                {names.KEEP_INDICES: rows, names.CACHED_KEY: past[key], names.CACHED_VALUE: past[value]},
                {names.out(names.CACHED_KEY): target[key], names.out(names.CACHED_VALUE): target[value]},
            )

    def _allocate(self) -> None:
        """Both buffers; the tensors of a layer begin at aligned addresses."""
        step = ALIGNMENT // self._dtype.itemsize
        self._stride = -(-self._heads * self.capacity * self._width // step) * step
        size = 2 * len(self.layers) * self._stride
        self._buffers = [self._backend.allocate((size,), self._dtype) for _ in range(2)]
        self._front = 0

    def _tensors(
        self, buffer: DeviceTensor, length: int, key_name: _Namer, value_name: _Namer
    ) -> dict[str, DeviceTensor]:
        shape = (1, self._heads, length, self._width)
        tensors: dict[str, DeviceTensor] = {}
        for index, layer in enumerate(self.layers):
            tensors[key_name(layer)] = buffer.view(shape, 2 * index * self._stride)
            tensors[value_name(layer)] = buffer.view(shape, (2 * index + 1) * self._stride)
        return tensors
