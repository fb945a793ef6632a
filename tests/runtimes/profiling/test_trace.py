"""The trace, as Perfetto reads it."""

import itertools

import pytest

from edgeprune.runtimes.profiling.trace import trace_events

# One worker measures the profile that they share.
pytestmark = pytest.mark.xdist_group("profiling")


def test_every_span_is_an_event_inside_of_its_run(profiled):
    names = [bundle.name for bundle in profiled.report.bundles]
    events = trace_events(names, profiled.runs)
    named = {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"}
    assert list(named) == names
    for name, runs in zip(names, profiled.runs, strict=True):
        own = [event for event in events if event["ph"] == "X" and event["pid"] == named[name]]
        whole = [event for event in own if event["name"].startswith("run ")]
        assert len(own) == len(runs) + sum(len(run.spans) for run in runs)
        assert [event["args"]["prompt"] for event in whole] == [0, 1, 0]
        assert all(
            event["args"].get("site0") == run.counts.kept[0]
            for event, run in zip(whole, runs, strict=True)
            if run.counts.kept
        )
        for event in own:
            assert any(
                run["ts"] - 0.2 <= event["ts"] and event["ts"] + event["dur"] <= run["ts"] + run["dur"] + 0.2
                for run in whole
            )


def test_turns_do_not_overlap(profiled):
    events = trace_events(["a", "b"], profiled.runs)
    whole = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("run "))
    assert whole[0][0] == 0
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(whole))
