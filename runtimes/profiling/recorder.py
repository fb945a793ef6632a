"""A stopwatch that remembers when everything happened."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgeprune.runtimes.graph_chain import Stopwatch

FIRST_TOKEN, DECODE = "time_to_first_token", "decode"


@dataclass(frozen=True)
class Span:
    """One timed piece of an answer.

    Attributes:
        name: What was timed.
        start_ms: Since the answer began.
        milliseconds: How long it took.
        depth: How many other spans it lies in.
    """

    name: str
    start_ms: float
    milliseconds: float
    depth: int

    @property
    def end_ms(self) -> float:
        """Since the answer began."""
        return self.start_ms + self.milliseconds


class Recorder(Stopwatch):
    """Keeps every span, beside the sums that a stopwatch has.

    Args:
        synchronize: Waits for the device at the end of every span, so that a stage's time is its own and not that of
            queueing it. None where runs end when the device is done, and where nothing is to be disturbed.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._synchronize = synchronize
        self._depth = 0
        self._spans: list[Span] = []

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Record the body as a span, and add its time to ``name``."""
        depth, self._depth = self._depth, self._depth + 1
        start = time.perf_counter()
        try:
            yield
            if self._synchronize is not None:
                self._synchronize()
        finally:
            elapsed = 1000 * (time.perf_counter() - start)
            self._depth = depth
            self._spans.append(Span(name, 1000 * (start - self.started), elapsed, depth))
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + elapsed

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans, in the order in which they began."""
        return tuple(sorted(self._spans, key=lambda span: (span.start_ms, span.depth)))
