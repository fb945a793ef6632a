"""Numbers as a person reads them: three digits and a decimal unit."""

from collections.abc import Sequence


def format_count(count: float) -> str:
    """Operations: "435 G"."""
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def format_bytes(count: float) -> str:
    """Bytes: "11.4 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def format_share(part: float, whole: float = 1.0) -> str:
    """A share in per cent: "31 %"; below ten with a decimal."""
    if not whole:
        return "-"
    share = 100 * part / whole
    return f"{share:.0f} %" if abs(share) >= 9.95 else f"{share:.1f} %"


def format_milliseconds(value: float) -> str:
    """About three digits, without the unit."""
    for least, digits in ((99.5, 0), (9.95, 1), (0.0995, 2)):
        if value >= least:
            return f"{value:.{digits}f}"
    return f"{value:.3f}" if value else "0"


def _scaled(count: float, units: Sequence[str]) -> str:
    value, index = float(count), 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[index]}".rstrip()
