"""``manifest.json``: what a bundle holds and how to run it; Python and C++ read the same file."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune import tensor_names as names
from edgeprune.calibration_entry import CalibrationEntry
from edgeprune.errors import BundleError
from edgeprune.json_data import from_json, to_json
from edgeprune.numbering import ORIGINAL
from edgeprune.positions import AXES
from edgeprune.quantization_entry import QuantizationEntry

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
DTYPES = ("float32", "float16")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle.

    Attributes:
        path: Relative to the bundle, with forward slashes.
        sha256: Hash of its content.
        bytes: Its size.
    """

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        pure = PurePosixPath(self.path)
        if not self.path or pure.is_absolute() or ".." in pure.parts or "\\" in self.path or ":" in self.path:
            raise BundleError(f"the manifest names a file outside the bundle: {self.path!r}")
        if not _SHA256.fullmatch(self.sha256) or self.bytes < 0:
            raise BundleError(f"the manifest's entry of '{self.path}' has no usable sha256 or size")


@dataclass(frozen=True)
class TensorEntry:
    """An input or output of a graph.

    Attributes:
        name: See :mod:`edgeprune.tensor_names`.
        dtype: ONNX name in lower case: "float32", "float16", "int64".
        shape: Sizes and names of dynamic dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphEntry:
    """An ONNX graph.

    Attributes:
        file: The model.
        data: Files of external data that it reads; graphs may share one.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
    """

    file: FileEntry
    data: tuple[FileEntry, ...]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class GeometryEntry:
    """Sizes of the model.

    Attributes:
        hidden_size: C of the decoder.
        intermediate_size: Width of the decoder's MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: D.
        vocab_size: V.
        context_length: Most positions.
        positions: Kind of position ids: "sequential" or "multimodal".
        grid: Visual tokens of a tile before pruning, rows and columns; of the typical picture where tiles differ in
            size.
        tokens_per_tile: Visual tokens of a tile that enter the projector, the most if it depends on the picture; null
            if nothing is dropped before it.
        typical_tiles: Tiles of the picture that reports count with; 1 where every picture is one tile.
        typical_tokens: Its visual tokens before pruning.
        tokens_per_image: Those of them that enter the decoder.
        vision_hidden_size: Width of the vision tower.
        vision_intermediate_size: Width of its MLP.
        vision_mlp_matrices: Matrices of its MLP: 2, or 3 where it is gated.
        vision_layers: Layers of the tower that run.
        vision_class_tokens: Rows of a tile that are no patches.
        vision_window: Patches that attend to each other, outside of ``vision_global_layers``; 0 = all do.
        vision_global_layers: Layers where all attend to each other although there is a window.
        vision_tokens: Rows of a tile after each layer's attention, class token included.
        patches_per_token: Patches that become one visual token behind the tower.
        projector_sizes: Widths of a visual token's features on the way to the decoder.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    positions: str
    grid: tuple[int, ...]
    tokens_per_tile: int | None
    typical_tiles: int
    typical_tokens: int
    tokens_per_image: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_mlp_matrices: int
    vision_layers: int
    vision_class_tokens: int
    vision_window: int
    vision_global_layers: tuple[int, ...]
    vision_tokens: tuple[int, ...]
    patches_per_token: int
    projector_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        may_be_zero = ("vision_layers", "vision_class_tokens", "vision_window", "vision_global_layers")
        for size in fields(self):
            value = getattr(self, size.name)
            if value is None or size.name == "positions":
                continue
            lowest = 0 if size.name in may_be_zero else 1
            if any(number < lowest for number in (value if isinstance(value, tuple) else (value,))):
                raise BundleError(
                    f"{MANIFEST_FILE}.geometry.{size.name} is {value}, expected at least {lowest}"
                )
        if len(self.grid) != 2:
            raise BundleError(
                f"{MANIFEST_FILE}.geometry.grid is {list(self.grid)}, expected rows and columns"
            )
        if self.positions not in AXES:
            raise BundleError(
                f"{MANIFEST_FILE}.geometry.positions is {self.positions!r}, known: {', '.join(AXES)}"
            )

    @property
    def num_patches(self) -> int:
        """Visual tokens of a tile before pruning."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class SourceEntry:
    """The checkpoint that was exported.

    Attributes:
        name: Name of its folder.
        model_type: Hugging Face's family.
        sha256: Hash over its config, weights and pruning files.
    """

    name: str
    model_type: str
    sha256: str


@dataclass(frozen=True)
class MethodEntry:
    """A pruning method with its parameters."""

    method: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class SegmentEntry:
    """A piece of the decoder.

    Attributes:
        graph: Its graph.
        layers: Layers whose attention, and so whose KV cache, it holds.
        mlp_layers: Layers whose MLP it holds.
        probe: Whether it takes the probe rows.
    """

    graph: str
    layers: tuple[int, ...]
    mlp_layers: tuple[int, ...]
    probe: bool


@dataclass(frozen=True)
class SiteEntry:
    """A place where tokens are dropped, after the segment of the same index.

    Attributes:
        graph: The graph that scores and selects.
        method: Its method.
        place: In words, for reports.
        layer: 0-based decoder layer.
        before_mlp: Between the layer's attention and its MLP instead of before the layer.
        keep_per_image: Visual tokens kept per picture, all if it has fewer.
        keep_share: Share of a picture's unpruned visual tokens that is kept instead; where both are null, the number
            depends on what the picture shows.
        positions: What becomes of position ids behind the site: "original", "renumbered" or
            "renumbered in prefill".
        recycled_per_image: Dropped tokens of a picture that are looked through for merging.
        merged_per_image: Tokens that they are merged into, counted in ``keep_per_image``.
    """

    graph: str
    method: str
    place: str
    layer: int
    before_mlp: bool
    keep_per_image: int | None
    keep_share: float | None = None
    positions: str = ORIGINAL
    recycled_per_image: int = 0
    merged_per_image: int = 0


@dataclass(frozen=True)
class ProbeEntry:
    """Rows that ride along in the decoder's projections to score the others.

    Attributes:
        guided: Whether the graph "guide" chooses the text rows they average; otherwise all text after the pictures.
        guide_tokenizer: CLIP's tokenizer, if guided.
        guide_context_length: CLIP's longest text in tokens.
    """

    guided: bool
    guide_tokenizer: FileEntry | None
    guide_context_length: int


@dataclass(frozen=True)
class ParityEntry:
    """The measured difference of a graph from the torch reference, at export.

    Attributes:
        cases: Runs compared.
        max_abs_diff: Largest absolute difference over the floating-point outputs.
        tolerance: The largest that is accepted, relative to the outputs' largest magnitude (at least 1).
        indices_identical: Whether all integer outputs were equal; null if there are none.
    """

    cases: int
    max_abs_diff: float
    tolerance: float
    indices_identical: bool | None


@dataclass(frozen=True)
class RateEntry:
    """Dropping tokens from the caches behind the last site while an answer is generated.

    The graph "rate" decides at every generated token, the graph "compact" takes the rows that stay.

    Attributes:
        layer: The decoder layer whose query and keys the graph "rate" reads, the last before the site.
        num_rates: R: rate k removes the share k/R of the visual tokens that entered the site.
    """

    layer: int
    num_rates: int


@dataclass(frozen=True)
class ProfileEntry:
    """An optimization profile of an engine.

    Attributes:
        name: "prefill", "prefill0" …, "decode", or "all" where there is one for everything.
        ranges: Least, tuned-for and greatest size by name of the dynamic dimension; of a scalar input its value.
    """

    name: str
    ranges: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, sizes in self.ranges.items():
            if len(sizes) != 3 or not 0 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise BundleError(
                    f"profile '{self.name}': {name} is {list(sizes)}, expected least ≤ tuned ≤ greatest"
                )


@dataclass(frozen=True)
class EngineEntry:
    """A serialized engine.

    Attributes:
        file: The engine.
        key: Hash of everything that it was built from: ONNX, weights, TensorRT, GPU, plugin, profiles, settings.
        onnx_sha256: Hash of the ONNX file that it came from.
        profiles: Its optimization profiles, in the engine's order.
        seconds: What building took.
    """

    file: FileEntry
    key: str
    onnx_sha256: str
    profiles: tuple[ProfileEntry, ...]
    seconds: float


@dataclass(frozen=True)
class EngineSetEntry:
    """The engines of a target.

    Attributes:
        key: Hash of everything that the engines and the choice among strategies were made from.
        builder: "tensorrt" or "tensorrt_rtx".
        tensorrt_version: Its version.
        sm: Compute capability of the GPU, 87 for 8.7.
        precision: Of weights and activations.
        plugin_version: Of the plugin that the engines need; null where the site graphs are standard operators.
        strategy: How the decoder's profiles were chosen: "one", "split" or "file".
        strategy_bytes: Size of all engines by strategy that was tried.
        engines: By graph.
    """

    key: str
    builder: str
    tensorrt_version: str
    sm: int
    precision: str
    plugin_version: str | None
    strategy: str
    strategy_bytes: dict[str, int]
    engines: dict[str, EngineEntry]


@dataclass(frozen=True)
class Manifest:
    """The manifest of a bundle."""

    edgeprune_version: str
    source: SourceEntry
    dtype: str
    opset: int
    geometry: GeometryEntry
    pruning: tuple[MethodEntry, ...]
    segments: tuple[SegmentEntry, ...]
    sites: tuple[SiteEntry, ...]
    probe: ProbeEntry | None
    graphs: dict[str, GraphEntry]
    preprocessing: dict[str, Any]
    prompt: dict[str, Any]
    tokenizer: FileEntry
    parity: dict[str, ParityEntry]
    rate: RateEntry | None = None
    calibration: CalibrationEntry | None = None
    quantization: QuantizationEntry | None = None
    engines: dict[str, EngineSetEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"{MANIFEST_FILE}.dtype is {self.dtype!r}, known: {', '.join(DTYPES)}")
        needed = [
            "vision",
            "projector",
            "embed",
            *(s.graph for s in self.segments),
            *(s.graph for s in self.sites),
        ]
        needed += ["gather"] if self.sites else []
        needed += ["rate", "compact"] if self.rate is not None else []
        needed += ["guide"] if self.probe is not None and self.probe.guided else []
        for name in needed:
            if name not in self.graphs:
                raise BundleError(f"the manifest lacks the graph '{name}': export the checkpoint again")
        if len(self.sites) != len(self.segments) - 1:
            raise BundleError(
                "the manifest's sites do not lie between its segments: export the checkpoint again"
            )
        if not 0 <= self.deepstack_layers <= self.geometry.num_layers:
            raise BundleError(
                f"the manifest's projector has features for {self.deepstack_layers} of {self.geometry.num_layers} "
                "decoder layers: export the checkpoint again"
            )
        if self.calibration is not None:
            self.calibration.check_names(
                [segment.graph for segment in self.segments], [site.graph for site in self.sites]
            )

    @property
    def deepstack_layers(self) -> int:
        """Decoder layers behind which DeepStack adds features of the vision tower; 0 in most families."""
        outputs = {tensor.name: tensor for tensor in self.graphs["projector"].outputs}
        features = outputs.get(names.IMAGE_DEEPSTACK_FEATURES)
        added = features.shape[0] if features is not None and features.shape else 0
        return added if isinstance(added, int) else 0

    def files(self) -> list[FileEntry]:
        """Every file that the manifest names, each once."""
        entries = [self.tokenizer]
        if self.probe is not None and self.probe.guide_tokenizer is not None:
            entries.append(self.probe.guide_tokenizer)
        for graph in self.graphs.values():
            entries.extend((graph.file, *graph.data))
        return list({entry.path: entry for entry in entries}.values())


def manifest_to_json(manifest: Manifest) -> str:
    """The text of ``manifest.json``."""
    return json.dumps(to_json(manifest), indent=1, ensure_ascii=False) + "\n"


def manifest_from_json(path: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        BundleError: The file is missing, unreadable, of an unknown version, or inconsistent.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"{path.parent} is no bundle: it has no {MANIFEST_FILE}; make one with edgeprune export"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not readable JSON: copy the bundle again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {version!r}, this edgeprune reads {FORMAT_VERSION}: "
            "export the checkpoint again, or install the edgeprune that wrote it"
        )
    return from_json(Manifest, data, MANIFEST_FILE)
