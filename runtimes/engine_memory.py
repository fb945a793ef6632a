"""How much memory building and running take, estimated before anything is built."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.cost import DecoderShape, LayerRows, kv_cache_bytes, peak_activation_bytes
from edgeprune.errors import EngineError
from edgeprune.inspection import BYTES_PER_VALUE
from edgeprune.manifest import Manifest
from edgeprune.runtimes.engine_profiles import Limits
from edgeprune.targets import GIB, Target

# Peak of a build beside the weights of the graph: measured, 2.4 … 4.1 GB for 0.69 GB of weights and two profiles.
_BUILD_COPIES, _BUILD_BASE = 4, GIB
# What CUDA's context and the runtime's kernels take on the device.
_CONTEXT = GIB // 4
# A cache is two buffers that swap roles.
_CACHE_BUFFERS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, estimated.

    Attributes:
        weights: Of all engines, each profile's own copy where the strategy makes one.
        kv_cache: Of a prompt that fills ``Limits.sequence``, nothing pruned.
        activations: Of the decoder and the vision tower at the greatest sizes of the profiles, the larger.
        build: Host memory that the largest engine takes to build.
    """

    weights: int
    kv_cache: int
    activations: int
    build: int

    @property
    def run(self) -> int:
        """Everything that is on the device while it runs."""
        return self.weights + self.kv_cache + self.activations + _CONTEXT


def estimate(manifest: Manifest, limits: Limits, profiles: Mapping[str, int]) -> MemoryEstimate:
    """Estimate for engines with ``profiles[graph]`` optimization profiles."""
    geometry, width = manifest.geometry, BYTES_PER_VALUE[manifest.dtype]
    sizes = {name: sum(entry.bytes for entry in graph.data) for name, graph in manifest.graphs.items()}
    shape = DecoderShape.from_geometry(geometry)
    rows = (LayerRows(limits.sequence, limits.sequence),) * geometry.num_layers
    tile_rows = geometry.num_patches * geometry.patches_per_token + geometry.vision_class_tokens
    vision = 2 * (
        geometry.vision_hidden_size + max(geometry.vision_intermediate_size, geometry.vision_hidden_size)
    )
    vision_rows = limits.images * geometry.typical_tiles * tile_rows
    return MemoryEstimate(
        weights=sum(size * profiles.get(name, 1) for name, size in sizes.items()),
        kv_cache=_CACHE_BUFFERS * kv_cache_bytes(shape, [limits.sequence] * geometry.num_layers, width),
        activations=max(peak_activation_bytes(shape, rows, width), vision_rows * vision * width),
        build=_BUILD_BASE + _BUILD_COPIES * max(size * profiles.get(name, 1) for name, size in sizes.items()),
    )


def check_fits(need: MemoryEstimate, target: Target, usable: int) -> None:
    """Refuse what the target cannot hold.

    Args:
        need: The estimate.
        target: The device.
        usable: What engines may use of its memory, in bytes.

    Raises:
        EngineError: It does not fit; the message says by how much and what would help.
    """
    missing = need.run - usable
    if missing <= 0:
        return
    help_ = [
        "a lower --max-sequence" if need.kv_cache + need.activations > missing // 2 else "",
        "export with --dtype float16" if need.weights > missing else "",
        "a smaller model or a larger device",
    ]
    raise EngineError(
        f"engines would need about {_gib(need.run)} to run (weights {_gib(need.weights)}, KV cache "
        f"{_gib(need.kv_cache)}, activations {_gib(need.activations)}), {target.title} has {_gib(usable)} to give, "
        f"{_gib(missing)} too little: what helps is {', or '.join(part for part in help_ if part)}"
    )


def check_buildable(need: MemoryEstimate) -> None:
    """Refuse to begin what this machine has no memory to build.

    Raises:
        EngineError: There is too little; the message says by how much.
    """
    available = available_bytes()
    if available is not None and need.build > available:
        raise EngineError(
            f"building would take about {_gib(need.build)} of memory, {_gib(available)} are free here, "
            f"{_gib(need.build - available)} too little: close other programs, add swap, take --profiles one, or build "
            "on a larger machine"
        )


def available_bytes() -> int | None:
    """Memory that programs may still take; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a kernel's file
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
