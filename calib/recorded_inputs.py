"""What graphs were given while the unquantized bundle answered the calibration samples, kept on disk."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle
from edgeprune.runtimes.backend import Backend, DeviceTensor, Graph
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend


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


class RecordingBackend(OnnxRuntimeBackend):
    """ONNX Runtime on the CPU, whose graphs keep what they are given.

    Args:
        recorded: Where the inputs go, by graph; other graphs keep nothing.
        threads: Threads of an operator; None lets ONNX Runtime choose.
    """

    def __init__(self, recorded: Mapping[str, RecordedInputs], threads: int | None) -> None:
        super().__init__("cpu", threads)
        self._recorded = recorded

    def load(self, bundle: Bundle, name: str) -> Graph:
        """See :class:`edgeprune.runtimes.backend.Backend`."""
        graph, inputs = super().load(bundle, name), self._recorded.get(name)
        return graph if inputs is None else _RecordingGraph(graph, self, inputs)


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
