"""Inline SVG, element by element; colours come from the page's style sheet."""

import math
from collections.abc import Sequence
from html import escape

from markupsafe import Markup


class Svg:
    """A drawing in a coordinate system of its own; pages scale it to their width.

    Args:
        width: Of the coordinate system.
        height: Of the coordinate system.
        label: What a screen reader says.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self._label = width, height, label
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, title: str = "", radius: float = 0
    ) -> None:
        """A rectangle; its title shows when the pointer rests on it."""
        rounded = f' rx="{_n(radius)}"' if radius else ""
        size = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(0.0, width))}" height="{_n(max(0.0, height))}"'
        self._parts.append(f'<rect class="{kind}" {size}{rounded}>{_title(title)}</rect>')

    def circle(self, x: float, y: float, radius: float, kind: str, title: str = "") -> None:
        """A disc."""
        place = f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"'
        self._parts.append(f'<circle class="{kind}" {place}>{_title(title)}</circle>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self._parts.append(
            f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"></line>'
        )

    def polyline(self, points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> None:
        """A line through points, or the area inside of it."""
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points) + ("Z" if closed else "")
        self._parts.append(f'<path class="{kind}" d="{path}"></path>')

    def text(self, x: float, y: float, content: str, kind: str = "label", anchor: str = "start") -> None:
        """One line of text on the base line ``y``."""
        self._parts.append(
            f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(content)}</text>'
        )

    def markup(self) -> Markup:
        """The element."""
        box = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}"'
        opened = f'<svg role="img" aria-label="{escape(self._label, quote=True)}" {box}>'
        return Markup(opened + "".join(self._parts) + "</svg>")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds, about ``count`` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Without trailing zeros."""
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _title(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
