"""What a bundle is: its model, its pruning, its graphs, and what pruning saves on paper."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeprune.bundle import Bundle
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
        keep_per_image: Visual tokens kept per picture; null if it depends on the input.
        mean_keep_per_image: Their mean over the calibration pictures, if it depends on the input and was
            measured.
    """

    graph: str
    method: str
    place: str
    keep_per_image: int | None
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
        visual_tokens: Visual tokens that enter it; of the vision tower, patches.
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
    """Cost of prefill for one picture and some text, counted as :attr:`edgeprune.cost.Convention.TRUE`.

    Attributes:
        text_tokens: Rows of text.
        counts: Where the numbers of kept tokens come from: "fixed" by the method, "calibrated" means, or the
            "unpruned bound", where no token is taken to be dropped at sites that depend on the input.
        groups: The graphs, in the order in which they run; the head is in the last.
        average_visual_tokens: Visual tokens that enter a decoder layer, averaged over the layers.
        unpruned_kv_cache_bytes: KV cache after prefill with every visual token.
        pruned_kv_cache_bytes: The same with the tokens that pruning leaves.
    """

    text_tokens: int
    counts: str
    groups: tuple[GroupCost, ...]
    average_visual_tokens: float
    unpruned_kv_cache_bytes: int
    pruned_kv_cache_bytes: int

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
                mean_keep_per_image=means.get(site.graph) if site.keep_per_image is None else None,
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
    )


def _calibrated_means(manifest: Manifest) -> dict[str, float]:
    """Mean tokens kept per picture by site, from ``calibration["keep_per_image"][site]["mean"]``."""
    if manifest.calibration is None:
        return {}
    try:
        sites = manifest.calibration["keep_per_image"]
        return {str(site): float(counts["mean"]) for site, counts in sites.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            "the manifest's calibration holds no mean of kept tokens per site: calibrate the bundle again"
        ) from error


def _prefill_cost(manifest: Manifest, means: Mapping[str, float]) -> PrefillCost:
    geometry, sites = manifest.geometry, manifest.sites
    shape = DecoderShape.from_geometry(geometry)
    num_layers, num_patches = geometry.num_layers, geometry.num_patches
    kept, counts = _kept_counts(manifest, means)
    tokens_in = geometry.tokens_per_image
    full = layer_rows((), num_layers, num_patches, (), TEXT_TOKENS)
    pruned = layer_rows(sites, num_layers, tokens_in, kept, TEXT_TOKENS)
    vision = GroupCost(
        graph="vision",
        layers=tuple(range(geometry.vision_layers)),
        mlp_layers=tuple(range(geometry.vision_layers)),
        visual_tokens=num_patches,
        unpruned_flops=vision_flops(VisionShape.unpruned(geometry)) + _projector(geometry, num_patches),
        pruned_flops=vision_flops(VisionShape.from_geometry(geometry)) + _projector(geometry, tokens_in),
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
    )


def _kept_counts(manifest: Manifest, means: Mapping[str, float]) -> tuple[list[int], str]:
    """Visual tokens that leave every site, and where the numbers come from."""
    tokens, counts, kept = manifest.geometry.tokens_per_image, FIXED, []
    for site in manifest.sites:
        if site.keep_per_image is not None:
            tokens = min(tokens, site.keep_per_image)
        elif site.graph in means:
            tokens = min(tokens, round(means[site.graph]))
            counts = CALIBRATED if counts == FIXED else counts
        else:
            counts = BOUND
        kept.append(tokens)
    return kept, counts


def _projector(geometry: GeometryEntry, tokens: int) -> int:
    return projector_flops(geometry.vision_hidden_size, geometry.hidden_size, tokens)


def _blocks(
    shape: DecoderShape, rows: Sequence[LayerRows], layers: Sequence[int], mlp_layers: Sequence[int]
) -> int:
    if any(not 0 <= layer < len(rows) for layer in (*layers, *mlp_layers)):
        raise ValueError(f"a segment holds layers outside the decoder's {len(rows)}")
    attention = sum(attention_flops(shape, rows[layer].attention, Convention.TRUE) for layer in layers)
    return attention + sum(mlp_flops(shape, rows[layer].mlp, Convention.TRUE) for layer in mlp_layers)


