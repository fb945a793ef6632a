"""Candidates in turns: a machine that slows down slows all of them, and ratios are taken within a round."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")
Measured = TypeVar("Measured")


def take_turns(
    candidates: Mapping[Name, Callable[[], Measured]], rounds: int, warm_up: int = 1
) -> dict[Name, list[Measured]]:
    """What every candidate measured in every round.

    Args:
        candidates: What measures, by name; called in this order.
        rounds: Rounds that count.
        warm_up: Rounds before them that do not.
    """
    measured: dict[Name, list[Measured]] = {name: [] for name in candidates}
    for index in range(warm_up + rounds):
        for name, run in candidates.items():
            result = run()
            if index >= warm_up:
                measured[name].append(result)
    return measured


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """Median and range, as two cells of a Markdown table."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{decimals}f} | {least:.{decimals}f} … {most:.{decimals}f}"
