"""The recorder keeps what a stopwatch adds up."""

import pytest

from edgeprune.runtimes.profiling.recorder import Recorder


def test_spans_nest_and_sum_up():
    watch = Recorder()
    for _ in range(2):
        with watch.time("outer"), watch.time("inner"):
            pass
    assert [(span.name, span.depth) for span in watch.spans] == [("outer", 0), ("inner", 1)] * 2
    for outer, inner in (watch.spans[:2], watch.spans[2:]):
        assert outer.start_ms <= inner.start_ms <= inner.end_ms <= outer.end_ms
    for name, total in watch.milliseconds.items():
        assert total == pytest.approx(sum(span.milliseconds for span in watch.spans if span.name == name))


def test_the_device_is_waited_for_inside_of_every_span():
    waited = []
    watch = Recorder(lambda: waited.append(len(watch.spans)))
    with watch.time("outer"), watch.time("inner"):
        assert waited == []
    # Before either span was closed.
    assert waited == [0, 1]


def test_a_span_that_fails_is_closed_and_the_device_left_alone():
    watch = Recorder(lambda: pytest.fail("the device was waited for"))
    with pytest.raises(RuntimeError), watch.time("stage"):
        raise RuntimeError
    assert [span.depth for span in watch.spans] == [0]
