"""Measured values in a few numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Least value, percentiles and mean.

    Percentiles lie between two values where they must (linear interpolation); with fewer than a hundred values p99 is
    close to the largest.

    Attributes:
        count: Number of values.
        min: The least.
        p50: The median.
        p95: 95 % of the values are at most this.
        p99: 99 % of the values are at most this.
        max: The largest.
        mean: Their mean.
    """

    count: int
    min: float
    p50: float
    p95: float
    p99: float
    max: float
    mean: float

    def __post_init__(self) -> None:
        if self.count < 1 or not self.min <= self.p50 <= self.p95 <= self.p99 <= self.max:
            raise ValueError(f"no summary of any values: {self}")


def summarize(values: Sequence[float]) -> Summary:
    """Summarize at least one value.

    Raises:
        ValueError: There is none, or one is not finite.
    """
    array = np.asarray(values, np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{array.size} values, all of which must be finite")
    p50, p95, p99 = (float(value) for value in np.percentile(array, (50, 95, 99)))
    return Summary(array.size, float(array.min()), p50, p95, p99, float(array.max()), float(array.mean()))


@dataclass(frozen=True)
class Histogram:
    """How often values lay between two edges.

    Attributes:
        edges: Whole numbers, ascending; a bin holds its left edge and not its right one.
        counts: One fewer than edges.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if len(self.edges) != len(self.counts) + 1 or not ascending or min(self.counts, default=-1) < 0:
            raise ValueError(f"no histogram: edges {self.edges}, counts {self.counts}")


def histogram(values: Sequence[int], bins: int = 12) -> Histogram:
    """Count whole numbers in at most ``bins`` bins of equal width.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("a histogram needs values")
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // bins)
    number = -(-(high - low + 1) // width)
    edges = tuple(low + width * index for index in range(number + 1))
    counts = [0] * number
    for value in values:
        counts[(value - low) // width] += 1
    return Histogram(edges, tuple(counts))
