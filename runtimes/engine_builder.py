"""ONNX graph → serialized TensorRT engine."""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeprune import tensor_names as names
from edgeprune.errors import EngineError
from edgeprune.manifest import GraphEntry, ProfileEntry
from edgeprune.plugins.plugin_library import PluginLibrary
from edgeprune.runtimes.onnx_operators import operator_nodes, without_functions
from edgeprune.runtimes.score_select import fuse_score_select
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary, new_log
from edgeprune.runtimes.timing_cache import TimingCache

# Inputs whose value, not only whose shape, TensorRT has to know before it runs a graph.
_VALUE_INPUTS = (names.NUM_KEEP,)
_POLL_SECONDS = 0.1
_OUT_OF_MEMORY = re.compile("out of memory|bad_alloc|OutOfMemory", re.IGNORECASE)
_MEMORY_REMEDY = "; close other programs, add swap, or take --profiles one or a lower --max-sequence"


class BuildProgress(Protocol):
    """Hears what a build does; the command line draws a bar per graph from it."""

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """``done`` of ``steps`` steps of a graph are over; ``step`` is the next or, at the end, the result."""

    def warning(self, line: str) -> None:
        """Something is not as it should be, and the build goes on."""


@dataclass(frozen=True)
class BuiltTensor:
    """An input or output of the network that TensorRT parsed.

    Attributes:
        name: Its name.
        dtype: As the manifest writes it.
        shape: Sizes, -1 where dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BuiltEngine:
    """What building gives.

    Attributes:
        data: The serialized engine; anything with the buffer protocol.
        inputs: Its inputs.
        outputs: Its outputs.
        profiles: For each optimization profile, the least, tuned-for and greatest shape by input, of a shape input its
            values, as TensorRT has taken them.
        plugin_layers: Names of the layers that are plugins.
    """

    data: Any
    inputs: tuple[BuiltTensor, ...]
    outputs: tuple[BuiltTensor, ...]
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]
    plugin_layers: tuple[str, ...]


def build_engine(
    library: TensorRtLibrary,
    path: Path,
    graph: GraphEntry,
    profiles: Sequence[ProfileEntry],
    *,
    sm: int,
    workspace: int | None = None,
    plugin: PluginLibrary | None = None,
    timings: TimingCache | None = None,
    step: Callable[[str, int, int], None] = lambda _step, _done, _steps: None,
) -> BuiltEngine:
    """Build the engine of one graph, strongly typed, with one optimization profile per entry.

    Args:
        library: The TensorRT to build with.
        path: The ONNX file; its weights lie beside it.
        graph: Its entry in the manifest.
        profiles: The profiles; they name every dynamic dimension of the graph.
        sm: Compute capability of the GPU.
        workspace: Most bytes of scratch memory that a layer may use; None = TensorRT's own choice.
        plugin: The plugins that every operator of the graph must become; None = the operators' functions.
        timings: What is known and kept of the time that kernels take.
        step: Hears of every step of TensorRT's; where it raises, the build is cancelled.

    Raises:
        EngineError: TensorRT refuses the graph, a profile or the plugins, or memory does not suffice.
    """
    trt = library.module
    log = new_log(trt)
    builder = trt.Builder(log)
    if plugin is not None:
        # The builder's own registry: no other build of the process gets them.
        plugin.register(trt, builder.get_plugin_registry())
    network = builder.create_network(library.network_flags())
    parser = trt.OnnxParser(network, log)
    operators = 0
    if plugin is None:
        parsed = parser.parse_from_file(str(path))
    else:
        model = fuse_score_select(path.read_bytes())
        if library.takes_functions_first:
            model = without_functions(model)
        operators = len(operator_nodes(model))
        parsed = parser.parse(model, str(path))
    if not parsed:
        raise EngineError(_parser_message(parser, path, library))
    plugin_layers = _plugin_layers(trt, network)
    if plugin is None and plugin_layers:
        raise EngineError(
            "the plugins are registered for the whole process, which takes them without being asked: build in another"
        )
    if len(plugin_layers) != operators:
        raise EngineError(
            f"{library.name} {library.version} makes {len(plugin_layers)} plugins of {operators} operators in "
            f"{path.name}: build with --plugin off"
        )
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if library.is_rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.compute_capability(sm), 0)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    taken = []
    for profile in profiles:
        made, shapes = _profile(builder, graph, inputs, profile)
        config.add_optimization_profile(made)
        taken.append(shapes)
    measured = None if timings is None else timings.attach(config)
    try:
        data = _serialize(trt, builder, network, config, step)
    except MemoryError:
        data, log.last = None, "out of memory"
    if data is None:
        raise EngineError(
            f"{library.name} {library.version} builds no engine of {path.name}: {log.last or 'no reason given'}"
            f"{_MEMORY_REMEDY if _OUT_OF_MEMORY.search(log.last) else ''}"
        )
    if timings is not None:
        timings.keep(measured)
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return BuiltEngine(
        data,
        tuple(_described(trt, tensor) for tensor in inputs),
        tuple(_described(trt, tensor) for tensor in outputs),
        tuple(taken),
        plugin_layers,
    )


def input_range(
    shape: Sequence[int | str], ranges: Mapping[str, Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, tuned-for and greatest shape of an input.

    Raises:
        EngineError: A dimension has no range.
    """
    missing = [dim for dim in shape if isinstance(dim, str) and dim not in ranges]
    if missing:
        raise EngineError(f"the dimension '{missing[0]}' has no range in the profile: update edgeprune")
    least, tuned, greatest = (
        tuple(ranges[dim][index] if isinstance(dim, str) else dim for dim in shape) for index in range(3)
    )
    return least, tuned, greatest


