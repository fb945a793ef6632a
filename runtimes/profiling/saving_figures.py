"""Figures about what pruning saves and where it drops tokens."""

from edgeprune.quantities import format_share
from edgeprune.runtimes.profiling.figure import WIDTH, Figure, bundle_legend, colour, horizontal_axis
from edgeprune.runtimes.profiling.report import ProfileReport
from edgeprune.runtimes.profiling.svg import Svg, tick_text, ticks

_NAMES = 136.0  # room for the names of bars


def savings(report: ProfileReport) -> Figure:
    """Operations left, beside the time left and what the roofline allows."""
    entries = [entry for entry in report.comparisons if entry.scope != "decode"]
    bar, gap = 15.0, 26.0
    rows_of: list[tuple[str, list[tuple[str, float, str]]]] = []
    for entry in entries:
        bars = [("FLOPs left", entry.flops_ratio, "s-flops")]
        if entry.predicted_time_ratio is not None:
            bars.append(("time left, roofline", entry.predicted_time_ratio, "s-roofline"))
        bars.append(("time left, measured", entry.time_ratio.p50, "s-time"))
        efficiency = "" if entry.saving_efficiency is None else format_share(entry.saving_efficiency)
        rows_of.append(
            (f"{entry.scope}, against {entry.against} · saving efficiency {efficiency or '–'}", bars)
        )
    height = 26 + sum(22 + len(bars) * (bar + 3) + gap for _, bars in rows_of) + 10
    most = max(1.0, *(value for _, bars in rows_of for _, value, _ in bars))
    svg = Svg(WIDTH, height, "FLOPs and time that pruning leaves, in per cent of the other bundle")
    scale = horizontal_axis(svg, 0, 100 * most, height - 30, "% of the other bundle", _NAMES)
    y = 24.0
    for title, bars in rows_of:
        svg.text(_NAMES, y, title, "strong")
        y += 8
        for name, value, kind in bars:
            svg.text(_NAMES - 8, y + bar - 3, name, "label", "end")
            svg.rect(
                scale(0), y, scale(100 * value) - scale(0), bar, kind, f"{name}: {format_share(value)}", 2
            )
            x = scale(100 * value)
            if x + 50 < WIDTH:
                svg.text(x + 5, y + bar - 3, format_share(value), "label")
            else:
                svg.text(x - 5, y + bar - 3, format_share(value), "inside", "end")
            y += bar + 3
        y += gap
    return Figure(
        name="savings",
        title="What became of the saved FLOPs",
        caption="Saving efficiency is (1 − time left) / (1 − FLOPs left): at 100 % every saved operation became saved "
        "time. Times are compared within a round, so a machine that slows down slows both.",
        drawing=svg.markup(),
        legend=(
            ("s-flops", "FLOPs left"),
            ("s-roofline", "time left at this machine's peak rates"),
            ("s-time", "time left, measured"),
        ),
        columns=(
            "against",
            "of",
            "FLOPs left",
            "time left, median",
            "least",
            "p95",
            "roofline",
            "saving efficiency",
        ),
        rows=tuple(
            (
                entry.against,
                entry.scope,
                format_share(entry.flops_ratio),
                format_share(entry.time_ratio.p50),
                format_share(entry.time_ratio.min),
                format_share(entry.time_ratio.p95),
                "" if entry.predicted_time_ratio is None else format_share(entry.predicted_time_ratio),
                "–" if entry.saving_efficiency is None else format_share(entry.saving_efficiency),
            )
            for entry in report.comparisons
        ),
    )


