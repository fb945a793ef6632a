"""ONNX Runtime's execution providers: what each is called, and what it is told of a graph.

Source of the option names: onnxruntime.ai, "TensorRT Execution Provider"; tensorrt_rtx_provider_options.h of
onnxruntime-ep-nv-tensorrt-rtx 0.5.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError
from edgeprune.extras import require
from edgeprune.manifest import GraphEntry, Manifest, ProfileEntry
from edgeprune.runtimes.engine_builder import input_range
from edgeprune.runtimes.engine_profiles import ONE, Limits, graph_profiles
from edgeprune.runtimes.user_cache import user_cache

_RTX_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: What ``--provider`` takes.
        title: ONNX Runtime's name of it.
        extra: The extra of edgeprune that installs it.
        device: Where tensors lie, "cpu" or "cuda".
        after: Providers that take what it leaves.
    """

    name: str
    title: str
    extra: str
    device: str
    after: tuple[str, ...] = ()


_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", _CPU, "cpu", "cpu"),
        Provider("cuda", _CUDA, "gpu", "cuda", (_CPU,)),
        Provider("tensorrt", "TensorrtExecutionProvider", "gpu", "cuda", (_CUDA, _CPU)),
        Provider("tensorrt_rtx", "NvTensorRTRTXExecutionProvider", "rtx-provider", "cuda"),
    )
}


def find_provider(name: str) -> Provider:
    """A provider by name.

    Raises:
        BackendError: There is none of that name.
    """
    if name not in PROVIDERS:
        raise BackendError(f"provider '{name}' is unknown, known: {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def check_available(ort: Any, provider: Provider) -> None:
    """Make sure that ONNX Runtime has a provider; one that comes as a library of its own is registered.

    Raises:
        BackendError: It has not, or no device of it is here.
        MissingExtraError: The provider's package is not installed.
    """
    if provider.name == "tensorrt_rtx":
        _register_rtx(ort, provider)
        return
    available = ort.get_available_providers()
    if provider.title not in available:
        raise BackendError(
            f"this onnxruntime has no {provider.title} (it has {', '.join(available)}): "
            f"pip uninstall onnxruntime, then pip install 'edgeprune[{provider.extra}]'"
        )


def rtx_devices(ort: Any) -> list[Any]:
    """The GPUs that the registered provider of TensorRT for RTX can use."""
    return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDERS["tensorrt_rtx"].title]


def graph_options(provider: Provider, bundle: Bundle, name: str) -> dict[str, str]:
    """What a provider is told of one graph; empty for those that build no engines.

    One profile covers every size from one row to the whole context: the providers choose no profile by themselves.
    Engines lie in the user's cache, because a bundle may be shared or read-only, and only ``edgeprune build`` writes
    into it.
    """
    if provider.name not in ("tensorrt", "tensorrt_rtx"):
        return {}
    manifest = bundle.manifest
    graph = manifest.graphs[name]
    (profile,) = graph_profiles(manifest, Limits.of(manifest), ONE, name)
    shapes = profile_shapes(graph, profile)
    cache = cache_folder(provider, manifest, name)
    if provider.name == "tensorrt_rtx":
        options = {"nv_runtime_cache_path": str(cache)}
        return options | {f"nv_profile_{kind}_shapes": text for kind, text in shapes.items() if text}
    options = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        # Without it a network of half-precision weights is computed in single precision.
        "trt_fp16_enable": str(manifest.dtype == "float16"),
    }
    return options | {f"trt_profile_{kind}_shapes": text for kind, text in shapes.items() if text}


def profile_shapes(graph: GraphEntry, profile: ProfileEntry) -> dict[str, str]:
    """Least, tuned-for and greatest shape of every dynamic input, ``input:1x2x3,…``; of a value, the value."""
    texts: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for tensor in graph.inputs:
        if not tensor.shape and tensor.name in profile.ranges:
            least, tuned, greatest = ((size,) for size in profile.ranges[tensor.name])
            shapes: tuple[tuple[int, ...], ...] = (least, tuned, greatest)
        elif any(isinstance(dim, str) for dim in tensor.shape):
            shapes = input_range(tensor.shape, profile.ranges)
        else:
            continue
        for text, shape in zip(texts.values(), shapes, strict=True):
            text.append(f"{tensor.name}:{'x'.join(str(size) for size in shape)}")
    return {kind: ",".join(text) for kind, text in texts.items()}


def cache_folder(provider: Provider, manifest: Manifest, name: str) -> Path:
    """Where a provider keeps what it built of a graph; graphs of other content have other folders."""
    return user_cache() / provider.name / manifest.graphs[name].file.sha256[:16]


def _register_rtx(ort: Any, provider: Provider) -> None:
    package = require(_RTX_PACKAGE, extra=provider.extra, purpose=f"for --provider {provider.name}")
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError(
            f"onnxruntime {ort.__version__} takes no provider of another package: pip install 'onnxruntime>=1.23'"
        )
    if not rtx_devices(ort):
        try:
            ort.register_execution_provider_library(provider.title, str(package.get_library_path()))
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime cannot load {provider.title} ({first_line(error)}): it needs an NVIDIA driver of CUDA "
                "13; update the driver, or run with --provider cpu"
            ) from error
    if not rtx_devices(ort):
        raise BackendError(
            f"{provider.title} finds no GPU that it takes (SM 86, 89, and from 120 on): run with --provider cuda or "
            "cpu"
        )


def first_line(error: Exception) -> str:
    """The first line of what ONNX Runtime says."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
