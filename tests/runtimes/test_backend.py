"""Opening the graphs of a bundle."""

import threading
from types import SimpleNamespace

import pytest

from edgeprune.errors import BackendError
from edgeprune.runtimes.backend import open_graphs
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend


class Loader:
    """Loads a graph when so many others are being loaded at the same time; its graphs are their names."""

    def __init__(self, loads_at_once: int) -> None:
        self.loads_at_once = loads_at_once
        self._all_here = threading.Barrier(loads_at_once, timeout=30)

    def load(self, _bundle, name):
        if name == "broken":
            raise BackendError("broken cannot be opened")
        self._all_here.wait()
        return name


def bundle_of(*names):
    return SimpleNamespace(manifest=SimpleNamespace(graphs=dict.fromkeys(names)))


@pytest.mark.parametrize("loads_at_once", [1, 2])
def test_as_many_graphs_are_opened_at_once_as_the_backend_can(loads_at_once):
    names = ("vision", "embed", "segment0", "segment1")
    opened = open_graphs(bundle_of(*names), Loader(loads_at_once))
    assert opened == dict(zip(names, names, strict=True))
    assert tuple(opened) == names


def test_what_a_graph_says_when_it_cannot_be_opened_is_what_is_said():
    with pytest.raises(BackendError, match=r"^broken cannot be opened$"):
        open_graphs(bundle_of("vision", "broken"), Loader(1))


def test_onnx_runtime_opens_as_many_as_it_has_threads():
    assert OnnxRuntimeBackend("cpu", 3).loads_at_once == 3
    assert OnnxRuntimeBackend("cpu").loads_at_once >= 1