def tokens_per_layer(report: ProfileReport) -> Figure:
    """Visual tokens that enter every decoder layer."""
    height, top, bottom = 300.0, 18.0, 44.0
    layers = len(report.bundles[0].layers)
    most = max(1, *(layer.max for bundle in report.bundles for layer in bundle.layers))
    svg = Svg(WIDTH, height, "Visual tokens by decoder layer")
    left, right = 58.0, WIDTH - 24.0
    step = (right - left) / layers

    def y_of(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / most

    marks = ticks(0, most)
    for value in [*marks, *([most] if most - marks[-1] > 0.15 * most else [])]:
        svg.line(left, y_of(value), right, y_of(value), "grid")
        svg.text(left - 8, y_of(value) + 4, tick_text(value), "label", "end")
    every = -(-layers // 16)
    for layer in range(0, layers, every):
        svg.text(left + (layer + 0.5) * step, height - bottom + 18, str(layer), "label", "middle")
    svg.text((left + right) / 2, height - 6, "decoder layer", "label", "middle")
    for index, bundle in reversed(list(enumerate(report.bundles))):
        kind = colour(index)
        edges = [(left + layer * step, left + (layer + 1) * step) for layer in range(layers)]
        upper = [(x, y_of(e.max)) for e, pair in zip(bundle.layers, edges, strict=True) for x in pair]
        lower = [(x, y_of(e.min)) for e, pair in zip(bundle.layers, edges, strict=True) for x in pair]
        svg.polyline([*upper, *reversed(lower)], f"band {kind}", closed=True)
        middle = [(x, y_of(e.mean)) for e, pair in zip(bundle.layers, edges, strict=True) for x in pair]
        svg.polyline(middle, f"curve {kind}")
    return Figure(
        name="layers",
        title="Visual tokens, layer by layer",
        caption="Mean over the runs; the band reaches from the run with the fewest to the one with the most.",
        drawing=svg.markup(),
        legend=bundle_legend(report),
        columns=("bundle", "layer", "min", "mean", "max"),
        rows=tuple(
            (bundle.name, str(index), str(layer.min), f"{layer.mean:.1f}", str(layer.max))
            for bundle in report.bundles
            for index, layer in enumerate(bundle.layers)
        ),
    )


def kept_histograms(report: ProfileReport) -> Figure:
    """How many tokens the sites kept, as small histograms."""
    sites = [(index, bundle, site) for index, bundle in enumerate(report.bundles) for site in bundle.sites]
    columns = min(3, len(sites))
    width, panel = WIDTH / columns, 190.0
    height = -(-len(sites) // columns) * panel
    svg = Svg(WIDTH, height, "Histograms of the tokens that every site kept")
    rows: list[tuple[str, ...]] = []
    for number, (index, bundle, site) in enumerate(sites):
        x0, y0 = number % columns * width + 12, number // columns * panel
        inner, base = width - 36, y0 + panel - 42
        edges, counts = site.histogram.edges, site.histogram.counts
        bar = inner / len(counts)
        svg.text(x0, y0 + 18, f"{bundle.name} · {site.name}", "strong")
        svg.text(
            x0,
            y0 + 35,
            f"{site.place}: {tick_text(round(site.kept.mean, 1))} of {tick_text(round(site.tokens_in.mean, 1))}",
            "label",
        )
        for position, count in enumerate(counts):
            tall = (base - y0 - 48) * count / max(counts)
            low, high = edges[position], edges[position + 1] - 1
            span = str(low) if low == high else f"{low} to {high}"
            svg.rect(
                x0 + position * bar + 1,
                base - tall,
                min(bar - 2, 64),
                tall,
                f"fill {colour(index)}",
                f"{span}: {count} runs",
                2,
            )
            rows.append((bundle.name, site.name, span, str(count)))
        svg.line(x0, base, x0 + inner, base, "axis")
        svg.text(x0, base + 16, str(edges[0]), "label")
        if len(counts) > 1:
            svg.text(x0 + inner, base + 16, str(edges[-1] - 1), "label", "end")
    return Figure(
        name="kept",
        title="Tokens kept at every site",
        caption="Runs by the number of visual tokens that left the site.",
        drawing=svg.markup(),
        legend=(),
        columns=("bundle", "site", "tokens kept", "runs"),
        rows=tuple(rows),
    )
