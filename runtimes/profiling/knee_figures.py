"""The figures about what a machine could do: measured beside its roofline, and predicted for others."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from edgeprune.quantities import format_bytes, format_count, format_milliseconds, format_share
from edgeprune.roofline import MEMORY
from edgeprune.runtimes.profiling.figure import GROUP_TITLES, WIDTH, Figure, bundle_legend, colour
from edgeprune.runtimes.profiling.report import BundleEntry, PredictionEntry, ProfileReport
from edgeprune.runtimes.profiling.svg import Svg, tick_text, ticks

_LEFT, _RIGHT = 62.0, 24.0
_TOP, _BOTTOM, _HEIGHT = 22.0, 48.0, 340.0


def measured_knee(report: ProfileReport) -> Figure | None:
    """Segments beside the least time that this machine's peak rates allow; None without a peak."""
    if report.peak is None or report.knee_tokens is None:
        return None
    points: list[tuple[int, str, float, float]] = []
    rows: list[tuple[str, ...]] = []
    for index, bundle in enumerate(report.bundles):
        for segment, stage in enumerate(s for s in bundle.stages if s.name.startswith("prefill.")):
            if stage.roofline is None or stage.roofline.bandwidth_share <= 0:
                continue
            tokens = _segment_rows(bundle, segment)
            # Time by the time of moving the stage's bytes once.
            points.append((index, f"{bundle.name}, {stage.name}", tokens, 1 / stage.roofline.bandwidth_share))
            rows.append(
                (
                    bundle.name,
                    stage.name,
                    f"{tokens:.0f}",
                    format_milliseconds(stage.milliseconds.p50),
                    format_milliseconds(stage.roofline.milliseconds),
                    stage.roofline.bound,
                    format_share(stage.roofline.efficiency),
                )
            )
    if not points:
        return None
    return Figure(
        name="roofline",
        title="What this machine could do",
        caption=f"A dot is a segment's prefill; the line is the least time at this machine's best "
        f"({format_count(report.peak.flops_per_second)}FLOP/s, {format_bytes(report.peak.bytes_per_second)}/s). Left "
        f"of the knee, at {report.knee_tokens:.0f} tokens, prefill only reads weights and dropping tokens saves "
        "nothing; how far a dot is above the line is what the runtime leaves unused.",
        drawing=_chart(report.knee_tokens, None, points),
        legend=bundle_legend(report),
        columns=("bundle", "stage", "rows", "p50 ms", "roofline ms", "bound by", "roofline efficiency"),
        rows=tuple(rows),
    )


def predicted_knee(report: ProfileReport, prediction: PredictionEntry) -> Figure:
    """Segments on a target's roofline."""
    points = [
        (index, f"{bundle.name}, {stage.name}", stage.tokens, max(1.0, stage.tokens / prediction.knee_tokens))
        for index, bundle in enumerate(prediction.bundles)
        for stage in bundle.stages
        if stage.name.startswith("prefill.")
    ]
    narrower = ""
    int4 = None if prediction.precision == "int4" else prediction.int4_knee_tokens
    if int4 is not None:
        narrower = (
            f" With int4 weights (dashed) the knee is at {int4:.0f}: in between, narrower weights save more than fewer "
            "tokens."
        )
    return Figure(
        name=f"knee-{prediction.target}",
        title=f"Predicted: the knee of {prediction.title}",
        caption=f"From the data sheet ({prediction.flops_per_second / 1e12:g} TFLOP/s in {prediction.precision}, "
        f"{prediction.bytes_per_second / 1e9:g} GB/s), nothing measured. Below {prediction.knee_tokens:.0f} tokens a "
        f"segment's prefill only reads its weights.{narrower}",
        drawing=_chart(prediction.knee_tokens, int4, points),
        legend=bundle_legend(report),
        columns=_COLUMNS,
        rows=_rows(prediction),
    )


def predicted_bars(prediction: PredictionEntry) -> Figure:
    """The least time to the first token on a target."""
    bar, gap, left = 34.0, 34.0, 24.0
    longest = max(bundle.first_token_ms for bundle in prediction.bundles)
    height = 26 + len(prediction.bundles) * (bar + gap) + 18
    svg = Svg(WIDTH, height, f"Predicted least time of every stage on {prediction.title}, as bars")

    def scale(value: float) -> float:
        return left + (WIDTH - left - _RIGHT) * value / longest

    for value in ticks(0, longest, 7):
        svg.line(scale(value), 8, scale(value), height - 30, "grid")
        svg.text(scale(value), height - 15, tick_text(value), "label", "middle")
    svg.text(WIDTH - _RIGHT, height - 2, "ms, predicted", "label", "end")
    for index, bundle in enumerate(prediction.bundles):
        y, x = 30 + index * (bar + gap), 0.0
        text = f"{bundle.name} · at least {format_milliseconds(bundle.first_token_ms)} ms"
        if bundle.decode_ms is not None:
            text += f", a decode step {format_milliseconds(bundle.decode_ms)} ms"
        svg.text(left, y - 8, text, "strong")
        for stage in bundle.stages:
            begin, end = scale(x), scale(x + stage.milliseconds)
            x += stage.milliseconds
            kind = f"g-{_group(stage.name)}" + (" memory" if stage.bound == MEMORY else "")
            title = f"{stage.name}: {format_milliseconds(stage.milliseconds)} ms, {stage.bound}"
            svg.rect(begin, y, max(0.0, end - begin - 1), bar, "backing", radius=2)
            svg.rect(begin, y, max(0.0, end - begin - 1), bar, kind, title, radius=2)
            short = stage.name.removeprefix("prefill.")
            if end - begin > 7.2 * len(short) + 8:
                svg.text((begin + end) / 2, y + bar / 2 + 4, short, "inside", "middle")
    groups = list(dict.fromkeys(_group(stage.name) for b in prediction.bundles for stage in b.stages))
    return Figure(
        name=f"predicted-{prediction.target}",
        title=f"Predicted: time to the first token on {prediction.title}",
        caption="Least times by the roofline; pale stages wait for their weights. What a runtime leaves unused comes "
        "on top: see the roofline efficiency measured here.",
        drawing=svg.markup(),
        legend=tuple((f"g-{group}", GROUP_TITLES[group]) for group in groups),
        columns=_COLUMNS,
        rows=_rows(prediction),
    )


