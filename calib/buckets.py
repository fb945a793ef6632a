"""Which optimization profiles prefill should have: the buckets of rows that minimise the expected time.

A profile takes any number of rows in its range, and its kernels are tuned for one. Running n rows with kernels tuned
for o rows is taken to cost T(n)·(1 + :data:`PENALTY`·|log₂(n/o)|), T(n) being the time with kernels tuned for n itself.
T comes from the cost model or from a measured table. The choice does not depend on the size of the penalty: the sum
over prompts is least where Σ T(n)·|log₂(n/o)| is. So every bucket is tuned for a weighted median of log n, and buckets
are a k-median partition of a line, which dynamic programming solves exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.calibration_entry import BucketEntry, DistributionEntry

PENALTY = 0.1
"""Share of time lost for every factor of two between the rows that run and those that kernels are tuned for.

An assumption, not a measurement: no engine has been executed. It scales the gain that is reported, and changes no
choice.
"""

PrefillTime = Callable[[int], float]
"""Time of a number of rows with kernels tuned for it."""


@dataclass(frozen=True)
class BucketChoice:
    """Buckets and what they are expected to cost.

    Attributes:
        buckets: From 1 row to the most, ascending, without gap or overlap.
        expected: Mean time of a prompt, in the unit of the times given.
        expected_of_one: The same with the best single bucket.
    """

    buckets: tuple[BucketEntry, ...]
    expected: float
    expected_of_one: float

    @property
    def gain(self) -> float:
        """Share of time that the buckets save compared with one."""
        return 1 - self.expected / self.expected_of_one


def choose_buckets(rows: DistributionEntry, time: PrefillTime, allowed: int, greatest: int) -> BucketChoice:
    """The buckets with the least expected time.

    Args:
        rows: How many rows entered the segment, over the calibration prompts; none more than ``greatest``.
        time: Of a number of rows, positive.
        allowed: Most buckets; fewer are chosen where fewer different numbers were seen.
        greatest: Most rows, which the last bucket covers.
    """
    counts = np.array(rows.counts, np.float64)
    times = np.array([time(value) for value in rows.values])
    weights = counts * times
    places = np.log2(np.array(rows.values, np.float64))
    distances, medians = _costs(weights, places)
    total, prompts = float(weights.sum()), float(counts.sum())
    groups = _partition(distances, min(allowed, len(rows.values)))
    loss = math.fsum(float(distances[first, last]) for first, last in groups)
    chosen = (total + PENALTY * loss) / prompts
    one = (total + PENALTY * float(distances[0, -1])) / prompts
    tuned = [rows.values[int(medians[first, last])] for first, last in groups]
    buckets: list[BucketEntry] = []
    for index, (first, last) in enumerate(groups):
        least = 1 if index == 0 else buckets[-1].greatest + 1
        if index == len(groups) - 1:
            most = greatest
        else:
            # A number that was not seen goes to the nearer of two tunings.
            between = math.isqrt(tuned[index] * tuned[index + 1])
            most = min(max(between, rows.values[last]), rows.values[last + 1] - 1)
        buckets.append(BucketEntry(least, tuned[index], most, sum(rows.counts[first : last + 1])))
    return BucketChoice(tuple(buckets), chosen, one)


def _costs(
    weights: NDArray[np.float64], places: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Least Σ weight·distance of every run i … j of places to one of them [m, m], and which one that is."""
    size = len(weights)
    weight = np.concatenate(([0.0], np.cumsum(weights)))
    moment = np.concatenate(([0.0], np.cumsum(weights * places)))
    costs = np.full((size, size), np.inf)
    medians = np.zeros((size, size), np.int64)
    for first in range(size):
        last = np.arange(first, size)
        half = (weight[first] + weight[last + 1]) / 2
        # The first place up to which half of the weight lies.
        middle = np.clip(np.searchsorted(weight, half, side="left") - 1, first, last)
        below = places[middle] * (weight[middle + 1] - weight[first]) - (moment[middle + 1] - moment[first])
        above = (moment[last + 1] - moment[middle + 1]) - places[middle] * (
            weight[last + 1] - weight[middle + 1]
        )
        costs[first, first:] = np.maximum(below + above, 0.0)
        medians[first, first:] = middle
    return costs, medians


def _partition(costs: NDArray[np.float64], groups: int) -> list[tuple[int, int]]:
    """Cut 0 … m-1 into runs of least total cost; first and last of each."""
    size = costs.shape[0]
    best = costs[0].copy()
    cuts: list[NDArray[np.int64]] = []
    for _ in range(groups - 1):
        # Column j: the last run is i … j, and the runs before it end at i - 1.
        total = np.concatenate(([np.inf], best[:-1]))[:, None] + costs
        cut = total.argmin(axis=0)
        best = total[cut, np.arange(size)]
        cuts.append(cut)
    found: list[tuple[int, int]] = []
    last = size - 1
    for cut in reversed(cuts):
        first = int(cut[last])
        found.append((first, last))
        last = first - 1
    found.append((0, last))
    return found[::-1]
