"""How far pruning pays on a device: where its prefill stops being bound by operations."""

from dataclasses import dataclass

from edgeprune.errors import TargetError
from edgeprune.inspection import BOUND, Inspection
from edgeprune.roofline import default_precision, target_rates
from edgeprune.targets import Target, find_target


@dataclass(frozen=True)
class SegmentKnee:
    """A segment of the decoder on a device.

    Attributes:
        graph: Its graph.
        rows: That enter it in prefill of the typical prompt; at most, where pruning depends on the picture and was
            not calibrated.
        reads_weights_only: Whether that is below the knee: dropping further tokens saves nothing there.
    """

    graph: str
    rows: int
    reads_weights_only: bool


@dataclass(frozen=True)
class TargetKnee:
    """A bundle on a device, by its data sheet.

    Attributes:
        target: Name of the device.
        title: Its full name.
        precision: Of the weights.
        tokens: The knee: with fewer rows, a segment's prefill takes as long as reading its weights.
        int4_tokens: The same with weights of four bits; None where the device has none.
        counts: Where the rows come from, see :class:`edgeprune.inspection.PrefillCost`.
        segments: In order.
    """

    target: str
    title: str
    precision: str
    tokens: float
    int4_tokens: float | None
    counts: str
    segments: tuple[SegmentKnee, ...]


def find_knee(inspection: Inspection, target: str) -> TargetKnee:
    """Compare a bundle's segments with the knee of a device.

    Raises:
        TargetError: The device is unknown, or its rates are.
    """
    device = find_target(target)
    precision = default_precision(device, inspection.dtype)
    tokens = target_rates(device, precision).knee_tokens
    prefill = inspection.prefill
    return TargetKnee(
        target=device.name,
        title=device.title,
        precision=precision,
        tokens=tokens,
        int4_tokens=int4_knee(device),
        counts=prefill.counts,
        segments=tuple(
            SegmentKnee(
                group.graph,
                group.visual_tokens + prefill.text_tokens,
                group.visual_tokens + prefill.text_tokens < tokens,
            )
            for group in prefill.groups[1:]
        ),
    )


def int4_knee(target: Target) -> float | None:
    """The knee with weights of four bits, where the device has them and its rate is known."""
    try:
        return target_rates(target, "int4").knee_tokens
    except TargetError:
        return None


def knee_sentence(knee: TargetKnee) -> str:
    """One line for people."""
    at_most = "at most " if knee.counts == BOUND else ""
    line = (
        f"Knee on {knee.title} ({knee.precision}, data sheet): {knee.tokens:.0f} tokens; with fewer, prefill only "
        "reads weights and pruning saves nothing. "
    )
    below = [segment for segment in knee.segments if segment.reads_weights_only]
    if not below and knee.counts == BOUND:
        return line + (
            f"The segments have at most {knee.segments[0].rows} rows; how many depends on the picture: edgeprune "
            "calibrate or edgeprune profile tells."
        )
    if not below:
        return line + f"No segment is there ({knee.segments[-1].rows} rows in the last): pruning pays."
    line += f"Below: {', '.join(f'{segment.graph} ({at_most}{segment.rows} rows)' for segment in below)}"
    if knee.int4_tokens is not None:
        line += f"; int4 weights pay more there, down to {knee.int4_tokens:.0f} tokens"
    return line + "."