def _profile(
    builder: Any, graph: GraphEntry, inputs: Sequence[Any], profile: ProfileEntry
) -> tuple[Any, dict[str, tuple[tuple[int, ...], ...]]]:
    """TensorRT's profile, and what it then says that it holds."""
    entries = {entry.name: entry for entry in graph.inputs}
    made = builder.create_optimization_profile()
    taken: dict[str, tuple[tuple[int, ...], ...]] = {}
    for tensor in inputs:
        entry = entries.get(tensor.name)
        if entry is None:
            raise EngineError(
                f"the ONNX file has an input '{tensor.name}' that the manifest lacks: export again"
            )
        if tensor.is_shape_tensor:
            if tensor.name not in _VALUE_INPUTS or tensor.name not in profile.ranges:
                raise EngineError(
                    f"TensorRT makes a shape of the values of '{tensor.name}': update edgeprune"
                )
            made.set_shape_input(tensor.name, *([size] for size in profile.ranges[tensor.name]))
            taken[tensor.name] = tuple(tuple(values) for values in made.get_shape_input(tensor.name))
        elif any(isinstance(dim, str) for dim in entry.shape):
            made.set_shape(tensor.name, *input_range(entry.shape, profile.ranges))
            taken[tensor.name] = tuple(tuple(shape) for shape in made.get_shape(tensor.name))
    return made, taken


def _plugin_layers(trt: Any, network: Any) -> tuple[str, ...]:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return tuple(layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let TensorRT take Attention apart where it has no kernel for its type, head width or lengths.

    It still fuses where it has one; without this the build fails, for float32 and for some head widths.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            # The binding returns the base class.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _serialize(
    trt: Any, builder: Any, network: Any, config: Any, step: Callable[[str, int, int], None]
) -> Any:
    """Build in a thread of its own, so that Ctrl-C reaches Python while TensorRT works."""
    monitor = None
    if hasattr(trt, "IProgressMonitor"):
        monitor = _monitor(trt)
        config.progress_monitor = monitor
    result: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except Exception as error:  # noqa: BLE001 - it is raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name="TensorRT build")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            done, steps = (0, 1) if monitor is None else monitor.position()
            step("build", done, steps)
    except BaseException:
        # TensorRT asks at its next step whether to go on; its objects must outlive the thread.
        if monitor is not None:
            monitor.cancelled = True
        thread.join()
        raise
    if failure:
        raise failure[0]
    return result[0]


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the module is known at run time only
        """Follows the outermost phase."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._outermost = ""
            self._position = (0, 1)

        def position(self) -> tuple[int, int]:
            return self._position

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._outermost, self._position = phase_name, (0, max(1, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self._outermost:
                self._position = (min(step + 1, self._position[1]), self._position[1])
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self._outermost:
                self._position = (self._position[1], self._position[1])

    return Monitor()


def _parser_message(parser: Any, path: Path, library: TensorRtLibrary) -> str:
    if not parser.num_errors:
        return (
            f"{library.name} {library.version} cannot read {path.name}: copy the bundle again or export again"
        )
    error = parser.get_error(0)
    place = f"{error.node_operator()} '{error.node_name()}'" if error.node_operator() else "the model"
    reason = " ".join(error.desc().split())
    return f"{library.name} {library.version} refuses {path.name} at {place}: {reason}"


def _described(trt: Any, tensor: Any) -> BuiltTensor:
    kinds = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.INT64: "int64",
        trt.DataType.INT32: "int32",
        trt.DataType.BOOL: "bool",
    }
    return BuiltTensor(tensor.name, kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
