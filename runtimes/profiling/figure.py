"""A figure of the page: a drawing with the table of what it shows."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from edgeprune.runtimes.profiling.report import ProfileReport
from edgeprune.runtimes.profiling.svg import Svg, tick_text, ticks

WIDTH = 860.0
_EDGE = 24.0
_BUNDLE_COLOURS = 4
GROUP_TITLES = {
    "host": "host: pictures, tokens, the rest",
    "vision": "vision tower and projector",
    "embed": "embedding, guide",
    "prefill": "prefill of the decoder",
    "select": "score, select, gather",
    "wait": "waiting for the device",
    "decode": "decode",
}


@dataclass(frozen=True)
class Figure:
    """A drawing, what it says, and its numbers.

    Attributes:
        name: For anchors.
        title: A heading.
        caption: How to read it.
        drawing: Inline SVG.
        legend: Class of the colour, and its meaning.
        columns: Headings of the table.
        rows: Its cells.
    """

    name: str
    title: str
    caption: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.rows or any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(
                f"figure {self.name}: the table's rows do not fit its {len(self.columns)} columns"
            )


def colour(index: int) -> str:
    """The class of a bundle's colour."""
    return f"b{index % _BUNDLE_COLOURS}"


def bundle_legend(report: ProfileReport) -> tuple[tuple[str, str], ...]:
    """One entry per bundle."""
    return tuple((colour(index), bundle.name) for index, bundle in enumerate(report.bundles))


def horizontal_axis(
    svg: Svg, low: float, high: float, y: float, unit: str, left: float = _EDGE
) -> Callable[[float], float]:
    """Vertical grid lines from the top to ``y`` with numbers below them; returns where a value is.

    Args:
        svg: The drawing.
        low: Value at the left end.
        high: Value at the right end.
        y: Where the lines end.
        unit: Below the numbers, on the right.
        left: Where the axis begins.
    """
    right = svg.width - _EDGE

    def place(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low or 1)

    for value in ticks(low, high, 7):
        svg.line(place(value), 8, place(value), y, "grid")
        svg.text(place(value), y + 15, tick_text(value), "label", "middle")
    svg.text(right, y + 29, unit, "label", "end")
    return place
