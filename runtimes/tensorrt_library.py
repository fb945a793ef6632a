"""The TensorRT that is installed here: ``tensorrt`` (10.3 … 11) or TensorRT for RTX, through one set of calls."""

import importlib
import platform
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from edgeprune.errors import EngineError
from edgeprune.targets import Target

# TensorRT reads ONNX's Attention, RotaryEmbedding and RMSNormalization, which opset 23 has, from here on.
FUSED_OPSET, FUSED_TENSORRT = 23, (10, 15)
# From here on a registered plugin goes before a function of the model.
PLUGINS_FIRST = (10, 7)
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
_KIT = "edgeprune build … --kit DIR writes what to carry to a machine that can"


@dataclass(frozen=True)
class TensorRtLibrary:
    """An imported TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        version: Its version.
        module: The module.
    """

    name: str
    version: str
    module: ModuleType

    @property
    def is_rtx(self) -> bool:
        """Whether it builds for GPUs that this machine lacks."""
        return self.name == TENSORRT_RTX

    def network_flags(self) -> int:
        """Strongly typed: a flag up to TensorRT 10, the only kind from 11 on."""
        flags = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def check_opset(self, opset: int) -> None:
        """Refuse graphs that this TensorRT does not read.

        Raises:
            EngineError: The opset is too new; the message says which export helps.
        """
        if not self.is_rtx and opset >= FUSED_OPSET and _version(self.version) < FUSED_TENSORRT:
            raise EngineError(
                f"the bundle has opset {opset}, which TensorRT reads from 10.15 on, and {self.version} is installed: "
                "export with --opset 20"
            )

    @property
    def takes_functions_first(self) -> bool:
        """Whether its parser expands a function of the model even where a plugin of the name is registered."""
        return not self.is_rtx and _version(self.version) < PLUGINS_FIRST

    def compute_capability(self, sm: int) -> Any:
        """TensorRT for RTX's name of a GPU."""
        return getattr(self.module.ComputeCapability, f"SM{sm}")


def library_for(target: Target) -> TensorRtLibrary:
    """The TensorRT that can build for a target on this machine.

    TensorRT for RTX builds without a GPU, for the GPUs that it knows; TensorRT builds for the GPU in the machine only.

    Raises:
        EngineError: None can; the message names the remedy and the way round.
    """
    here = platform.machine()
    if here != target.architecture:
        raise EngineError(
            f"engines for {target.title} must be built on {target.architecture}, this machine is {here}: {_KIT}"
        )
    if target.rtx and (found := _imported(TENSORRT_RTX)) is not None:
        if hasattr(found.module.ComputeCapability, f"SM{target.sm}"):
            return found
        raise EngineError(
            f"TensorRT for RTX {found.version} does not know SM {target.sm}: update it, or {_KIT}"
        )
    found = _imported(TENSORRT)
    if found is not None and _is_of_this_machine(target):
        _check_version(found, target)
        return found
    if found is not None:
        raise EngineError(
            f"TensorRT builds for the GPU in the machine, and that is no {target.title}: {_KIT}"
        )
    if target.rtx:
        raise EngineError(
            f"no TensorRT is installed to build for {target.title}: pip install 'edgeprune[rtx]', or {_KIT}"
        )
    raise EngineError(
        f"engines for {target.title} are built on the device, where JetPack has TensorRT, not here: {_KIT}"
    )


def installed_libraries() -> dict[str, TensorRtLibrary]:
    """Every TensorRT that can be imported here, by name.

    Raises:
        EngineError: There is none.
    """
    found = {name: library for name in (TENSORRT, TENSORRT_RTX) if (library := _imported(name)) is not None}
    if not found:
        raise EngineError(
            "no TensorRT is installed to run engines: pip install 'edgeprune[rtx]' for an RTX GPU, on a Jetson install "
            "TensorRT from JetPack"
        )
    return found


class TensorRtLog(Protocol):
    """TensorRT's log, reduced to its errors."""

    first: str
    last: str

    def clear(self) -> None:
        """Forget them."""


def new_log(trt: Any) -> Any:
    """A log for a module; also a :class:`TensorRtLog`."""

    class Log(trt.ILogger):  # type: ignore[misc] # the module is known at run time only
        """Remembers the first error since it was cleared, and the last."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.first = self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())
                self.first = self.first or self.last

    return Log()


def _imported(name: str) -> TensorRtLibrary | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    # The stub that PyPI has for some versions imports without a builder.
    return TensorRtLibrary(name, str(module.__version__), module) if hasattr(module, "Builder") else None


def _is_of_this_machine(target: Target) -> bool:
    from edgeprune.this_machine import this_machine

    own = this_machine()
    return own is not None and own.sm == target.sm


def _check_version(library: TensorRtLibrary, target: Target) -> None:
    oldest, newest = target.tensorrt
    have, least = _version(library.version), _version(oldest)
    if have < least or have[0] > int(newest):
        raise EngineError(
            f"TensorRT {library.version} is installed, {target.title} needs {oldest} to {newest}.x: install one, or "
            f"{_KIT}"
        )


def _version(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(part) for part in text.split(".")[:2])
