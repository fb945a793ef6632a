"""An inspection as tables that fit a terminal of 100 columns."""

import re
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeprune.calibration_report import calibration_summary, render_calibration
from edgeprune.inspection import BOUND, CALIBRATED, GroupCost, Inspection
from edgeprune.manifest import TensorEntry
from edgeprune.quantities import format_bytes, format_count
from edgeprune.quantization_entry import QuantizationEntry


def render_inspection(inspection: Inspection) -> RenderableType:
    """The inspection as tables of up to 100 columns, the gist first; legible without colours."""
    parts: list[RenderableType] = [_summary(inspection), Text(), _pruning(inspection)]
    if inspection.sites:
        parts += [Text(), _sites_table(inspection)]
    parts += [Text(), _cost_table(inspection), Text(_cost_note(inspection)), Text()]
    if inspection.calibration is not None:
        parts += [render_calibration(inspection.calibration), Text()]
    parts += [_graphs_table(inspection), Text(), _tensors_table(inspection)]
    return Group(*parts)


def _summary(inspection: Inspection) -> Table:
    geometry = inspection.geometry
    methods = " + ".join(method.method for method in inspection.pruning)
    heads = f"{geometry.num_heads} heads of {geometry.head_dim}"
    if geometry.num_kv_heads != geometry.num_heads:
        heads += f" ({geometry.num_kv_heads} key/value)"
    rows, columns = geometry.grid
    picture = f"{rows} x {columns} visual tokens, {geometry.tokens_per_image} enter the decoder"
    if geometry.typical_tiles > 1:
        picture = f"{geometry.typical_tiles} tiles of {picture} (they differ from picture to picture)"
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
        (
            "size",
            f"{format_bytes(inspection.weights_bytes)} of weights, {format_bytes(inspection.total_bytes)} in all",
        ),
        ("quantized", _quantized(inspection.quantization)),
        ("engines", ", ".join(inspection.engines) or "none: the graphs run with ONNX Runtime"),
        (
            "calibration",
            "none: edgeprune calibrate measures kept tokens"
            if inspection.calibration is None
            else calibration_summary(inspection.calibration),
        ),
    ):
        table.add_row(name, Text(text))
    return table


def _quantized(entry: QuantizationEntry | None) -> str:
    if entry is None:
        return "no"
    parts = (("decoder", entry.decoder), ("vision tower", entry.vision))
    named = ", ".join(f"{name} {part.precision}" for name, part in parts if part is not None)
    kept = ", ".join(f"{site} {share:.3f}" for site, share in entry.report.kept_agreement.items())
    return (
        f"{named} for {entry.form}; of {entry.samples} answers {entry.report.answer_agreement:.1%} as before"
        + (f", kept tokens (Jaccard) {kept}" if kept else "")
    )


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
        if site.keep_share is not None:
            kept = f"{site.keep_share:.1%} of its tokens"
        elif site.keep_per_image is None:
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
    table.add_row("KV cache", "", "", format_bytes(full), format_bytes(left), _percent(left, full))
    full, left = prefill.unpruned_activation_bytes, prefill.pruned_activation_bytes
    table.add_row("peak activation", "", "", format_bytes(full), format_bytes(left), _percent(left, full))
    return table


def _cost_note(inspection: Inspection) -> str:
    prefill = inspection.prefill
    average = f"{prefill.average_visual_tokens:.1f} visual tokens in a decoder layer on average"
    if prefill.counts == BOUND:
        return f"Unpruned bound, {average}:\nhow many tokens are kept depends on the input."
    return f"{average}; kept tokens are calibration means." if prefill.counts == CALIBRATED else f"{average}."


def _layers(group: GroupCost) -> str:
    if group.layers == group.mlp_layers:
        # None where a site lies before layer 0.
        return _span(group.layers) or "none"
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
        table.add_row(graph.name, format_bytes(graph.graph_bytes), format_bytes(graph.data_bytes), *parity)
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
    return format_count(before), format_count(after), _percent(after, before)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
