"""The progress of calibrating and quantizing on standard error."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeprune.calib.samples import BadSample
from edgeprune.export.progress import ProgressBars

_LINES = 10


class SampleBar:
    """A bar over the samples; without a terminal, a line after every tenth of them.

    Args:
        at_step: Called between two samples, where it may raise to end the calibration.
    """

    def __init__(self, at_step: Callable[[], None] = lambda: None) -> None:
        self.done = 0
        self.total = 0
        self._at_step = at_step
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("calibrate"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "SampleBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def samples(self, done: int, total: int, skipped: int) -> None:
        """Move the bar."""
        before, self.done, self.total = self.done, done, total
        self._bar.update(
            self._task, completed=done, total=total, description=f"{skipped} skipped" if skipped else ""
        )
        if not self._console.is_terminal and done * _LINES // total > before * _LINES // total:
            self._print(f"calibrate: {done} of {total} samples")
        self._at_step()

    def bad(self, sample: BadSample) -> None:
        """Name a sample that cannot be used."""
        self._print(f"skipped {sample.name}: {' '.join(sample.reason.split())}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class QuantizationBars(ProgressBars):
    """A bar per graph and per pass over the samples."""

    def __enter__(self) -> "QuantizationBars":
        super().__enter__()
        return self

    def bad(self, sample: BadSample) -> None:
        """Name a sample that cannot be used."""
        self.line(f"skipped {sample.name}: {' '.join(sample.reason.split())}")
