"""A profile as one HTML page that needs nothing else: no script, no font, no request."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from edgeprune.quantities import format_bytes, format_count, format_milliseconds, format_share
from edgeprune.runtimes.profiling.figure import Figure, bundle_legend
from edgeprune.runtimes.profiling.knee_figures import measured_knee, predicted_bars, predicted_knee
from edgeprune.runtimes.profiling.machine_peak import MachinePeak
from edgeprune.runtimes.profiling.report import ComparisonEntry, ProfileReport
from edgeprune.runtimes.profiling.saving_figures import kept_histograms, savings, tokens_per_layer
from edgeprune.runtimes.profiling.terminal import headline
from edgeprune.runtimes.profiling.time_figures import decode_steps, first_token_bars, latency_dots, timeline

_OVERLAY_WIDTH = 1400


@dataclass(frozen=True)
class Tile:
    """One number of the page's top.

    Attributes:
        name: What it is.
        value: With its unit.
        detail: What to compare it with.
        share: 0 … 1, drawn as a bar; None = no bar.
    """

    name: str
    value: str
    detail: str
    share: float | None = None


@dataclass(frozen=True)
class Overlay:
    """A picture with its kept tokens.

    Attributes:
        title: Which picture.
        data: The image, base64.
    """

    title: str
    data: str


def render_page(report: ProfileReport, overlays: Sequence[tuple[str, Image.Image]] = ()) -> str:
    """The page.

    Args:
        report: The numbers.
        overlays: Titles and pictures.
    """
    environment = Environment(
        loader=PackageLoader("edgeprune.runtimes.profiling", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.loader.get_source(environment, "style.css")[0] if environment.loader else ""
    return environment.get_template("profile.html.jinja").render(
        report=report,
        headline=headline(report),
        style=style,
        tiles=tiles(report),
        legend=bundle_legend(report),
        measured=measured_figures(report),
        predicted=predicted_figures(report),
        overlays=[Overlay(title, _base64(image)) for title, image in overlays],
        facts=facts(report),
    )


def measured_figures(report: ProfileReport) -> tuple[Figure, ...]:
    """In the order of the page; those that the report has numbers for."""
    figures = [first_token_bars(report)]
    if report.comparisons:
        figures.append(savings(report))
    figures.append(tokens_per_layer(report))
    if any(bundle.sites for bundle in report.bundles):
        figures.append(kept_histograms(report))
    figures += [timeline(report), latency_dots(report)]
    if any(bundle.decode_steps for bundle in report.bundles):
        figures.append(decode_steps(report))
    knee = measured_knee(report)
    return (*figures, *([] if knee is None else [knee]))


def predicted_figures(report: ProfileReport) -> tuple[Figure, ...]:
    """Two for each target."""
    return tuple(
        figure
        for prediction in report.predictions
        for figure in (predicted_bars(prediction), predicted_knee(report, prediction))
    )


def tiles(report: ProfileReport) -> tuple[Tile, ...]:
    """The numbers that people look for first."""
    first, *others = report.bundles
    by_scope = {
        entry.scope: entry for entry in report.comparisons if others and entry.against == others[0].name
    }
    found = [
        Tile(
            "time to first token",
            f"{format_milliseconds(first.first_token_ms.p50)} ms",
            _left(by_scope.get("first token")) or f"p95 {format_milliseconds(first.first_token_ms.p95)} ms",
        ),
        Tile(
            "prefill of the decoder",
            f"{format_milliseconds(first.prefill_ms.p50)} ms",
            _left(by_scope.get("prefill")) or f"p95 {format_milliseconds(first.prefill_ms.p95)} ms",
        ),
    ]
    prefill = by_scope.get("prefill")
    if prefill is not None and prefill.saving_efficiency is not None:
        found.append(
            Tile(
                "saving efficiency",
                format_share(prefill.saving_efficiency),
                "of the saved FLOPs of prefill became saved time",
                min(1.0, max(0.0, prefill.saving_efficiency)),
            )
        )
    if first.tokens_per_second is not None:
        detail = (
            f"{others[0].name}: {others[0].tokens_per_second:.1f}"
            if others and others[0].tokens_per_second
            else "behind the first"
        )
        found.append(Tile("tokens per second", f"{first.tokens_per_second:.1f}", detail))
    whole = first.runs[0].entering if not others else others[0].average_visual_tokens
    found.append(
        Tile(
            "visual tokens in a layer",
            f"{first.average_visual_tokens:.1f}",
            f"of {whole:.0f}",
            min(1.0, first.average_visual_tokens / whole) if whole else None,
        )
    )
    cache = f"{others[0].name}: {format_bytes(others[0].memory.kv_cache)}" if others else "after prefill"
    found.append(Tile("KV cache", format_bytes(first.memory.kv_cache), cache))
    if first.energy is not None:
        detail = f"{first.energy.watts:.1f} W of the whole board"
        found.append(Tile("energy of a token", f"{first.energy.joules_per_token:.2f} J", detail))
    return tuple(found)


def facts(report: ProfileReport) -> tuple[tuple[str, str], ...]:
    """How and where it was measured."""
    machine, settings = report.machine, report.settings
    found = [
        ("measured", f"{report.created} with edgeprune {report.edgeprune_version}"),
        ("machine", ", ".join(part for part in (machine.board, machine.processor, machine.system) if part)),
        ("cores", f"{machine.cores}, threads of an operator: {settings.threads or 'chosen by the runtime'}"),
        ("runtime", settings.backend),
    ]
    found += list(report.board_state.items())
    if report.peak is not None:
        found.append(("its best", _peak_text(report.peak)))
    found.append(
        (
            "runs",
            f"{settings.runs} after {settings.warmup} of warm-up, bundles in turns, order turned around every round",
        )
    )
    left = f", {settings.left_out} more left out" if settings.left_out else ""
    found.append(
        ("prompts", f"{len(settings.prompts)} {settings.samples}{left}: {', '.join(settings.prompts)}")
    )
    found.append(("answers", f"{settings.max_new_tokens} tokens each, also behind the model's end"))
    for bundle in report.bundles:
        memory = bundle.memory
        text = f"{bundle.dtype}, weights {format_bytes(memory.weights)}"
        if memory.host_peak is not None:
            text += f", host memory at most {format_bytes(memory.host_peak)}"
        if memory.device_peak is not None:
            text += f", device memory {format_bytes(memory.device_peak)}"
        if bundle.energy is not None:
            text += f", {bundle.energy.watts:.1f} W, {bundle.energy.joules_per_token:.2f} J per token"
        found.append((bundle.name, text))
    return tuple(found)


def _peak_text(peak: MachinePeak) -> str:
    return (
        f"{format_count(peak.flops_per_second)}FLOP/s ({peak.dtype} product of {peak.matrix_size} × "
        f"{peak.matrix_size}), {format_bytes(peak.bytes_per_second)}/s copied"
    )


def _left(entry: ComparisonEntry | None) -> str:
    if entry is None:
        return ""
    time, flops = format_share(entry.time_ratio.p50), format_share(entry.flops_ratio)
    return f"{time} of {entry.against}, with {flops} of its FLOPs"


def _base64(image: Image.Image) -> str:
    if image.width > _OVERLAY_WIDTH:
        height = round(image.height * _OVERLAY_WIDTH / image.width)
        image = image.resize((_OVERLAY_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=82, method=4)
    return base64.b64encode(stream.getvalue()).decode("ascii")