_COLUMNS = ("bundle", "stage", "tokens", "least ms", "bound by")


def _rows(prediction: PredictionEntry) -> tuple[tuple[str, ...], ...]:
    """Every stage of every bundle, for both figures."""
    return tuple(
        (bundle.name, stage.name, f"{stage.tokens:.0f}", format_milliseconds(stage.milliseconds), stage.bound)
        for bundle in prediction.bundles
        for stage in bundle.stages
    )


def _group(stage: str) -> str:
    if stage.startswith("prefill."):
        return "prefill"
    return "vision" if stage in ("vision", "projector") else "embed"


def _segment_rows(bundle: BundleEntry, segment: int) -> float:
    """Rows that enter a segment, mean over the runs."""
    visual = [
        (run.entering, *(run.kept or (run.entering,) * segment))[segment] + run.text_tokens
        for run in bundle.runs
    ]
    return sum(visual) / len(visual)


def _chart(knee: float, int4: float | None, points: Sequence[tuple[int, str, float, float]]) -> Markup:
    """Tokens against time, both logarithmic; time in units of reading the weights once."""
    most = max(knee * 4, *(tokens for _, _, tokens, _ in points)) * 1.5
    least = max(1.0, min(knee / 8, *(tokens for _, _, tokens, _ in points)) / 1.5)
    high = max(most / knee, *(value for *_, value in points)) * 1.4
    # Weights of four bits take a part of the time, down to their own knee.
    share = 1.0 if int4 is None else int4 / knee
    low = 0.7 * min(share, *(value for *_, value in points))
    svg = Svg(WIDTH, _HEIGHT, "Least time of prefill by the number of tokens")

    def place(tokens: float, value: float) -> tuple[float, float]:
        x = math.log(tokens / least) / math.log(most / least)
        y = math.log(value / low) / math.log(high / low)
        return (
            _LEFT + (WIDTH - _LEFT - _RIGHT) * x,
            _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * y,
        )

    for value in _decades(low, high):
        y = place(least, value)[1]
        svg.line(_LEFT, y, WIDTH - _RIGHT, y, "grid")
        svg.text(_LEFT - 8, y + 4, f"×{tick_text(value)}", "label", "end")
    for tokens in _decades(least, most):
        x = place(tokens, low)[0]
        svg.line(x, _TOP, x, _HEIGHT - _BOTTOM, "grid")
        svg.text(x, _HEIGHT - _BOTTOM + 17, tick_text(tokens), "label", "middle")
    svg.text((_LEFT + WIDTH - _RIGHT) / 2, _HEIGHT - 8, "tokens in the segment", "label", "middle")
    svg.text(_LEFT, 12, "time, in readings of the weights", "label")
    flat, left = place(knee, low), place(least, high)
    svg.rect(left[0], _TOP, flat[0] - left[0], _HEIGHT - _TOP - _BOTTOM, "waiting")
    svg.polyline([place(least, 1), place(knee, 1), place(most, most / knee)], "roof")
    x, y = place(knee, 1)
    svg.line(x, _TOP, x, _HEIGHT - _BOTTOM, "mark")
    svg.text(x + 6, _TOP + 12, f"knee: {knee:.0f} tokens", "strong")
    if int4 is not None:
        svg.polyline([place(least, share), place(max(least, int4), share), place(knee, 1)], "roof dashed")
        svg.text(*place(least * 1.1, share * 1.12), "int4", "label")
    # The first bundle's last, so that nothing hides them.
    for number, (index, name, tokens, value) in reversed(list(enumerate(points))):
        x, y = place(tokens, value)
        svg.circle(x, y, 6, f"dot {colour(index)}", f"{name}: {tokens:.0f} tokens")
        if index == 0:
            # Above and below in turns: segments may be close to each other.
            svg.text(x, y + (20 if number % 2 else -11), name.rpartition(".")[2], "label", "middle")
    return svg.markup()


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 … between two bounds."""
    values = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in (1, 2, 5)
    ]
    return [value for value in values if low <= value <= high]
