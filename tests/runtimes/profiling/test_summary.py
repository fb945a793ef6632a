"""Percentiles against NumPy, histograms against counting."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.runtimes.profiling.summary import Histogram, Summary, histogram, summarize


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=60))
def test_percentiles_are_those_of_numpy(values):
    found = summarize(values)
    for name, percent in (("min", 0), ("p50", 50), ("p95", 95), ("p99", 99), ("max", 100)):
        assert getattr(found, name) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_that_are_none(values):
    with pytest.raises(ValueError, match="must be finite"):
        summarize(values)


@given(st.lists(st.integers(0, 2880), min_size=1, max_size=200), st.integers(1, 20))
def test_every_value_is_in_the_bin_of_a_histogram_that_holds_it(values, bins):
    found = histogram(values, bins)
    assert 1 <= len(found.counts) <= bins
    counted = Counter(values)
    for index, count in enumerate(found.counts):
        inside = range(found.edges[index], found.edges[index + 1])
        assert count == sum(counted[value] for value in inside)
    assert sum(found.counts) == len(values)


def test_what_is_no_summary_and_no_histogram():
    with pytest.raises(ValueError, match="no summary"):
        Summary(1, 2.0, 1.0, 3.0, 4.0, 5.0, 2.0)
    with pytest.raises(ValueError, match="no histogram"):
        Histogram((1, 1), (3,))
    with pytest.raises(ValueError, match="needs values"):
        histogram([])
