"""Numbers as a person reads them."""

import pytest

from edgeprune.quantities import format_bytes, format_count, format_milliseconds, format_share


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (435e9, "435 G"), (1.0135e9, "1.01 G"), (42.6e12, "42.6 T")],
)
def test_counts(value, text):
    assert format_count(value) == text


def test_bytes():
    assert [format_bytes(value) for value in (12, 11_400_000)] == ["12 B", "11.4 MB"]


@pytest.mark.parametrize(
    ("value", "text"), [(1234.4, "1234"), (37.14, "37.1"), (1.267, "1.27"), (0.0243, "0.024"), (0.0, "0")]
)
def test_milliseconds(value, text):
    assert format_milliseconds(value) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0.31, 1.0, "31 %"), (0.0312, 1.0, "3.1 %"), (3, 4, "75 %"), (-0.5, 1, "-50 %"), (1, 0, "-")],
)
def test_shares(part, whole, text):
    assert format_share(part, whole) == text