def render_inspection(inspection: Inspection) -> RenderableType:
    """The inspection as tables of up to 100 columns, the gist first; legible without colours."""
    parts: list[RenderableType] = [_summary(inspection), Text(), _pruning(inspection)]
    if inspection.sites:
        parts += [Text(), _sites_table(inspection)]
    parts += [Text(), _cost_table(inspection), Text(_cost_note(inspection)), Text()]
    parts += [_graphs_table(inspection), Text(), _tensors_table(inspection)]
    return Group(*parts)


def _summary(inspection: Inspection) -> Table:
    geometry = inspection.geometry
    methods = " + ".join(method.method for method in inspection.pruning)
    heads = f"{geometry.num_heads} heads of {geometry.head_dim}"
    if geometry.num_kv_heads != geometry.num_heads:
        heads += f" ({geometry.num_kv_heads} key/value)"
    rows, columns = geometry.grid
    picture = f"{rows} x {columns} patches, {geometry.tokens_per_image} tokens enter the decoder"
    table = _table(show_header=False, title=f"Bundle {inspection.name}")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    source = inspection.source
    for name, text in (
        (
            "model",
            f"{source.model_type}, pruned by {methods}" if methods else f"{source.model_type}, unpruned",
        ),
        ("source", f"{source.name} (sha256 {source.sha256[:12]})"),
        (
            "format",
            f"{inspection.dtype}, ONNX opset {inspection.opset}, edgeprune {inspection.edgeprune_version}",
        ),
        ("decoder", f"{geometry.num_layers} layers, width {geometry.hidden_size}, {heads}"),
        ("picture", picture),
        ("context", f"{geometry.context_length} positions, vocabulary of {geometry.vocab_size}"),
        ("size", f"{_bytes(inspection.weights_bytes)} of weights, {_bytes(inspection.total_bytes)} in all"),
        ("engines", ", ".join(inspection.engines) or "none: the graphs run with ONNX Runtime"),
    ):
        table.add_row(name, Text(text))
    return table


def _pruning(inspection: Inspection) -> RenderableType:
    if not inspection.pruning:
        return Text("Pruning: none")
    table = _table("method", "parameter", "value", title="Pruning")
    for entry in inspection.pruning:
        for index, (name, value) in enumerate(entry.parameters.items()):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(entry.method if index == 0 else "", Text(name), Text(text))
        if not entry.parameters:
            table.add_row(entry.method, "", "")
    return table


def _sites_table(inspection: Inspection) -> Table:
    table = _table("site", "method", "place", "tokens kept per picture", title="Where tokens are dropped")
    for site in inspection.sites:
        kept = str(site.keep_per_image)
        if site.keep_per_image is None:
            kept = "depends on the input"
            if site.mean_keep_per_image is not None:
                kept += f", {site.mean_keep_per_image:.1f} on average"
        table.add_row(site.graph, site.method, site.place, kept)
    return table


def _cost_table(inspection: Inspection) -> Table:
    prefill = inspection.prefill
    last = prefill.groups[-1].graph
    pruned = "pruned, at most" if prefill.counts == BOUND else "pruned"
    columns = ("visual tokens in", "unpruned", pruned, "left")
    title = f"FLOPs of one picture with {prefill.text_tokens} text tokens (prefill)"
    table = _table("graph", "layers", *columns, right=columns, title=title)
    bounded = False
    for group in prefill.groups:
        tokens = f"<= {group.visual_tokens}" if bounded else str(group.visual_tokens)
        layers = _layers(group) + (" + head" if group.graph == last else "")
        table.add_row(group.graph, layers, tokens, *_before_after(group.unpruned_flops, group.pruned_flops))
        bounded = bounded or (group is not prefill.groups[0] and prefill.counts == BOUND)
    table.add_section()
    table.add_row("total", "", "", *_before_after(prefill.unpruned_flops, prefill.pruned_flops))
    full, left = prefill.unpruned_kv_cache_bytes, prefill.pruned_kv_cache_bytes
    table.add_row("KV cache", "", "", _bytes(full), _bytes(left), _percent(left, full))
    return table


