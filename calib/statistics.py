"""Distributions of whole numbers: exact histograms and quantiles."""

from collections import Counter
from collections.abc import Iterable, Sequence

from edgeprune.calibration_entry import DistributionEntry
from edgeprune.errors import DataError

DEFAULT_QUANTILES = (0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99)
_ROUNDING = 1e-9


def distribution(numbers: Iterable[int], quantiles: Sequence[float]) -> DistributionEntry:
    """The histogram, mean, greatest and quantiles of at least one number."""
    counted = sorted(Counter(numbers).items())
    values, counts = tuple(value for value, _ in counted), tuple(count for _, count in counted)
    mean = sum(value * count for value, count in counted) / sum(counts)
    plain = DistributionEntry(values, counts, mean, values[-1], {})
    return with_quantiles(plain, quantiles)


def with_quantiles(entry: DistributionEntry, quantiles: Sequence[float]) -> DistributionEntry:
    """The same histogram with other quantiles."""
    found = {f"{share:g}": entry.quantile(share) for share in quantiles}
    return DistributionEntry(entry.values, entry.counts, entry.mean, entry.max, found)


def quantiles_for(samples: int, wanted: Sequence[float] | None) -> tuple[float, ...]:
    """The quantiles to tell of a number of samples.

    A quantile q says something only if at least one sample in q⁻¹ or (1 − q)⁻¹ may lie beyond it.

    Args:
        samples: How many there are.
        wanted: Shares between 0 and 1; None takes those of :data:`DEFAULT_QUANTILES` that the samples allow.

    Raises:
        DataError: There are too few samples for a wanted quantile.
    """
    if wanted is None:
        return tuple(share for share in DEFAULT_QUANTILES if _needed(share) <= samples)
    for share in wanted:
        if _needed(share) > samples:
            raise DataError(
                f"the {share:g} quantile needs at least {_needed(share)} samples, there are {samples}: "
                "give more data or choose other --quantiles"
            )
    return tuple(wanted)


def check_quantiles(wanted: Sequence[float]) -> None:
    """Refuse what is no share.

    Raises:
        DataError: A quantile is not between 0 and 1.
    """
    for share in wanted:
        if not 0 < share < 1:
            raise DataError(f"the quantile {share:g} is no share: give numbers between 0 and 1, as 0.5,0.9")


def parse_quantiles(text: str) -> tuple[float, ...]:
    """Shares with commas between them.

    Raises:
        DataError: One is no number between 0 and 1.
    """
    try:
        found = tuple(sorted({float(share) for share in text.split(",")}))
    except ValueError as error:
        raise DataError(f"--quantiles {text!r} are no numbers: give shares as 0.5,0.9") from error
    check_quantiles(found)
    return found


def _needed(share: float) -> int:
    # 1 / (1 − 0.9) is 10.000000000000002.
    exact = 1 / min(share, 1 - share)
    return int(-(-(exact - exact * _ROUNDING) // 1))
