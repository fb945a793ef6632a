"""The plugins of the operators in a kit: sources, a library where one was compiled across, graphs without functions.

The device compiles the plugins itself, because their CUDA runtime and headers must be those of its JetPack. A library
that was compiled elsewhere is carried along and taken where the device has its TensorRT and its CUDA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import edgeprune.plugins
from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.manifest import ProfileEntry
from edgeprune.plugins.plugin_library import LIBRARY, PluginLibrary, find_for
from edgeprune.runtimes.engine_plugin import PLUGIN_OFF, PLUGIN_ON, plugin_nodes
from edgeprune.runtimes.onnx_operators import without_functions
from edgeprune.runtimes.score_select import fuse_score_select
from edgeprune.targets import Target

PLUGIN_FOLDER, PLUGIN_SUFFIX = "plugins", ".plugin.onnx"
_SOURCES = ("*.cu", "*.cuh", "*.cpp", "*.h", "*.hpp", "CMakeLists.txt", "*.cmake")


@dataclass(frozen=True)
class KitPlugin:
    """What a kit needs of the plugins.

    Attributes:
        target: The device.
        graphs: Graphs that are built with the plugins.
        required: Whether a device that cannot compile them is an error.
        carried: The library for the device that comes along; None without one.
    """

    target: Target
    graphs: tuple[str, ...]
    required: bool
    carried: PluginLibrary | None

    def carried_path(self) -> str:
        """Where the carried library lies in the kit."""
        return f"{PLUGIN_FOLDER}/{self.target.architecture}/{LIBRARY}"

    def script(self) -> list[str]:
        """Lines that set ``PLUGIN`` to a library or to "off"."""
        if not self.graphs:
            return ["PLUGIN=off"]
        lines = ['PLUGIN=${EDGEPRUNE_PLUGIN:-}  # a library of edgeprune\'s plugins, or "off"']
        if self.carried is not None:
            major, cuda = self.carried.tensorrt[0], self.carried.cuda
            lines += [
                f'if [ -z "$PLUGIN" ] && ldconfig -p 2> /dev/null | grep -q "libnvinfer.so.{major} " \\',
                f'    && ldconfig -p 2> /dev/null | grep -q "libcudart.so.{cuda} "; then',
                f"    PLUGIN={self.carried_path()}",
                "fi",
            ]
        failed = (
            ["    exit 1"]
            if self.required
            else ['    echo "the operators are built from standard operators instead" >&2', "    PLUGIN=off"]
        )
        options = (
            f"-DEDGEPRUNE_KERNELS=ON -DEDGEPRUNE_TENSORRT=ON -DEDGEPRUNE_CUDA_ARCHITECTURES={self.target.sm}"
        )
        return [
            *lines,
            'if [ -n "$PLUGIN" ]; then',
            "    :",
            f"elif {{ cmake -S {PLUGIN_FOLDER} -B {PLUGIN_FOLDER}/out {options} \\",
            f"    && cmake --build {PLUGIN_FOLDER}/out; }} > plugin.log 2>&1; then",
            f"    PLUGIN={PLUGIN_FOLDER}/out/{LIBRARY}",
            "else",
            '    echo "the plugins were not compiled, see plugin.log: cmake, nvcc and TensorRT headers are needed" >&2',
            *failed,
            "fi",
            'if [ "$PLUGIN" != off ]; then',
            '    if [ ! -f "$PLUGIN" ]; then',
            '        echo "there is no plugin library $PLUGIN: correct EDGEPRUNE_PLUGIN, or set it to off" >&2',
            "        exit 1",
            "    fi",
            '    PLUGIN=$(realpath "$PLUGIN")  # the loader looks for a bare name elsewhere',
            "fi",
        ]

    def readme(self) -> str:
        """What the device's README says of the plugins."""
        if not self.graphs:
            return "The operators are built from standard operators: no plugin is needed."
        carried = (
            ""
            if self.carried is None
            else f" A library compiled for TensorRT {'.'.join(map(str, self.carried.tensorrt))} and CUDA "
            f"{self.carried.cuda} comes along and is taken where the device has both."
        )
        missing = "ends the script" if self.required else "leaves the standard operators"
        return (
            f"{', '.join(self.graphs)} run edgeprune's plugins. The script compiles them from `{PLUGIN_FOLDER}/` with "
            f"the device's cmake, nvcc and TensorRT headers; a device without them {missing}.{carried} Whoever runs "
            "these engines loads the same library first. `EDGEPRUNE_PLUGIN=FILE` takes another, `EDGEPRUNE_PLUGIN=off` "
            "none."
        )


def plan_plugin(
    choice: str, target: Target, bundle: Bundle, by_graph: Mapping[str, tuple[ProfileEntry, ...]]
) -> KitPlugin:
    """The plugins of a kit.

    Args:
        choice: "auto", "on" or "off".
        target: The device.
        bundle: The bundle.
        by_graph: Profiles of every graph.

    Raises:
        EngineError: The library for the device that is there is unusable.
    """
    if choice == PLUGIN_OFF:
        return KitPlugin(target, (), required=False, carried=None)
    path = find_for(target.architecture)
    carried = None if path is None else _checked(PluginLibrary.open(path), target)
    graphs = tuple(plugin_nodes(bundle, [by_graph]))
    return KitPlugin(target, graphs, required=choice == PLUGIN_ON, carried=carried)


def plugin_files(plugin: KitPlugin, bundle: Bundle) -> dict[str, bytes]:
    """What the kit carries beside the bundle, by its path there; a graph for the plugins lies beside its weights."""
    files = {f"{PLUGIN_FOLDER}/{path}": content for path, content in plugin_sources().items()}
    if plugin.carried is not None:
        files[plugin.carried_path()] = plugin.carried.path.read_bytes()
    for name in plugin.graphs:
        onnx = bundle.file(bundle.manifest.graphs[name].file)
        files[f"bundle/{name}{PLUGIN_SUFFIX}"] = without_functions(fuse_score_select(onnx.read_bytes()))
    return files


def plugin_sources() -> dict[str, bytes]:
    """What a device compiles the plugins from, by its path."""
    files = {}
    for place in edgeprune.plugins.__path__:
        root = Path(place).resolve()
        for pattern in _SOURCES:
            for path in sorted(root.rglob(pattern)):
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    return files


def _checked(library: PluginLibrary, target: Target) -> PluginLibrary:
    library.check_has_kernels(target.sm)
    if library.machine != target.architecture:
        raise EngineError(
            f"{library.path} is for {library.machine}, {target.title} needs {target.architecture}: build it with "
            f"python -m edgeprune.plugins.build --machine {target.architecture}"
        )
    return library
