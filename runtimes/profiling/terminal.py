"""A profile as tables that fit a terminal of 100 columns; legible without colours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from edgeprune.quantities import format_bytes, format_count, format_milliseconds, format_share
from edgeprune.runtimes.profiling.report import (
    BundleEntry,
    PredictionEntry,
    ProfileReport,
    StageEntry,
)
from edgeprune.runtimes.profiling.summary import Histogram, Summary

_BLOCKS = "▁▂▃▄▅▆▇█"


def render_profile(report: ProfileReport) -> RenderableType:
    """The gist first, then stage by stage."""
    parts: list[RenderableType] = [Text(headline(report), style="bold"), Text(machine_line(report)), Text()]
    parts.append(_overview(report))
    if report.comparisons:
        parts += [Text(), _savings(report)]
    for bundle in report.bundles:
        parts += [Text(), _stages(bundle)]
    for bundle in report.bundles:
        if bundle.sites:
            parts += [Text(), _sites(bundle)]
    for prediction in report.predictions:
        parts += [Text(), _prediction(prediction), Text(knee_line(prediction))]
    if report.notes:
        parts.append(Text())
    parts += [Text(f"Note: {note}") for note in report.notes]
    return Group(*parts)


def headline(report: ProfileReport) -> str:
    """What was compared with what, in words."""
    first, *others = report.bundles
    methods = " + ".join(first.methods) if first.methods else "unpruned"
    against = f" against {', '.join(bundle.name for bundle in others)}" if others else ""
    return f"Profile of {first.name} ({methods}){against}"


def machine_line(report: ProfileReport) -> str:
    """Where and how it was measured."""
    machine, settings = report.machine, report.settings
    where = machine.board or machine.processor
    peak = ""
    if report.peak is not None:
        peak = (
            f"; its best: {format_count(report.peak.flops_per_second)}FLOP/s in {report.peak.dtype}, "
            f"{format_bytes(report.peak.bytes_per_second)}/s copied"
        )
    board = "".join(f", {name} {value}" for name, value in report.board_state.items())
    return (
        f"{report.created}, {where}, {machine.cores} cores, {settings.backend}{board}{peak}.\n"
        f"{settings.runs} runs in turns after {settings.warmup} of warm-up, {len(settings.prompts)} "
        f"{settings.samples} prompts, {settings.max_new_tokens} tokens each."
    )


def knee_line(prediction: PredictionEntry) -> str:
    """Where pruning stops to pay on a target."""
    first = prediction.bundles[0]
    below = [
        stage.name.removeprefix("prefill.")
        for stage in first.stages
        if stage.name.startswith("prefill.") and stage.bound == "memory"
    ]
    line = f"Knee: {prediction.knee_tokens:.0f} tokens; with fewer, prefill only reads {prediction.precision} weights"
    line += f" ({', '.join(below)} of {first.name})." if below else "."
    if below and prediction.int4_knee_tokens is not None and prediction.precision != "int4":
        line += f" Narrower weights pay there: with int4 it is {prediction.int4_knee_tokens:.0f}."
    return line


@dataclass(frozen=True)
class _Row:
    """A row of the overview.

    Attributes:
        name: What it is.
        read: From a bundle.
        write: A value.
        scope: The comparison that has its ratio; empty = own value by the other's.
    """

    name: str
    read: Callable[[BundleEntry], float | None]
    write: Callable[[float], str]
    scope: str = ""


_ROWS = (
    _Row("time to first token, p50 ms", lambda b: b.first_token_ms.p50, format_milliseconds, "first token"),
    _Row("time to first token, p95 ms", lambda b: b.first_token_ms.p95, format_milliseconds),
    _Row("prefill of the decoder, p50 ms", lambda b: b.prefill_ms.p50, format_milliseconds, "prefill"),
    _Row(
        "decode step, p50 ms",
        lambda b: b.decode_ms.p50 if b.decode_ms else None,
        format_milliseconds,
        "decode",
    ),
    _Row("tokens per second", lambda b: b.tokens_per_second, lambda value: f"{value:.1f}"),
    _Row("visual tokens in a layer", lambda b: b.average_visual_tokens, lambda value: f"{value:.1f}"),
    _Row("FLOPs to the first token", lambda b: b.flops, format_count),
    _Row("KV cache after prefill", lambda b: b.memory.kv_cache, format_bytes),
    _Row("weights", lambda b: b.memory.weights, format_bytes),
    _Row("peak of host memory", lambda b: b.memory.host_peak, format_bytes),
    _Row("peak of device memory", lambda b: b.memory.device_peak, format_bytes),
    _Row(
        "energy of a token, J",
        lambda b: b.energy.joules_per_token if b.energy else None,
        lambda value: f"{value:.2f}",
    ),
    _Row("power, W", lambda b: b.energy.watts if b.energy else None, lambda value: f"{value:.1f}"),
)


def _overview(report: ProfileReport) -> Table:
    others = report.bundles[1:]
    columns = [bundle.name for bundle in report.bundles]
    table = _table("", *columns, *([f"of {others[0].name}"] if others else []), title="")
    ratios = {
        entry.scope: entry.time_ratio.p50
        for entry in report.comparisons
        if others and entry.against == others[0].name
    }
    for row in _ROWS:
        values = [row.read(bundle) for bundle in report.bundles]
        if all(value is None for value in values):
            continue
        cells = ["-" if value is None else row.write(value) for value in values]
        if others:
            own, other = values[0], values[1]
            quotient = own / other if own is not None and other else None
            ratio = ratios.get(row.scope, quotient)
            cells.append("-" if ratio is None else format_share(ratio))
        table.add_row(row.name, *cells)
    return table


def _savings(report: ProfileReport) -> Table:
    title = "What pruning saved (ratios within a round; 100 % = every FLOP saved became time)"
    table = _table(
        "against", "of", "FLOPs left", "time left", "min … p95", "roofline", "saving efficiency", title=title
    )
    for entry in report.comparisons:
        predicted = entry.predicted_time_ratio
        table.add_row(
            entry.against,
            entry.scope,
            format_share(entry.flops_ratio),
            format_share(entry.time_ratio.p50),
            f"{entry.time_ratio.min:.2f} … {entry.time_ratio.p95:.2f}",
            "-" if predicted is None else format_share(predicted),
            "-" if entry.saving_efficiency is None else format_share(entry.saving_efficiency),
        )
    return table


def _stages(bundle: BundleEntry) -> Table:
    table = _table(
        "stage",
        "min",
        "p50",
        "p95",
        "p99",
        "FLOPs",
        "of peak",
        "moved",
        "of copy",
        "roofline",
        title=f"Stages of {bundle.name}, ms",
    )
    for stage in bundle.stages:
        if stage.name == "decode":
            table.add_section()
        table.add_row(Text(_stage_name(stage)), *_times(stage.milliseconds), *_costs(stage))
    return table


def _stage_name(stage: StageEntry) -> str:
    name = stage.name.removeprefix("decode.") if stage.nested else stage.name
    if stage.name == "host":
        name = "rest of the host"
    return f"  {name}" if stage.nested else "decode step" if name == "decode" else name


def _times(summary: Summary) -> tuple[str, str, str, str]:
    low, middle, high, highest = (
        format_milliseconds(value) for value in (summary.min, summary.p50, summary.p95, summary.p99)
    )
    return low, middle, high, highest


def _costs(stage: StageEntry) -> tuple[str, ...]:
    flops = "" if stage.flops is None else format_count(stage.flops)
    moved = "" if stage.bytes is None else format_bytes(stage.bytes)
    if stage.roofline is None:
        return flops, "", moved, "", ""
    roofline = stage.roofline
    return (
        flops,
        format_share(roofline.flops_share),
        moved,
        format_share(roofline.bandwidth_share),
        format_share(roofline.efficiency),
    )


def _sites(bundle: BundleEntry) -> Table:
    table = _table(
        "site",
        "place",
        "tokens in",
        "kept",
        "p50",
        "p95",
        "distribution",
        title=f"Tokens kept by {bundle.name}",
    )
    for site in bundle.sites:
        table.add_row(
            site.name,
            site.place,
            f"{site.tokens_in.mean:.1f}",
            f"{site.kept.mean:.1f}",
            f"{site.kept.p50:.0f}",
            f"{site.kept.p95:.0f}",
            sparkline(site.histogram),
        )
    return table


def sparkline(histogram: Histogram) -> str:
    """Counts as blocks between the least and the greatest value."""
    most = max(histogram.counts)
    blocks = "".join(
        " " if not count else _BLOCKS[(len(_BLOCKS) - 1) * count // most] for count in histogram.counts
    )
    if len(histogram.counts) == 1 and histogram.edges[1] - histogram.edges[0] == 1:
        return f"always {histogram.edges[0]}"
    return f"{histogram.edges[0]} {blocks} {histogram.edges[-1] - 1}"


def _prediction(prediction: PredictionEntry) -> Table:
    title = (
        f"Predicted, not measured: {prediction.title}, {prediction.precision}, data sheet "
        f"({prediction.flops_per_second / 1e12:g} TFLOP/s, {prediction.bytes_per_second / 1e9:g} GB/s); least times"
    )
    table = _table("stage", *(bundle.name for bundle in prediction.bundles), title=title)
    names = list(dict.fromkeys(stage.name for bundle in prediction.bundles for stage in bundle.stages))
    for name in names:
        cells: list[str] = []
        for bundle in prediction.bundles:
            stage = next((stage for stage in bundle.stages if stage.name == name), None)
            cells.append(
                ""
                if stage is None
                else f"{format_milliseconds(stage.milliseconds)} ms, {stage.tokens:.0f} tokens, {stage.bound}"
            )
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("first token", *(f"{format_milliseconds(b.first_token_ms)} ms" for b in prediction.bundles))
    table.add_row(
        "decode step",
        *(
            "-" if b.decode_ms is None else f"{format_milliseconds(b.decode_ms)} ms"
            for b in prediction.bundles
        ),
    )
    return table


def _table(
    *columns: str, title: str, left: Sequence[str] = ("stage", "site", "place", "against", "of")
) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if not index or column in left else "right"
        table.add_column(column, justify=justify, no_wrap=not index, overflow="fold")
    return table
