"""Spans as a trace that Perfetto and chrome://tracing open.

Format: Trace Event Format, complete events ("ph": "X") with times in microseconds, one process per bundle, all on one
clock, so that the turns are seen.
"""

from collections.abc import Sequence
from typing import Any

from edgeprune.runtimes.profiling.measuring import Run


def trace_events(names: Sequence[str], runs: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """The events of every run.

    Args:
        names: Of the bundles.
        runs: Of every bundle.
    """
    events: list[dict[str, Any]] = []
    begin = min(run.started for own in runs for run in own)
    for process, (name, own) in enumerate(zip(names, runs, strict=True), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 1, "args": {"name": name}})
        for run in own:
            offset = 1e6 * (run.started - begin)
            kept = {site.name: site.kept for site in run.answer.sites}
            events.append(
                _event(
                    f"run {run.round + 1}",
                    process,
                    offset,
                    max(span.end_ms for span in run.spans),
                    {"prompt": run.sample, "text tokens": run.counts.text, **kept},
                )
            )
            events += [
                _event(span.name, process, offset + 1e3 * span.start_ms, span.milliseconds, {})
                for span in run.spans
            ]
    return events


def _event(
    name: str, process: int, microseconds: float, milliseconds: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": 1,
        "ts": round(microseconds, 1),
        "dur": round(1e3 * milliseconds, 1),
        "args": arguments,
    }