def _cost_note(inspection: Inspection) -> str:
    prefill = inspection.prefill
    average = f"{prefill.average_visual_tokens:.1f} visual tokens in a decoder layer on average"
    if prefill.counts == BOUND:
        return (
            f"Unpruned bound, {average}: how many tokens\n"
            "are kept depends on the input; calibration gives real counts (edgeprune calibrate)."
        )
    return f"{average}; kept tokens are calibration means." if prefill.counts == CALIBRATED else f"{average}."


def _layers(group: GroupCost) -> str:
    if group.layers == group.mlp_layers:
        return _span(group.layers)
    parts = (("attention", group.layers), ("MLP", group.mlp_layers))
    return ", ".join(f"{name} {_span(layers)}" for name, layers in parts if layers)


def _graphs_table(inspection: Inspection) -> Table:
    table = _table(
        "graph",
        "model",
        "weights",
        "runs",
        "max difference",
        "allowed",
        "indices",
        right=("model", "weights", "runs", "max difference", "allowed"),
        title="Graphs, and their difference from the torch reference at export",
    )
    indices = {None: "-", True: "identical", False: "DIFFERENT"}
    for graph in inspection.graphs:
        parity = ("-", "-", "-", "-")
        if graph.parity is not None:
            measured = graph.parity
            parity = (
                str(measured.cases),
                f"{measured.max_abs_diff:.1e}",
                f"{measured.tolerance:.0e}",
                indices[measured.indices_identical],
            )
        table.add_row(graph.name, _bytes(graph.graph_bytes), _bytes(graph.data_bytes), *parity)
    return table


def _tensors_table(inspection: Inspection) -> Table:
    table = _table("graph", "", "tensor", "type", "shape", title="Inputs and outputs")
    for graph in inspection.graphs:
        first = True
        for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for name, tensor in _collapsed(tensors):
                shape = f"[{', '.join(map(str, tensor.shape))}]"
                table.add_row(graph.name if first else "", direction, Text(name), tensor.dtype, Text(shape))
                first, direction = False, ""
    return table


def _collapsed(tensors: Sequence[TensorEntry]) -> list[tuple[str, TensorEntry]]:
    """Tensors that differ only by the layer in their name become one row, ``past_key_values.{0-3}.key``."""
    found: dict[tuple[str, str, tuple[int | str, ...]], list[tuple[int, TensorEntry]]] = {}
    for tensor in tensors:
        match = re.search(r"\.(\d+)(?=\.|$)", tensor.name)
        name, layer = tensor.name, -1
        if match is not None:
            name, layer = tensor.name[: match.start()] + ".{}" + tensor.name[match.end() :], int(match[1])
        found.setdefault((name, tensor.dtype, tensor.shape), []).append((layer, tensor))
    rows: list[tuple[str, TensorEntry]] = []
    for (pattern, _, _), members in found.items():
        first = members[0][1]
        span = _span([layer for layer, _ in members])
        rows.append((first.name if len(members) == 1 else pattern.replace("{}", f"{{{span}}}"), first))
    return rows


def _span(layers: Sequence[int]) -> str:
    """Ascending numbers as "0-3, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _table(*columns: str, title: str, right: Sequence[str] = (), show_header: bool = True) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=show_header
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _before_after(before: int, after: int) -> tuple[str, str, str]:
    return _flops(before), _flops(after), _percent(after, before)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _flops(count: int) -> str:
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def _bytes(count: int) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _scaled(count: int, units: Sequence[str]) -> str:
    """Three digits and a decimal unit."""
    value, index = float(count), 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[index]}".rstrip()
