"""Figures about time: by stage, along an answer, from run to run, from step to step."""

from edgeprune.quantities import format_bytes, format_count, format_milliseconds, format_share
from edgeprune.runtimes.profiling.figure import (
    GROUP_TITLES,
    WIDTH,
    Figure,
    bundle_legend,
    colour,
    horizontal_axis,
)
from edgeprune.runtimes.profiling.report import BundleEntry, ProfileReport, StageEntry
from edgeprune.runtimes.profiling.svg import Svg, tick_text, ticks

_NAMES = 150.0  # room for the names of bundles


def first_token_bars(report: ProfileReport) -> Figure:
    """What the time to the first token is made of, one bar per bundle."""
    shown = {
        bundle.name: [stage for stage in bundle.stages if not stage.nested and stage.group != "decode"]
        for bundle in report.bundles
    }
    longest = max(sum(stage.milliseconds.mean for stage in stages) for stages in shown.values())
    bar, gap = 40.0, 34.0
    height = 26 + len(shown) * (bar + gap) + 18
    svg = Svg(WIDTH, height, "Mean milliseconds of every stage up to the first token, as bars")
    scale = horizontal_axis(svg, 0, longest, height - 30, "ms")
    for index, (bundle, stages) in enumerate(zip(report.bundles, shown.values(), strict=True)):
        y = 30 + index * (bar + gap)
        svg.text(
            scale(0),
            y - 8,
            f"{bundle.name} · {format_milliseconds(bundle.first_token_ms.mean)} ms",
            "strong",
        )
        x = 0.0
        for stage in stages:
            left, right = scale(x), scale(x + stage.milliseconds.mean)
            x += stage.milliseconds.mean
            title = f"{stage.name}: {format_milliseconds(stage.milliseconds.mean)} ms"
            svg.rect(left, y, max(0.0, right - left - 1), bar, f"g-{stage.group}", title, radius=2)
            short = stage.name.removeprefix("prefill.")
            if right - left > 7.2 * len(short) + 8:
                svg.text((left + right) / 2, y + bar / 2 + 4, short, "inside", "middle")
    groups = list(dict.fromkeys(stage.group for stages in shown.values() for stage in stages))
    return Figure(
        name="stages",
        title="Where the time to the first token goes",
        caption="Means over the runs, so that the stages add up to the whole; medians and tails are in the table.",
        drawing=svg.markup(),
        legend=tuple((f"g-{group}", GROUP_TITLES[group]) for group in groups),
        columns=(
            "bundle",
            "stage",
            "min ms",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "mean ms",
            "FLOPs",
            "of peak",
            "moved",
            "of copy rate",
            "roofline ms",
            "roofline efficiency",
        ),
        rows=tuple(_stage_row(bundle, stage) for bundle in report.bundles for stage in bundle.stages),
    )


def _stage_row(bundle: BundleEntry, stage: StageEntry) -> tuple[str, ...]:
    times = stage.milliseconds
    name = f"{stage.name} (part of another)" if stage.nested else stage.name
    cells = [
        bundle.name,
        name,
        *(_ms(value) for value in (times.min, times.p50, times.p95, times.p99, times.mean)),
    ]
    cells += ["" if stage.flops is None else format_count(stage.flops)]
    roofline = stage.roofline
    cells += [
        "" if roofline is None else format_share(roofline.flops_share),
        "" if stage.bytes is None else format_bytes(stage.bytes),
        "" if roofline is None else format_share(roofline.bandwidth_share),
        "" if roofline is None else f"{_ms(roofline.milliseconds)} ({roofline.bound})",
        "" if roofline is None else format_share(roofline.efficiency),
    ]
    return tuple(cells)


def timeline(report: ProfileReport) -> Figure:
    """The answer whose time to the first token is the median, span by span."""
    lane, gap = 30.0, 40.0
    spans = {
        bundle.name: [
            span for span in bundle.timeline if span.depth == 1 or (span.depth == 0 and span.name == "decode")
        ]
        for bundle in report.bundles
    }
    end = max(span.end_ms for own in spans.values() for span in own)
    height = 26 + len(spans) * (lane + gap) + 16
    svg = Svg(WIDTH, height, "One answer of every bundle on a time axis")
    scale = horizontal_axis(svg, 0, end, height - 30, "ms since the question")
    rows: list[tuple[str, ...]] = []
    for index, (bundle, own) in enumerate(zip(report.bundles, spans.values(), strict=True)):
        y = 30 + index * (lane + gap)
        svg.text(scale(0), y - 8, bundle.name, "strong")
        svg.rect(scale(0), y, scale(end) - scale(0), lane, "lane", radius=3)
        groups = {stage.name: stage.group for stage in bundle.stages}
        for span in own:
            if span.depth == 1 and any(
                step.name == "decode" and step.start_ms <= span.start_ms < step.end_ms for step in own
            ):
                continue
            group = groups.get(span.name, "host")
            width = max(0.6, scale(span.end_ms) - scale(span.start_ms) - 0.4)
            title = f"{span.name}: {format_milliseconds(span.milliseconds)} ms"
            svg.rect(scale(span.start_ms), y, width, lane, f"g-{group}", title)
            rows.append((bundle.name, span.name, _ms(span.start_ms), _ms(span.milliseconds)))
        first = next(span for span in bundle.timeline if span.name == "time_to_first_token")
        x = scale(first.end_ms)
        svg.line(x, y - 4, x, y + lane + 4, "mark")
        if x + 60 < WIDTH:
            svg.text(x + 4, y - 8, f"first token, {format_milliseconds(first.end_ms)} ms", "label")
        else:
            svg.text(x - 4, y - 8, f"first token, {format_milliseconds(first.end_ms)} ms", "label", "end")
    used = list(dict.fromkeys(stage.group for bundle in report.bundles for stage in bundle.stages))
    return Figure(
        name="timeline",
        title="One answer, from the question to the last token",
        caption="The run whose time to the first token is the median. Behind the mark: one block per decode step.",
        drawing=svg.markup(),
        legend=tuple((f"g-{group}", GROUP_TITLES[group]) for group in used),
        columns=("bundle", "span", "start ms", "duration ms"),
        rows=tuple(rows),
    )


