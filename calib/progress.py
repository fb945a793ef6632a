"""The progress of calibrating and quantizing on standard error."""

from collections.abc import Callable

from edgeprune.calib.count_bar import CountBar
from edgeprune.calib.samples import BadSample
from edgeprune.export.progress import ProgressBars

_LINES = 10


class SampleBar(CountBar):
    """A bar over the samples; without a terminal, a line after every tenth of them.

    Args:
        at_step: Called between two samples, where it may raise to end the calibration.
    """

    def __init__(self, at_step: Callable[[], None] = lambda: None) -> None:
        super().__init__("calibrate")
        self.done = 0
        self.total = 0
        self._at_step = at_step

    def samples(self, done: int, total: int, skipped: int) -> None:
        """Move the bar."""
        before, self.done, self.total = self.done, done, total
        self.move(done, total, f"{skipped} skipped" if skipped else "")
        if not self.drawn and done * _LINES // total > before * _LINES // total:
            self.line(f"calibrate: {done} of {total} samples")
        self._at_step()

    def bad(self, sample: BadSample) -> None:
        """Name a sample that cannot be used."""
        self.skipped(sample)


class QuantizationBars(ProgressBars):
    """A bar per graph and per pass over the samples."""

    def __enter__(self) -> "QuantizationBars":
        super().__enter__()
        return self

    def bad(self, sample: BadSample) -> None:
        """Name a sample that cannot be used."""
        self.line(f"skipped {sample.name}: {' '.join(sample.reason.split())}")
