"""A calibration as tables that fit a terminal of 100 columns."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeprune.calibration_entry import LATENCY_TABLE, CalibrationEntry, DistributionEntry

_BAR_WIDTH = 20
_BAR = "█"


def calibration_summary(calibration: CalibrationEntry) -> str:
    """One line: from what the statistics are."""
    skipped = f", {calibration.skipped} skipped" if calibration.skipped else ""
    return f"{calibration.samples} samples{skipped} (sha256 {calibration.data_sha256[:12]})"


def render_calibration(calibration: CalibrationEntry) -> RenderableType:
    """The lengths that were seen and the prefill profiles that were chosen for them."""
    return Group(_lengths_table(calibration), Text(), _buckets_table(calibration), Text(_note(calibration)))


def _lengths_table(calibration: CalibrationEntry) -> Table:
    rows: list[tuple[str, DistributionEntry]] = [
        (f"{site}: visual tokens kept per picture", kept) for site, kept in calibration.keep_per_image.items()
    ]
    rows += [(f"{name}: rows that enter", entry) for name, entry in calibration.sequence_lengths.items()]
    rows += [
        ("text tokens of a prompt", calibration.text_lengths),
        ("tiles of a prompt", calibration.tiles),
        ("generated tokens", calibration.generated_lengths),
    ]
    shares = list(calibration.text_lengths.quantiles)
    columns = ("least", *(f"{float(share):.4g}".lstrip("0") for share in shares), "greatest", "mean")
    table = _table("", *columns, right=columns, title=f"Calibration: {calibration_summary(calibration)}")
    for name, entry in rows:
        numbers = [entry.values[0], *(entry.quantiles[share] for share in shares), entry.max]
        table.add_row(name, *map(str, numbers), f"{entry.mean:.1f}")
    return table


def _buckets_table(calibration: CalibrationEntry) -> Table:
    columns = ("least", "tuned for", "greatest", "prompts", "gain")
    table = _table("segment", *columns, "", right=columns, title="Profiles of prefill, in rows")
    for name, segment in calibration.prefill.items():
        total = sum(bucket.prompts for bucket in segment.buckets)
        for index, bucket in enumerate(segment.buckets):
            first = index == 0
            bar = _BAR * round(_BAR_WIDTH * bucket.prompts / total)
            numbers = (bucket.least, bucket.tuned, bucket.greatest, bucket.prompts)
            gain = f"{segment.gain:.2%}" if first else ""
            table.add_row(name if first else "", *map(str, numbers), gain, bar)
    return table


def _note(calibration: CalibrationEntry) -> str:
    cost = "the measured table" if calibration.cost == LATENCY_TABLE else "the cost model"
    text = f"Gain: time of prefill saved compared with the best single profile, expected by {cost}."
    if calibration.fallback is not None:
        longer = _above(calibration.sequence_lengths, calibration.max_sequence)
        text += (
            f"\nPrompts of more than {calibration.max_sequence} rows ({longer} of {calibration.samples}) fit no "
            "profile: the ONNX graphs take them."
        )
    cut = dict(zip(calibration.generated_lengths.values, calibration.generated_lengths.counts, strict=True))
    if at_most := cut.get(calibration.max_new_tokens, 0):
        text += f"\n{at_most} answers have {calibration.max_new_tokens} tokens, the most that were generated."
    return text


def _above(lengths: dict[str, DistributionEntry], most: int) -> int:
    """Prompts that enter the first segment with more rows."""
    first = next(iter(lengths.values()))
    return sum(count for value, count in zip(first.values, first.counts, strict=True) if value > most)


def _table(*columns: str, title: str, right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