def latency_dots(report: ProfileReport) -> Figure:
    """Every run's time to the first token."""
    lane = 58.0
    height = 20 + lane * len(report.bundles) + 40
    values = [run.first_token_ms for bundle in report.bundles for run in bundle.runs]
    low, high = min(values), max(values)
    margin = max(0.04 * (high - low), 0.01 * high)
    svg = Svg(WIDTH, height, "Time to the first token of every run, as dots")
    scale = horizontal_axis(
        svg, max(0.0, low - margin), high + margin, height - 30, "ms to the first token", _NAMES
    )
    for index, bundle in enumerate(report.bundles):
        middle = 20 + lane * (index + 0.5)
        svg.text(_NAMES - 12, middle + 4, _shortened(bundle.name, 16), "strong", "end")
        for run in bundle.runs:
            # Spread by the round, so that runs of equal time do not hide each other.
            y = middle + (run.round * 7 % 11 - 5) * 1.9
            svg.circle(
                scale(run.first_token_ms),
                y,
                4,
                f"dot {colour(index)}",
                f"run {run.round + 1}: {_ms(run.first_token_ms)} ms",
            )
        for value, name in ((bundle.first_token_ms.p50, "p50"), (bundle.first_token_ms.p95, "p95")):
            svg.line(scale(value), middle - 20, scale(value), middle + 18, "mark")
            svg.text(scale(value), middle - 22, name, "label", "middle")
    return Figure(
        name="latency",
        title="How steady it is",
        caption="One dot per run.",
        drawing=svg.markup(),
        legend=(),
        columns=("bundle", "run", "prompt", "first token ms", "prefill ms", "whole answer ms"),
        rows=tuple(
            (
                bundle.name,
                str(run.round + 1),
                report.settings.prompts[run.prompt],
                _ms(run.first_token_ms),
                _ms(run.prefill_ms),
                _ms(run.total_ms),
            )
            for bundle in report.bundles
            for run in bundle.runs
        ),
    )


def decode_steps(report: ProfileReport) -> Figure:
    """Milliseconds of every decode step."""
    height, top, bottom, left = 250.0, 16.0, 44.0, 58.0
    right = WIDTH - 24.0
    steps = max(len(bundle.decode_steps) for bundle in report.bundles)
    most = max(step.p95 for bundle in report.bundles for step in bundle.decode_steps)
    svg = Svg(WIDTH, height, "Milliseconds of every decode step")

    def place(step: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step + 0.5) / steps
        return x, height - bottom - (height - top - bottom) * value / most

    for value in ticks(0, most):
        y = place(0, value)[1]
        svg.line(left, y, right, y, "grid")
        svg.text(left - 8, y + 4, tick_text(value), "label", "end")
    every = -(-steps // 16)
    for step in range(0, steps, every):
        svg.text(place(step, 0)[0], height - bottom + 18, str(step + 1), "label", "middle")
    svg.text((left + right) / 2, height - 6, "decode step", "label", "middle")
    for index, bundle in reversed(list(enumerate(report.bundles))):
        upper = [place(step, entry.p95) for step, entry in enumerate(bundle.decode_steps)]
        lower = [place(step, entry.min) for step, entry in enumerate(bundle.decode_steps)]
        svg.polyline([*upper, *reversed(lower)], f"band {colour(index)}", closed=True)
        middle = [place(step, entry.p50) for step, entry in enumerate(bundle.decode_steps)]
        svg.polyline(middle, f"curve {colour(index)}")
        for x, y in middle if steps <= 40 else ():
            svg.circle(x, y, 2.5, f"fill {colour(index)}")
    return Figure(
        name="decode",
        title="Every decode step",
        caption="Median in milliseconds; the band reaches from the fastest run to p95.",
        drawing=svg.markup(),
        legend=bundle_legend(report),
        columns=("bundle", "step", "min ms", "p50 ms", "p95 ms", "p99 ms"),
        rows=tuple(
            (bundle.name, str(index + 1), _ms(step.min), _ms(step.p50), _ms(step.p95), _ms(step.p99))
            for bundle in report.bundles
            for index, step in enumerate(bundle.decode_steps)
        ),
    )


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _ms(value: float) -> str:
    return format_milliseconds(value)
