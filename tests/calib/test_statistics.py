"""Distributions are exact, and quantiles are told only of enough samples."""

import numpy as np
import pytest

from edgeprune.calib.statistics import distribution, parse_quantiles, quantiles_for, with_quantiles
from edgeprune.errors import DataError

SHARES = (0.01, 0.07, 0.25, 0.5, 0.9, 0.99)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 333])
def test_histogram_mean_and_quantiles_are_those_of_numpy(count):
    numbers = np.random.Generator(np.random.PCG64(count)).integers(0, 40, count)
    found = distribution(numbers.tolist(), SHARES)
    values, counts = np.unique(numbers, return_counts=True)
    assert (found.values, found.counts) == (tuple(values), tuple(counts))
    assert found.mean == pytest.approx(numbers.mean(), rel=1e-12)
    assert found.max == numbers.max()
    assert found.total == count
    expected = {f"{q:g}": int(np.quantile(numbers, q, method="inverted_cdf")) for q in SHARES}
    assert found.quantiles == expected
    assert with_quantiles(distribution(numbers.tolist(), ()), SHARES) == found


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (1, ()),
        (2, (0.5,)),
        (10, (0.1, 0.5, 0.9)),
        (19, (0.1, 0.5, 0.9)),
        (100, (0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99)),
    ],
)
def test_the_usual_quantiles_are_those_that_the_samples_allow(samples, expected):
    assert quantiles_for(samples, None) == expected


@pytest.mark.parametrize(
    ("share", "needed"), [(0.5, 2), (0.9, 10), (0.1, 10), (0.99, 100), (0.999, 1000), (0.3, 4)]
)
def test_a_wanted_quantile_needs_samples(share, needed):
    assert quantiles_for(needed, (share,)) == (share,)
    with pytest.raises(DataError, match=f"needs at least {needed} samples, there are {needed - 1}"):
        quantiles_for(needed - 1, (share,))


def test_quantiles_of_the_command_line():
    assert parse_quantiles("0.9, 0.5,0.9") == (0.5, 0.9)


@pytest.mark.parametrize("text", ["", "a", "0.5,", "0", "1", "1.5", "-0.1", "nan"])
def test_what_is_no_share(text):
    with pytest.raises(DataError, match=r"are no numbers|is no share"):
        parse_quantiles(text)
