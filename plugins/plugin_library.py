"""The library of TensorRT's plugins: finding it, checking it, giving it to a TensorRT.

``python -m edgeprune.plugins.build`` makes it where TensorRT's headers are. It lies in the package, in ``out/plugins``
of a checkout, or where the variable ``EDGEPRUNE_PLUGIN`` says.
"""

import ctypes
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeprune.errors import EngineError
from edgeprune.operators.schema import (
    PLUGIN_LIBRARY_VERSION,
    PLUGIN_MODES,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    SCORE_SELECT,
)
from edgeprune.plugins.shared_object import machine_of

LIBRARY, RTX_NAME_LIBRARY = "libedgeprune_tensorrt.so", "libedgeprune_rtx_name.so"
PATH_VARIABLE = "EDGEPRUNE_PLUGIN"
# What edgeprune_plugin_built_for of plugins/tensorrt/plugin_library.cpp returns.
_BUILT_FOR = re.compile(rb"edgeprune plugin (\d+); TensorRT (\d+)\.(\d+); CUDA (\d+); SM (\d+(?:,\d+)*)\0")
_RTX_LIBRARY = "libtensorrt_rtx.so"
# TensorRT for RTX has versions of its own; its plugin interface is that of this TensorRT, from the first on.
_RTX_INTERFACE, _RTX_SINCE = 11, (1, 7)
_JETSON_ARCHITECTURES = {72, 87, 101, 110}
_BUILD = "python -m edgeprune.plugins.build"


