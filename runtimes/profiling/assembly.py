"""From runs to a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.cost import DecoderShape, kv_cache_bytes
from edgeprune.inspection import BYTES_PER_VALUE
from edgeprune.manifest import Manifest
from edgeprune.roofline import Rates
from edgeprune.runtimes.profiling.measuring import Run
from edgeprune.runtimes.profiling.report import (
    BundleEntry,
    ComparisonEntry,
    EnergyEntry,
    LayerEntry,
    MemoryEntry,
    RooflineEntry,
    RunEntry,
    SiteEntry,
    StageEntry,
)
from edgeprune.runtimes.profiling.summary import Summary, histogram, summarize
from edgeprune.stage_cost import DECODE, PROJECTOR, VISION, StageCost, decode_cost, prompt_costs

REST = "host"
_PREFILL = ("prefill.", "select.", "gather.")
_GROUPS = {
    "preprocess": "host",
    "tokenize": "host",
    REST: "host",
    "vision": "vision",
    "projector": "vision",
    "embed": "embed",
    "guide": "embed",
    "prefill": "prefill",
    "select": "select",
    "gather": "select",
    "wait": "wait",
    "logits_to_host": "wait",
}


@dataclass(frozen=True)
class RunCosts:
    """What one run costs on paper.

    Attributes:
        prompt: Stages up to the first token.
        decode: Every decode step.
    """

    prompt: Mapping[str, StageCost]
    decode: tuple[StageCost, ...]

    @property
    def prefill_flops(self) -> int:
        """The decoder's."""
        return sum(cost.flops for name, cost in self.prompt.items() if name.startswith("prefill."))

    @property
    def flops(self) -> int:
        """Tower, projector and decoder up to the first token."""
        return self.prefill_flops + sum(
            cost.flops for name, cost in self.prompt.items() if name in (VISION, PROJECTOR)
        )


def run_costs(manifest: Manifest, run: Run) -> RunCosts:
    """Count a run's operations and bytes at its own numbers of tokens."""
    steps = tuple(
        decode_cost(manifest, cached_rows(manifest, run, step)) for step in range(len(run.decode_ms))
    )
    return RunCosts(prompt_costs(manifest, run.counts), steps)


def cached_rows(manifest: Manifest, run: Run, step: int) -> tuple[int, ...]:
    """Rows in the cache of every layer before a decode step, those that left it while generating left out."""
    rows = [layer.attention + step for layer in run.counts.layer_rows(manifest)]
    for site in run.answer.sites:
        left = [left for generated, left in site.evictions if generated <= step]
        if left:
            # Only the last site evicts, from the caches behind it.
            for layer in manifest.segments[-1].layers:
                rows[layer] -= site.kept - left[-1]
    return tuple(rows)


def prefill_ms(run: Run) -> float:
    """The decoder's prefill: segments, and sites with what they wait for."""
    return sum(milliseconds for name, milliseconds in run.stage_ms().items() if name.startswith(_PREFILL))


