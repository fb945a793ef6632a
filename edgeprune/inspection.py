"""What a bundle is: its model, its pruning, its graphs, and what pruning saves on paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.bundle import Bundle
from edgeprune.calibration_entry import CalibrationEntry
from edgeprune.cost import (
    Convention,
    DecoderShape,
    LayerRows,
    VisionShape,
    attention_flops,
    average_visual_tokens,
    head_flops,
    kv_cache_bytes,
    layer_rows,
    mlp_flops,
    peak_activation_bytes,
    projector_flops,
    vision_flops,
)
from edgeprune.errors import BundleError
from edgeprune.manifest import (
    GeometryEntry,
    Manifest,
    MethodEntry,
    ParityEntry,
    SourceEntry,
    TensorEntry,
)
from edgeprune.quantization_entry import QuantizationEntry

# A short question and a chat template's words.
TEXT_TOKENS = 64
BYTES_PER_VALUE = {"float32": 4, "float16": 2}
FIXED, CALIBRATED, BOUND = "fixed", "calibrated", "unpruned bound"


@dataclass(frozen=True)
class InspectedSite:
    """A place where tokens are dropped.

    Attributes:
        graph: The graph that scores and selects.
        method: Its method.
        place: In words.
        keep_per_image: Visual tokens kept per picture, if it is known.
        keep_share: Share of a picture's visual tokens that is kept instead. Where both are null, the number depends on
            what the picture shows.
        mean_keep_per_image: Their mean over the calibration pictures, if it depends on the input and was
            measured.
    """

    graph: str
    method: str
    place: str
    keep_per_image: int | None
    keep_share: float | None
    mean_keep_per_image: float | None


@dataclass(frozen=True)
class InspectedGraph:
    """A graph.

    Attributes:
        name: Its name in the bundle.
        file: The model file.
        graph_bytes: Size of the model file.
        data_bytes: Size of its external data; files that graphs share are counted in each.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        parity: The difference from the torch reference measured at export.
    """

    name: str
    file: str
    graph_bytes: int
    data_bytes: int
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    parity: ParityEntry | None


@dataclass(frozen=True)
class GroupCost:
    """Cost of prefill in one graph: the vision tower and projector, or a piece of the decoder.

    Attributes:
        graph: The graph.
        layers: Layers whose attention it holds.
        mlp_layers: Layers whose MLP it holds.
        visual_tokens: Visual tokens that enter it; of the vision tower, those that would leave it unpruned.
        unpruned_flops: Floating-point operations with every visual token.
        pruned_flops: The same with the tokens that pruning leaves.
    """

    graph: str
    layers: tuple[int, ...]
    mlp_layers: tuple[int, ...]
    visual_tokens: int
    unpruned_flops: int
    pruned_flops: int


@dataclass(frozen=True)
class PrefillCost:
    """Cost of prefill for one typical picture and some text, counted as :attr:`edgeprune.cost.Convention.TRUE`.

    Attributes:
        text_tokens: Rows of text.
        counts: Where the numbers of kept tokens come from: "fixed" by the method, "calibrated" means, or the
            "unpruned bound", where no token is taken to be dropped at sites that depend on the input.
        groups: The graphs, in the order in which they run; the head is in the last.
        average_visual_tokens: Visual tokens that enter a decoder layer, averaged over the layers.
        unpruned_kv_cache_bytes: KV cache after prefill with every visual token.
        pruned_kv_cache_bytes: The same with the tokens that pruning leaves.
        unpruned_activation_bytes: Most that the activations of a decoder block hold with every visual token.
        pruned_activation_bytes: The same with the tokens that pruning leaves.
    """

    text_tokens: int
    counts: str
    groups: tuple[GroupCost, ...]
    average_visual_tokens: float
    unpruned_kv_cache_bytes: int
    pruned_kv_cache_bytes: int
    unpruned_activation_bytes: int
    pruned_activation_bytes: int

    @property
    def unpruned_flops(self) -> int:
        """All graphs."""
        return sum(group.unpruned_flops for group in self.groups)

    @property
    def pruned_flops(self) -> int:
        """All graphs."""
        return sum(group.pruned_flops for group in self.groups)


@dataclass(frozen=True)
class Inspection:
    """What a bundle is.

    Attributes:
        name: Name of its folder.
        edgeprune_version: The version that wrote it.
        source: The checkpoint that was exported.
        dtype: Type of the weights.
        opset: ONNX opset.
        geometry: Sizes of the model.
        pruning: The methods with their parameters; empty = unpruned.
        sites: Places in the decoder where tokens are dropped.
        graphs: The graphs.
        weights_bytes: External data of all graphs, each file once.
        total_bytes: Every file that the manifest names.
        prefill: What pruning saves on paper.
        engines: Names of the TensorRT engines in the bundle.
        calibration: What calibration measured and chose; None without.
    """

    name: str
    edgeprune_version: str
    source: SourceEntry
    dtype: str
    opset: int
    geometry: GeometryEntry
    pruning: tuple[MethodEntry, ...]
    sites: tuple[InspectedSite, ...]
    graphs: tuple[InspectedGraph, ...]
    weights_bytes: int
    total_bytes: int
    prefill: PrefillCost
    engines: tuple[str, ...]
    quantization: QuantizationEntry | None
    calibration: CalibrationEntry | None = None


def inspect(bundle: str | Path) -> Inspection:
    """Describe a bundle.

    Raises:
        BundleError: No bundle, a file is missing or changed, or the manifest contradicts itself.
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    means = _calibrated_means(manifest)
    data = {entry.path: entry.bytes for graph in manifest.graphs.values() for entry in graph.data}
    try:
        prefill = _prefill_cost(manifest, means)
    except ValueError as error:
        raise BundleError(
            f"the manifest contradicts itself ({error}): export the checkpoint again"
        ) from error
    return Inspection(
        name=opened.path.resolve().name,
        edgeprune_version=manifest.edgeprune_version,
        source=manifest.source,
        dtype=manifest.dtype,
        opset=manifest.opset,
        geometry=manifest.geometry,
        pruning=manifest.pruning,
        sites=tuple(
            InspectedSite(
                graph=site.graph,
                method=site.method,
                place=site.place,
                keep_per_image=site.keep_per_image,
                keep_share=site.keep_share,
                mean_keep_per_image=means.get(site.graph)
                if site.keep_per_image is None and site.keep_share is None
                else None,
            )
            for site in manifest.sites
        ),
        graphs=tuple(
            InspectedGraph(
                name=name,
                file=graph.file.path,
                graph_bytes=graph.file.bytes,
                data_bytes=sum(entry.bytes for entry in graph.data),
                inputs=graph.inputs,
                outputs=graph.outputs,
                parity=manifest.parity.get(name),
            )
            for name, graph in manifest.graphs.items()
        ),
        weights_bytes=sum(data.values()),
        total_bytes=sum(entry.bytes for entry in manifest.files()),
        prefill=prefill,
        engines=tuple(manifest.engines),
        quantization=manifest.quantization,
        calibration=manifest.calibration,
    )


