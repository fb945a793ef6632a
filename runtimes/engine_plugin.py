"""Which graphs of a bundle are built with TensorRT's plugins of the operators, and which from their functions."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.manifest import GraphEntry, ProfileEntry
from edgeprune.operators.schema import PLUGIN_MAX_ROWS, PLUGIN_MODES, TOKEN_SELECT
from edgeprune.plugins.plugin_library import PATH_VARIABLE, PluginLibrary, find, found
from edgeprune.runtimes.onnx_operators import OperatorNode, operator_nodes
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary

PLUGIN_AUTO, PLUGIN_ON, PLUGIN_OFF = "auto", "on", "off"
PLUGIN_CHOICES = (PLUGIN_AUTO, PLUGIN_ON, PLUGIN_OFF)


@dataclass(frozen=True)
class EnginePlugin:
    """The library and the graphs that are built with it.

    Attributes:
        library: The library; None where every graph is built from its functions.
        nodes: The operators' nodes of the graphs that are built with it, by graph.
    """

    library: PluginLibrary | None
    nodes: Mapping[str, tuple[OperatorNode, ...]]

    @property
    def version(self) -> str | None:
        """What engines are keyed by; None without a graph that uses the plugins."""
        return str(self.library.version) if self.library is not None and self.nodes else None

    def version_of(self, graph: str) -> str | None:
        """The same for one graph."""
        return self.version if graph in self.nodes else None


def choose_plugin(
    choice: str,
    library: TensorRtLibrary,
    sm: int,
    bundle: Bundle,
    candidates: Sequence[Mapping[str, tuple[ProfileEntry, ...]]],
    warn: Callable[[str], None],
) -> EnginePlugin:
    """The plugins for the graphs of a bundle.

    With "auto" a library that is there but does not fit is passed over with a warning, unless the variable names it.

    Args:
        choice: "auto", "on" or "off".
        library: The TensorRT that builds.
        sm: Compute capability of the GPU.
        bundle: The bundle.
        candidates: Profiles of every graph, for each strategy.
        warn: Hears in one line why a library is passed over.

    Raises:
        EngineError: The plugins were asked for and there is no library that fits.
    """
    if choice == PLUGIN_OFF or (choice == PLUGIN_AUTO and find() is None):
        return EnginePlugin(None, {})
    try:
        plugins = found()
        plugins.check_fits(library.module)
        plugins.check_has_kernels(sm)
    except EngineError as error:
        if choice == PLUGIN_ON or os.environ.get(PATH_VARIABLE):
            raise
        warn(f"no plugins, the operators are built from their functions: {error}")
        return EnginePlugin(None, {})
    return EnginePlugin(plugins, plugin_nodes(bundle, candidates))


def plugin_nodes(
    bundle: Bundle, candidates: Sequence[Mapping[str, tuple[ProfileEntry, ...]]]
) -> dict[str, tuple[OperatorNode, ...]]:
    """The operators' nodes by graph, of the graphs whose operators all have kernels for their modes and sizes."""
    usable = {}
    for name, graph in bundle.manifest.graphs.items():
        nodes = operator_nodes(bundle.file(graph.file).read_bytes())
        rows = max(
            (_most_rows(graph, entry) for by_graph in candidates for entry in by_graph[name]), default=0
        )
        if nodes and all(_has_kernel(node, rows) for node in nodes):
            usable[name] = nodes
    return usable


def _has_kernel(node: OperatorNode, rows: int) -> bool:
    modes = PLUGIN_MODES.get(node.operator)
    if modes is None or (modes and node.mode not in modes):
        return False
    return node.operator != TOKEN_SELECT or rows <= PLUGIN_MAX_ROWS


def _most_rows(graph: GraphEntry, profile: ProfileEntry) -> int:
    """The longest sequence that a profile lets through."""
    dims = [dim for tensor in graph.inputs if tensor.name == names.VISUAL_SLOTS for dim in tensor.shape]
    return max((profile.ranges[dim][2] if isinstance(dim, str) else dim for dim in dims), default=0)
