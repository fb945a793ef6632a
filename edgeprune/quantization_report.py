"""What quantizing changed, as a table."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeprune.quantization_entry import QuantizationEntry, QuantizedPartEntry


def render_quantization(entry: QuantizationEntry, name: str) -> RenderableType:
    """The report as tables of up to 100 columns; legible without colours."""
    report = entry.report
    parts = Table("part", "precision", "scheme", "products", "left for the scores", "of their float16 size")
    for title, part in (("decoder", entry.decoder), ("vision", entry.vision)):
        if part is not None:
            parts.add_row(title, *_part(part))
    found = Table(
        "", "quantized against unquantized", title=f"{entry.samples} samples, {report.backend}, this machine"
    )
    found.add_row("same answer", f"{report.answer_agreement:.1%}")
    for site, agreement in report.kept_agreement.items():
        found.add_row(f"kept tokens, {site}", f"Jaccard {agreement:.3f}")
    found.add_row(
        "size of the bundle",
        f"{report.bundle_bytes / 1e6:.1f} of {report.bundle_bytes_before / 1e6:.1f} MB "
        f"({report.bundle_bytes / report.bundle_bytes_before:.2f} x)",
    )
    found.add_row("time of the vision tower", f"{report.vision_time_ratio:.2f} x")
    found.add_row("time of prefill", f"{report.prefill_time_ratio:.2f} x")
    if report.decode_time_ratio is not None:
        found.add_row("time of a generated token", f"{report.decode_time_ratio:.2f} x")
    return Group(Text(f"{name}: quantized for {entry.form}"), parts, Text(), found)


def _part(part: QuantizedPartEntry) -> tuple[str, ...]:
    blocks = "" if part.block_size is None else f", blocks of {part.block_size}"
    return (
        part.precision,
        f"{part.scheme}{blocks}",
        str(part.products),
        str(part.kept_products),
        f"{part.bytes / part.fp16_bytes:.2f} x",
    )
