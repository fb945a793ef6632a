"""The chosen buckets are the best ones: no other cuts and tunings are expected to take less time."""

import itertools
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from edgeprune.calib import buckets
from edgeprune.calib.buckets import PENALTY, choose_buckets
from edgeprune.calib.statistics import distribution
from edgeprune.calibration_entry import DistributionEntry

GREATEST = 4096


def brute_force(rows: DistributionEntry, time: Callable[[int], float], allowed: int) -> float:
    """The least expected time over all ways to cut, each run tuned for the best of all numbers between its ends."""
    seen = list(zip(rows.values, rows.counts, strict=True))

    @cache
    def run(first: int, last: int) -> float:
        return min(
            sum(c * time(n) * (1 + PENALTY * abs(math.log2(n / tuned))) for n, c in seen[first:last])
            for tuned in range(seen[first][0], seen[last - 1][0] + 1)
        )

    size = len(seen)
    return min(
        sum(run(a, b) for a, b in itertools.pairwise((0, *cuts, size))) / rows.total
        for number in range(1, min(allowed, size) + 1)
        for cuts in itertools.combinations(range(1, size), number - 1)
    )


def quadratic(rows: int) -> float:
    return 3.0 * rows + 0.01 * rows * rows


def uneven(rows: int) -> float:
    """Not even growing, as measured times may be."""
    return 5 + rows % 7


@pytest.mark.parametrize("time", [quadratic, uneven])
@pytest.mark.parametrize("allowed", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_buckets_are_better(seed, allowed, time):
    draw = np.random.Generator(np.random.PCG64(seed))
    numbers = draw.integers(1, (12, 60, 300)[seed % 3], 9)
    rows = distribution(numbers.tolist(), ())
    found = choose_buckets(rows, time, allowed, GREATEST)
    assert found.expected == pytest.approx(brute_force(rows, time, allowed), rel=1e-12)
    assert found.expected_of_one == pytest.approx(brute_force(rows, time, 1), rel=1e-12)
    # What is said to be expected is what these buckets take.
    again = sum(
        count * time(n) * (1 + PENALTY * abs(math.log2(n / bucket.tuned)))
        for n, count in zip(rows.values, rows.counts, strict=True)
        for bucket in found.buckets
        if bucket.least <= n <= bucket.greatest
    )
    assert found.expected == pytest.approx(again / rows.total, rel=1e-12)


@pytest.mark.parametrize("allowed", [1, 2, 5, 50])
def test_they_cover_every_length_once(allowed):
    rows = distribution(np.random.Generator(np.random.PCG64(1)).integers(30, 300, 200).tolist(), ())
    found = choose_buckets(rows, quadratic, allowed, GREATEST).buckets
    assert len(found) == allowed
    covered = [n for bucket in found for n in range(bucket.least, bucket.greatest + 1)]
    assert covered == list(range(1, GREATEST + 1))
    assert sum(bucket.prompts for bucket in found) == 200


def test_two_clusters_get_a_bucket_each():
    rows = distribution([60, 62, 62, 63, 240, 250, 250, 251], ())
    first, second = choose_buckets(rows, quadratic, 2, 1024).buckets
    assert (first.least, first.tuned, first.prompts) == (1, 62, 4)
    assert (second.tuned, second.greatest, second.prompts) == (250, 1024, 4)
    # A length that was not seen goes to the nearer tuning: 62 · 250 = 124.5².
    assert (first.greatest, second.least) == (124, 125)


def test_a_single_length_needs_one_bucket():
    found = choose_buckets(distribution([100] * 5, ()), quadratic, 3, 512)
    ((least, tuned, greatest),) = [(b.least, b.tuned, b.greatest) for b in found.buckets]
    assert (least, tuned, greatest) == (1, 100, 512)
    assert found.gain == 0.0


def test_one_bucket_gains_nothing_and_more_gain_more():
    rows = distribution(np.random.Generator(np.random.PCG64(2)).integers(30, 300, 200).tolist(), ())
    gains = [choose_buckets(rows, quadratic, allowed, 512).gain for allowed in range(1, 8)]
    assert gains[0] == 0.0
    assert gains == sorted(gains)
    assert len(set(gains)) == len(gains)


def test_the_size_of_the_penalty_changes_no_choice(monkeypatch):
    rows = distribution(np.random.Generator(np.random.PCG64(3)).integers(30, 300, 100).tolist(), ())
    before = choose_buckets(rows, quadratic, 3, 512)
    monkeypatch.setattr(buckets, "PENALTY", 0.7)
    after = choose_buckets(rows, quadratic, 3, 512)
    assert after.buckets == before.buckets
    assert after.gain > before.gain
