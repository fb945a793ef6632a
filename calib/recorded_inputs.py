"""What graphs were given while the unquantized bundle answered the calibration samples, kept on disk."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle
from edgeprune.runtimes.backend import Backend, DeviceTensor, Graph


class RecordedInputs:
    """The inputs of one graph's runs.

    Args:
        folder: Where they lie, one file per run.
        graph: The graph's name.
    """

    def __init__(self, folder: Path, graph: str) -> None:
        self._folder = folder
        self._graph = graph
        self._runs = 0

    def __len__(self) -> int:
        return self._runs

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        for run in range(self._runs):
            with np.load(self._file(run), allow_pickle=False) as arrays:
                yield {name: arrays[name] for name in arrays.files}

    def add(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Keep the inputs of a run."""
        arrays: dict[str, Any] = dict(inputs)
        np.savez(self._file(self._runs), **arrays)
        self._runs += 1

    def _file(self, run: int) -> Path:
        return self._folder / f"{self._graph}-{run}.npz"


class RecordingBackend:
    """A backend whose graphs keep what they are given.

    Args:
        backend: What runs them.
        recorded: Where the inputs go, by graph; other graphs keep nothing.
    """

    def __init__(self, backend: Backend, recorded: Mapping[str, RecordedInputs]) -> None:
        self.name = backend.name
        self._backend = backend
        self._recorded = recorded

    def load(self, bundle: Bundle, name: str) -> Graph:
        """See :class:`edgeprune.runtimes.backend.Backend`."""
        graph, inputs = self._backend.load(bundle, name), self._recorded.get(name)
        return graph if inputs is None else _RecordingGraph(graph, self._backend, inputs)

    def longest_sequence(self, bundle: Bundle) -> int | None:
        """See :class:`edgeprune.runtimes.backend.Backend`."""
        return self._backend.longest_sequence(bundle)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """See :class:`edgeprune.runtimes.backend.Backend`."""
        return self._backend.allocate(shape, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """See :class:`edgeprune.runtimes.backend.Backend`."""
        return self._backend.upload(array)

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """See :class:`edgeprune.runtimes.backend.Backend`."""
        return self._backend.download(tensor)


class _RecordingGraph:
    """A graph that keeps what it is given."""

    def __init__(self, graph: Graph, backend: Backend, inputs: RecordedInputs) -> None:
        self._graph = graph
        self._backend = backend
        self._inputs = inputs

    def run(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        """See :class:`edgeprune.runtimes.backend.Graph`."""
        self._inputs.add({name: self._backend.download(tensor) for name, tensor in inputs.items()})
        return self._graph.run(inputs, outputs)