def bundle_entry(
    name: str,
    manifest: Manifest,
    runs: Sequence[Run],
    costs: Sequence[RunCosts],
    rates: Rates | None,
    memory: tuple[int | None, int | None],
    energy: EnergyEntry | None,
) -> BundleEntry:
    """Everything about one bundle."""
    decode = [ms for run in runs for ms in run.decode_ms]
    visual = np.array([_layer_tokens(manifest, run) for run in runs])
    order = sorted(range(len(runs)), key=lambda index: runs[index].first_token_ms)
    return BundleEntry(
        name=name,
        source_sha256=manifest.source.sha256,
        model_type=manifest.source.model_type,
        dtype=manifest.dtype,
        methods=tuple(entry.method for entry in manifest.pruning),
        first_token_ms=summarize([run.first_token_ms for run in runs]),
        prefill_ms=summarize([prefill_ms(run) for run in runs]),
        decode_ms=summarize(decode) if decode else None,
        total_ms=summarize([run.total_ms for run in runs]),
        tokens_per_second=1000 * len(decode) / sum(decode) if decode else None,
        average_visual_tokens=float(visual.mean()),
        flops=_mean([cost.flops for cost in costs]),
        prefill_flops=_mean([cost.prefill_flops for cost in costs]),
        stages=_stages(runs, costs, manifest, rates),
        decode_steps=_decode_steps(runs),
        sites=_sites(runs),
        layers=tuple(
            LayerEntry(int(column.min()), float(column.mean()), int(column.max())) for column in visual.T
        ),
        memory=_memory(manifest, runs, *memory),
        energy=energy,
        runs=tuple(_run_entry(run) for run in runs),
        timeline=runs[order[(len(order) - 1) // 2]].spans,
    )


def compare(
    against: str,
    own: Sequence[Run],
    others: Sequence[Run],
    own_costs: Sequence[RunCosts],
    other_costs: Sequence[RunCosts],
    rates: Rates | None,
) -> tuple[ComparisonEntry, ...]:
    """The first bundle beside another, scope by scope; times are compared within a round."""
    scopes = {
        "prefill": (
            [prefill_ms(run) for run in own],
            [prefill_ms(run) for run in others],
            [cost.prefill_flops for cost in own_costs],
            [cost.prefill_flops for cost in other_costs],
            [_seconds(cost, rates, prefill_only=True) for cost in own_costs],
            [_seconds(cost, rates, prefill_only=True) for cost in other_costs],
        ),
        "first token": (
            [run.first_token_ms for run in own],
            [run.first_token_ms for run in others],
            [cost.flops for cost in own_costs],
            [cost.flops for cost in other_costs],
            [_seconds(cost, rates) for cost in own_costs],
            [_seconds(cost, rates) for cost in other_costs],
        ),
    }
    if own[0].decode_ms and others[0].decode_ms:
        scopes["decode"] = (
            [_mean(run.decode_ms) for run in own],
            [_mean(run.decode_ms) for run in others],
            [sum(step.flops for step in cost.decode) for cost in own_costs],
            [sum(step.flops for step in cost.decode) for cost in other_costs],
            [_decode_seconds(cost, rates) for cost in own_costs],
            [_decode_seconds(cost, rates) for cost in other_costs],
        )
    entries: list[ComparisonEntry] = []
    for scope, (times, other_times, flops, other_flops, least, other_least) in scopes.items():
        ratio = summarize([a / b for a, b in zip(times, other_times, strict=True)])
        flops_ratio = sum(flops) / sum(other_flops)
        entries.append(
            ComparisonEntry(
                against=against,
                scope=scope,
                time_ratio=ratio,
                flops_ratio=flops_ratio,
                # A decode step waits for weights: its operations are not what takes its time.
                saving_efficiency=None if scope == DECODE else saving_efficiency(ratio.p50, flops_ratio),
                predicted_time_ratio=None if rates is None else sum(least) / sum(other_least),
            )
        )
    return tuple(entries)


def saving_efficiency(time_ratio: float, flops_ratio: float) -> float | None:
    """(1 − time ratio) / (1 − FLOPs ratio): how much of the saving on paper became time; None where none was saved."""
    return None if flops_ratio >= 1 - 1e-6 else (1 - time_ratio) / (1 - flops_ratio)


def _seconds(costs: RunCosts, rates: Rates | None, *, prefill_only: bool = False) -> float:
    """The least time up to the first token."""
    if rates is None:
        return 1.0
    names = (name for name in costs.prompt if name.startswith("prefill.") or not prefill_only)
    return sum(rates.seconds(costs.prompt[name]) for name in names)


def _decode_seconds(costs: RunCosts, rates: Rates | None) -> float:
    return 1.0 if rates is None else sum(rates.seconds(step) for step in costs.decode)


def _stages(
    runs: Sequence[Run], costs: Sequence[RunCosts], manifest: Manifest, rates: Rates | None
) -> tuple[StageEntry, ...]:
    by_run = [run.stage_ms() for run in runs]
    nested = frozenset[str]().union(*(run.nested_stages() for run in runs))
    names = list(dict.fromkeys(name for found in by_run for name in found))
    entries: list[StageEntry] = []
    for name in names:
        values = [found.get(name, 0.0) for found in by_run]
        stage_costs = [cost.prompt[name] for cost in costs if name in cost.prompt]
        entries.append(_stage(name, name in nested, values, stage_costs, manifest, rates))
    top = [name for name in names if name not in nested]
    rest = [
        _stage_first_token(run) - sum(found.get(name, 0.0) for name in top)
        for run, found in zip(runs, by_run, strict=True)
    ]
    entries.append(_stage(REST, False, [max(0.0, value) for value in rest], [], manifest, rates))
    steps = [ms for run in runs for ms in run.decode_ms]
    if steps:
        entries.append(
            _stage(DECODE, False, steps, [step for cost in costs for step in cost.decode], manifest, rates)
        )
    inside = [run.decode_stage_ms() for run in runs]
    for name in dict.fromkeys(name for found in inside for name in found):
        values = [ms for found in inside for ms in found.get(name, ())]
        entries.append(_stage(f"{DECODE}.{name}", True, values, [], manifest, rates))
    return tuple(entries)


def _stage_first_token(run: Run) -> float:
    """With the waits at the ends of stages, where there are any."""
    return next(span.milliseconds for span in run.stages if span.name == "time_to_first_token")


def _stage(
    name: str,
    nested: bool,
    values: Sequence[float],
    costs: Sequence[StageCost],
    manifest: Manifest,
    rates: Rates | None,
) -> StageEntry:
    width = BYTES_PER_VALUE.get(manifest.dtype, 2)
    known = len(costs) == len(values)
    group = DECODE if name.startswith(DECODE) else _GROUPS.get(name.partition(".")[0], "host")
    return StageEntry(
        name=name,
        group=group,
        nested=nested,
        milliseconds=summarize(values),
        flops=_mean([cost.flops for cost in costs]) if known else None,
        bytes=_mean([cost.bytes(width, width) for cost in costs]) if known else None,
        roofline=_roofline(values, costs, rates) if known and rates is not None else None,
    )


def _roofline(values: Sequence[float], costs: Sequence[StageCost], rates: Rates) -> RooflineEntry | None:
    measured = sum(values) / 1000
    if measured <= 0:
        return None
    least = sum(rates.seconds(cost) for cost in costs)
    compute = sum(rates.compute_seconds(cost) for cost in costs)
    memory = sum(rates.memory_seconds(cost) for cost in costs)
    return RooflineEntry(
        milliseconds=1000 * least / len(values),
        bound="compute" if compute >= memory else "memory",
        flops_share=compute / measured,
        bandwidth_share=memory / measured,
        efficiency=least / measured,
    )


def _decode_steps(runs: Sequence[Run]) -> tuple[Summary, ...]:
    steps = min(len(run.decode_ms) for run in runs)
    return tuple(summarize([run.decode_ms[step] for run in runs]) for step in range(steps))


def _sites(runs: Sequence[Run]) -> tuple[SiteEntry, ...]:
    entries: list[SiteEntry] = []
    for index, site in enumerate(runs[0].answer.sites):
        reports = [run.answer.sites[index] for run in runs]
        kept = [report.kept for report in reports]
        entries.append(
            SiteEntry(
                name=site.name,
                place=site.place,
                tokens_in=summarize([report.tokens_in for report in reports]),
                kept=summarize(kept),
                histogram=histogram(kept),
            )
        )
    return tuple(entries)


def _layer_tokens(manifest: Manifest, run: Run) -> list[int]:
    return [rows.attention - run.counts.text for rows in run.counts.layer_rows(manifest)]


def _memory(
    manifest: Manifest, runs: Sequence[Run], host_peak: int | None, device_peak: int | None
) -> MemoryEntry:
    shape = DecoderShape.from_geometry(manifest.geometry)
    width = BYTES_PER_VALUE.get(manifest.dtype, 2)
    files = {entry.path: entry.bytes for graph in manifest.graphs.values() for entry in graph.data}
    caches = [
        kv_cache_bytes(shape, [rows.attention for rows in run.counts.layer_rows(manifest)], width)
        for run in runs
    ]
    return MemoryEntry(host_peak, device_peak, sum(files.values()), _mean(caches))


def _run_entry(run: Run) -> RunEntry:
    return RunEntry(
        round=run.round,
        prompt=run.sample,
        first_token_ms=run.first_token_ms,
        prefill_ms=prefill_ms(run),
        total_ms=run.total_ms,
        text_tokens=run.counts.text,
        entering=run.counts.entering,
        kept=run.counts.kept,
    )


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)