def _calibrated_means(manifest: Manifest) -> dict[str, float]:
    """Mean tokens kept per picture by site."""
    if manifest.calibration is None:
        return {}
    return {site: kept.mean for site, kept in manifest.calibration.keep_per_image.items()}


def _prefill_cost(manifest: Manifest, means: Mapping[str, float]) -> PrefillCost:
    geometry, sites = manifest.geometry, manifest.sites
    shape = DecoderShape.from_geometry(geometry)
    # DeepStack's mergers are projectors of the same sizes.
    projectors = 1 + manifest.deepstack_layers
    num_layers, unpruned_tokens = geometry.num_layers, geometry.typical_tokens
    kept, counts = _kept_counts(manifest, means)
    tokens_in = geometry.tokens_per_image
    full = layer_rows((), num_layers, unpruned_tokens, (), TEXT_TOKENS)
    pruned = layer_rows(sites, num_layers, tokens_in, kept, TEXT_TOKENS)
    vision = GroupCost(
        graph="vision",
        layers=tuple(range(geometry.vision_layers)),
        mlp_layers=tuple(range(geometry.vision_layers)),
        visual_tokens=unpruned_tokens,
        unpruned_flops=vision_flops(VisionShape.unpruned(geometry), geometry.typical_tiles)
        + projectors * projector_flops(geometry.projector_sizes, unpruned_tokens),
        pruned_flops=vision_flops(VisionShape.from_geometry(geometry), geometry.typical_tiles)
        + projectors * projector_flops(geometry.projector_sizes, tokens_in),
    )
    groups = [vision]
    for index, segment in enumerate(manifest.segments):
        head = head_flops(shape) if index == len(manifest.segments) - 1 else 0
        groups.append(
            GroupCost(
                graph=segment.graph,
                layers=segment.layers,
                mlp_layers=segment.mlp_layers,
                visual_tokens=(tokens_in, *kept)[index],
                unpruned_flops=head + _blocks(shape, full, segment.layers, segment.mlp_layers),
                pruned_flops=head + _blocks(shape, pruned, segment.layers, segment.mlp_layers),
            )
        )
    bytes_per_value = BYTES_PER_VALUE.get(manifest.dtype, 2)
    return PrefillCost(
        text_tokens=TEXT_TOKENS,
        counts=counts,
        groups=tuple(groups),
        average_visual_tokens=average_visual_tokens(sites, num_layers, tokens_in, kept),
        unpruned_kv_cache_bytes=kv_cache_bytes(shape, [rows.attention for rows in full], bytes_per_value),
        pruned_kv_cache_bytes=kv_cache_bytes(shape, [rows.attention for rows in pruned], bytes_per_value),
        unpruned_activation_bytes=peak_activation_bytes(shape, full, bytes_per_value),
        pruned_activation_bytes=peak_activation_bytes(shape, pruned, bytes_per_value),
    )


def _kept_counts(manifest: Manifest, means: Mapping[str, float]) -> tuple[list[int], str]:
    """Visual tokens that leave every site, and where the numbers come from."""
    tokens, counts, kept = manifest.geometry.tokens_per_image, FIXED, []
    for site in manifest.sites:
        if site.keep_per_image is not None:
            tokens = min(tokens, site.keep_per_image)
        elif site.keep_share is not None:
            tokens = min(tokens, max(1, int(round(manifest.geometry.typical_tokens * site.keep_share, 6))))
        elif site.graph in means:
            tokens = min(tokens, round(means[site.graph]))
            counts = CALIBRATED if counts == FIXED else counts
        else:
            counts = BOUND
        kept.append(tokens)
    return kept, counts


def _blocks(
    shape: DecoderShape, rows: Sequence[LayerRows], layers: Sequence[int], mlp_layers: Sequence[int]
) -> int:
    if any(not 0 <= layer < len(rows) for layer in (*layers, *mlp_layers)):
        raise ValueError(f"a segment holds layers outside the decoder's {len(rows)}")
    attention = sum(attention_flops(shape, rows[layer].attention, Convention.TRUE) for layer in layers)
    return attention + sum(mlp_flops(shape, rows[layer].mlp, Convention.TRUE) for layer in mlp_layers)
