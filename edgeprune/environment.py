"""What is installed here, and what a missing piece is needed for."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from typing import Any

import edgeprune
from edgeprune.available_cores import available_cores
from edgeprune.errors import EngineError
from edgeprune.onnxruntime_module import onnxruntime_module
from edgeprune.plugins.plugin_library import found

# module, distribution(s), what for, extra
_PIECES = (
    ("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "running bundles", "cpu (or gpu)"),
    ("torch", ("torch",), "exporting checkpoints", "export"),
    ("onnx", ("onnx",), "exporting and verifying", "export"),
    ("onnxscript", ("onnxscript",), "exporting checkpoints", "export"),
    ("safetensors", ("safetensors",), "reading checkpoints", "export"),
    ("transformers", ("transformers",), "converting tokenizers", "export"),
    ("accelerate", ("accelerate",), "fitting with several processes", "fit"),
    ("tensorrt", ("tensorrt",), "building TensorRT engines on the device itself, running them", "tensorrt"),
    ("tensorrt_rtx", ("tensorrt-rtx-cu13",), "building TensorRT engines for RTX GPUs, running them", "rtx"),
    (
        "cuda.bindings",
        ("cuda-bindings",),
        "running TensorRT engines (--backend tensorrt)",
        "tensorrt (or rtx)",
    ),
    (
        "onnxruntime_ep_nv_tensorrt_rtx",
        ("onnxruntime-ep-nv-tensorrt-rtx",),
        "TensorRT for RTX inside ONNX Runtime (--provider tensorrt_rtx)",
        "rtx-provider",
    ),
)


@dataclass(frozen=True)
class Piece:
    """A dependency.

    Attributes:
        name: The module.
        version: Installed version, None if missing.
        purpose: What it is for.
        remedy: How to install it, empty if it is there.
    """

    name: str
    version: str | None
    purpose: str
    remedy: str


@dataclass(frozen=True)
class Environment:
    """What :func:`doctor` found.

    Attributes:
        edgeprune: Version of edgeprune.
        python: Version of Python.
        machine: Operating system and architecture.
        cpu_cores: Cores this process may use.
        providers: Execution providers that ONNX Runtime lists.
        pieces: The optional dependencies.
    """

    edgeprune: str
    python: str
    machine: str
    cpu_cores: int
    providers: tuple[str, ...]
    pieces: tuple[Piece, ...]


def doctor() -> Environment:
    """Look at what is installed; imports nothing heavy but ONNX Runtime."""
    pieces: list[Piece] = []
    for module, distributions, purpose, extra in _PIECES:
        version = _version(module, distributions)
        remedy = "" if version else f"pip install 'edgeprune[{extra.partition(' ')[0]}]'"
        pieces.append(Piece(module, version, purpose, remedy))
    pieces.append(_plugin())
    return Environment(
        edgeprune=edgeprune.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        cpu_cores=available_cores(),
        providers=_providers(),
        pieces=tuple(pieces),
    )


def _plugin() -> Piece:
    name, purpose = "plugin library", "the operators' kernels in TensorRT engines"
    try:
        library = found()
    except EngineError as error:
        return Piece(name, None, purpose, str(error))
    major, minor = library.tensorrt
    return Piece(name, f"{library.version} (headers of TensorRT {major}.{minor})", purpose, "")


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:  # the package that would hold it is missing
        return None
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def _providers() -> tuple[str, ...]:
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    onnxruntime: Any = onnxruntime_module(extra="cpu", purpose="to list its providers")
    return tuple(onnxruntime.get_available_providers())
