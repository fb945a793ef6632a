"""How much memory building and running take, estimated before anything is built."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.bundle import Bundle
from edgeprune.cost import DecoderShape, LayerRows, kv_cache_bytes, peak_activation_bytes
from edgeprune.errors import EngineError
from edgeprune.inspection import BYTES_PER_VALUE
from edgeprune.manifest import Manifest
from edgeprune.runtimes.engine_profiles import Limits
from edgeprune.runtimes.external_weights import external_bytes
from edgeprune.targets import GIB

# Peak of a build: measured (docs/tensorrt.md), 2.4 GB for 0.69 GB of weights, 4.1 GB where they are stored twice.
_BUILD_COPIES, _BUILD_BASE = 2.25, GIB
# What CUDA's context and the runtime's kernels take on the device.
_CONTEXT = GIB // 4
# A cache is two buffers that swap roles.
_CACHE_BUFFERS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, estimated.

    Attributes:
        weights: Of all engines.
        kv_cache: Of a prompt that fills ``Limits.sequence``. Nothing of it is pruned: it may be text.
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


@dataclass(frozen=True)
class MemoryModel:
    """What memory depends on.

    Attributes:
        manifest: Of the bundle.
        weights: Bytes of weights that each graph reads.
        copies: How often each graph's engine holds them; once where it is not named.
        limits: The largest prompts.
        bytes_per_value: Of caches and activations.
    """

    manifest: Manifest
    weights: Mapping[str, int]
    copies: Mapping[str, int]
    limits: Limits
    bytes_per_value: int

    @classmethod
    def of(cls, bundle: Bundle, limits: Limits, copies: Mapping[str, int]) -> "MemoryModel":
        """The model of a bundle whose engines hold their weights ``copies[graph]`` times."""
        manifest = bundle.manifest
        weights = {name: external_bytes(bundle.file(graph.file)) for name, graph in manifest.graphs.items()}
        return cls(manifest, weights, copies, limits, BYTES_PER_VALUE[manifest.dtype])

    def estimate(self) -> MemoryEstimate:
        """The estimate."""
        geometry, limits, width = self.manifest.geometry, self.limits, self.bytes_per_value
        shape = DecoderShape.from_geometry(geometry)
        rows = (LayerRows(limits.sequence, limits.sequence),) * geometry.num_layers
        tile_rows = geometry.num_patches * geometry.patches_per_token + geometry.vision_class_tokens
        vision = 2 * (
            geometry.vision_hidden_size + max(geometry.vision_intermediate_size, geometry.vision_hidden_size)
        )
        vision_rows = limits.images * geometry.typical_tiles * tile_rows
        # What DeepStack keeps of the tower, and then of the sequence.
        added = self.manifest.deepstack_layers
        vision += added * geometry.vision_hidden_size
        features = added * limits.sequence * geometry.hidden_size
        engines = [size * self.copies.get(name, 1) for name, size in self.weights.items()]
        return MemoryEstimate(
            weights=sum(engines),
            kv_cache=_CACHE_BUFFERS * kv_cache_bytes(shape, [limits.sequence] * geometry.num_layers, width),
            activations=max(
                peak_activation_bytes(shape, rows, width) + features * width, vision_rows * vision * width
            ),
            build=_BUILD_BASE + int(_BUILD_COPIES * max(engines)),
        )


def check_buildable(need: MemoryEstimate) -> None:
    """Refuse to begin what this machine has no memory to build.

    Raises:
        EngineError: There is too little; the message says by how much.
    """
    available = available_bytes()
    if available is not None and need.build > available:
        raise EngineError(
            f"building would take about {gib(need.build)} of memory, {gib(available)} are free here, "
            f"{gib(need.build - available)} too little: close other programs, add swap, take --profiles one, or build "
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


def gib(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / GIB:.2f} GiB"