@dataclass(frozen=True)
class PluginLibrary:
    """A library of plugins that fits this edgeprune.

    Attributes:
        path: The file.
        machine: The architecture that it runs on, as ``platform.machine()`` names it.
        version: Its version.
        tensorrt: Major and minor version of TensorRT whose headers it was compiled with.
        cuda: Major version of the CUDA runtime in it; the driver must not be older.
        architectures: Compute capabilities of its kernels, without the dot.
    """

    path: Path
    machine: str
    version: int
    tensorrt: tuple[int, int]
    cuda: int
    architectures: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> "PluginLibrary":
        """Read what a library is; it is not loaded.

        Raises:
            EngineError: There is no such file, it is no plugin library, or one of another edgeprune.
        """
        if not path.is_file():
            raise EngineError(
                f"the plugin library {path} does not exist: build it with {_BUILD}, or correct {PATH_VARIABLE}"
            )
        machine = machine_of(path)
        if machine is None:
            raise EngineError(
                f"{path} is no whole library: build it again with {_BUILD}, or set {PATH_VARIABLE} to another"
            )
        built_for = _BUILT_FOR.search(path.read_bytes())
        if built_for is None:
            raise EngineError(
                f"{path} is no plugin library of edgeprune: build it with {_BUILD}, or set {PATH_VARIABLE} to another"
            )
        version, major, minor, cuda = (int(number) for number in built_for.groups()[:4])
        if version != PLUGIN_LIBRARY_VERSION:
            raise EngineError(
                f"{path} has plugin version {version}, this edgeprune needs {PLUGIN_LIBRARY_VERSION}: build it again "
                f"with {_BUILD}"
            )
        architectures = tuple(int(number) for number in built_for[5].split(b","))
        return cls(path, machine, version, (major, minor), cuda // 1000, architectures)

    def check_fits(self, module: ModuleType) -> None:
        """Refuse a TensorRT with another plugin interface.

        Raises:
            EngineError: The library was compiled for another machine or another major version.
        """
        if self.machine != platform.machine():
            raise EngineError(
                f"{self.path} is for {self.machine}, this machine is {platform.machine()}: build it here with {_BUILD}"
            )
        needed = _interface_of(module)
        if self.tensorrt[0] != needed:
            raise EngineError(
                f"{self.path} was compiled with the headers of TensorRT {self.tensorrt[0]}.{self.tensorrt[1]}, but "
                f"{module.__name__} {module.__version__} needs those of {needed}.x: build it with {_BUILD} "
                "--tensorrt-root DIR"
            )

    def check_has_kernels(self, sm: int) -> None:
        """Refuse a GPU that the library has no kernels for.

        Raises:
            EngineError: None of its architectures runs there.
        """
        if not any(_runs_on(number, sm) for number in self.architectures):
            listed = ", ".join(str(number) for number in self.architectures)
            raise EngineError(
                f"{self.path} has kernels for SM {listed}, not for SM {sm}: build it with {_BUILD} --architectures {sm}"
            )

    def register(self, module: ModuleType, registry: Any) -> None:
        """Give the plugins to a registry of a TensorRT module; where it has them, nothing happens.

        Raises:
            EngineError: The library does not fit this TensorRT, or it refuses the library.
        """
        self.check_fits(module)
        if module.__name__ == "tensorrt_rtx":
            _answer_name_of_rtx(self.path.parent)
        try:
            # TensorRT does not say why a library cannot be loaded.
            ctypes.CDLL(str(self.path))
        except OSError as error:
            reason = " ".join(str(error).split())
            raise EngineError(
                f"{self.path} cannot be loaded ({reason}): build it again with {_BUILD}"
            ) from error
        if not _has_creators(registry):
            registry.load_library(str(self.path))
        if not _has_creators(registry):
            raise EngineError(
                f"{module.__name__} {module.__version__} does not take the plugins of {self.path}: build it again with "
                f"{_BUILD} --tensorrt-root DIR and the headers of that version"
            )


def find(variables: Mapping[str, str] | None = None) -> Path | None:
    """Where the library is, if anywhere: the variable's path, in the package, in ``out/plugins`` of a checkout.

    The variable's path is returned whether it exists or not, so that a mistyped one is not passed over.
    """
    named = (os.environ if variables is None else variables).get(PATH_VARIABLE)
    if named:
        return Path(named)
    package = Path(__file__).resolve().parent
    for folder in (package, package.parent / "out" / "plugins"):
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    return None


def find_for(machine: str) -> Path | None:
    """The library that was compiled across for another machine, in ``out/plugins-<machine>`` of a checkout, if any."""
    path = Path(__file__).resolve().parent.parent / "out" / f"plugins-{machine}" / LIBRARY
    return path if path.is_file() else None


def found() -> PluginLibrary:
    """The library that :func:`find` names, opened.

    Raises:
        EngineError: There is none, or it is unusable.
    """
    path = find()
    if path is None:
        raise EngineError(
            f"there is no plugin library: build it with {_BUILD} where TensorRT's headers are, or set {PATH_VARIABLE}"
        )
    return PluginLibrary.open(path)


def load(module: ModuleType, path: Path | None = None, *, needed: str | None = None) -> PluginLibrary:
    """Give the plugins to a TensorRT, so that it reads engines that were built with them.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``; the registry of the whole process gets them.
        path: The library; where :func:`find` finds it by default.
        needed: The version that engines were built with, ``plugin_version`` in the manifest.

    Raises:
        EngineError: There is no library, it does not fit, or the engines need another version.
    """
    library = found() if path is None else PluginLibrary.open(path)
    if needed is not None and needed != str(library.version):
        raise EngineError(
            f"the engines were built with plugin version {needed}, {library.path} has {library.version}: build them "
            "again with edgeprune build"
        )
    library.register(module, module.get_plugin_registry())
    return library


def _runs_on(compiled: int, sm: int) -> bool:
    """Whether machine code for one compute capability runs on another."""
    # On later ones of the same major number, but never between a Jetson and a card.
    return compiled == sm or (
        compiled // 10 == sm // 10 and compiled < sm and not {compiled, sm} & _JETSON_ARCHITECTURES
    )


def _has_creators(registry: Any) -> bool:
    # Asked for one that it lacks, a registry logs an error; its list does not.
    have = {
        creator.name
        for creator in registry.all_creators
        if (creator.plugin_version, creator.plugin_namespace) == (PLUGIN_VERSION, PLUGIN_NAMESPACE)
    }
    return {*PLUGIN_MODES, SCORE_SELECT} <= have


def _interface_of(module: ModuleType) -> int:
    """The major version of TensorRT whose headers a plugin for this module is compiled with."""
    major, minor = (int(part) for part in str(module.__version__).split(".")[:2])
    if module.__name__ != "tensorrt_rtx":
        return major
    if (major, minor) < _RTX_SINCE:
        raise EngineError(
            f"TensorRT for RTX {module.__version__} takes no plugins of edgeprune: update it to 1.7, or build with "
            "--plugin off"
        )
    return _RTX_INTERFACE


def _answer_name_of_rtx(folder: Path) -> None:
    """Let TensorRT for RTX find itself: without this, its parser ends the process at the first plugin.

    It looks for its library under a name that its Python package does not have; ``plugins/cmake/tensorrt_plugin.cmake``
    makes one that answers.
    """
    try:
        ctypes.CDLL(_RTX_LIBRARY)
    except OSError:
        pass
    else:
        return
    try:
        ctypes.CDLL(str(folder / RTX_NAME_LIBRARY))
        ctypes.CDLL(_RTX_LIBRARY)
    except OSError as error:
        raise EngineError(
            f"TensorRT for RTX takes plugins only where the loader finds {_RTX_LIBRARY}: build the plugin again with "
            f"{_BUILD}, which puts {RTX_NAME_LIBRARY} beside it"
        ) from error
