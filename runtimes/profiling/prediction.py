"""What a device would need at least, from its data sheet."""

from collections.abc import Mapping, Sequence

from edgeprune.knee import int4_knee
from edgeprune.manifest import Manifest
from edgeprune.roofline import Rates, default_precision, target_rates
from edgeprune.runtimes.profiling.assembly import RunCosts
from edgeprune.runtimes.profiling.measuring import Run
from edgeprune.runtimes.profiling.report import PredictedBundle, PredictedStage, PredictionEntry
from edgeprune.stage_cost import PROJECTOR, VISION
from edgeprune.targets import Target


def predict(
    target: Target,
    precision: str | None,
    bundles: Mapping[str, tuple[Manifest, Sequence[Run], Sequence[RunCosts]]],
) -> PredictionEntry:
    """Predict every bundle at the counts of its runs.

    Args:
        target: The device.
        precision: Of the weights; None takes the first bundle's where the target's rate for it is known, else fp16.
        bundles: Manifest, runs and their costs by name.

    Raises:
        TargetError: The target lacks the precision, or its rate is unknown.
    """
    first = next(iter(bundles.values()))[0]
    chosen = precision or default_precision(target, first.dtype)
    rates = target_rates(target, chosen)
    return PredictionEntry(
        target=target.name,
        title=target.title,
        precision=chosen,
        flops_per_second=rates.flops_per_second,
        bytes_per_second=rates.bytes_per_second,
        knee_tokens=rates.knee_tokens,
        int4_knee_tokens=int4_knee(target),
        bundles=tuple(_bundle(name, *entry, rates) for name, entry in bundles.items()),
    )


def _bundle(
    name: str, manifest: Manifest, runs: Sequence[Run], costs: Sequence[RunCosts], rates: Rates
) -> PredictedBundle:
    stages: list[PredictedStage] = []
    for stage in costs[0].prompt:
        own = [cost.prompt[stage] for cost in costs]
        compute, memory = (
            sum(rates.compute_seconds(cost) for cost in own),
            sum(rates.memory_seconds(cost) for cost in own),
        )
        stages.append(
            PredictedStage(
                name=stage,
                tokens=_mean([_rows(manifest, run, stage) for run in runs]),
                milliseconds=1000 * _mean([rates.seconds(cost) for cost in own]),
                bound="compute" if compute >= memory else "memory",
            )
        )
    steps = [rates.seconds(step) for cost in costs for step in cost.decode]
    return PredictedBundle(
        name=name,
        stages=tuple(stages),
        first_token_ms=sum(stage.milliseconds for stage in stages),
        decode_ms=1000 * _mean(steps) if steps else None,
    )


def _rows(manifest: Manifest, run: Run, stage: str) -> int:
    """Rows that enter a stage."""
    counts = run.counts
    if stage == VISION:
        return sum(counts.tiles)
    if stage == PROJECTOR:
        return counts.entering
    for index, segment in enumerate(manifest.segments):
        if stage == f"prefill.{segment.graph}":
            return (counts.entering, *(counts.kept or (counts.entering,) * index))[index] + counts.text
    return counts.entering + counts.text


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
