"""The progress of a fit on standard error."""

from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeprune.calib.samples import BadSample
from edgeprune.calib.training import Curves

_LINES = 20
_LISTED = 10


class FitBar:
    """A bar over the steps with the running numbers; without a terminal, a line after every twentieth of them.

    Args:
        at_step: Called between two steps, where it may raise to end the training.
        silent: Whether another process tells.
    """

    def __init__(self, at_step: Callable[[], None] = lambda: None, *, silent: bool = False) -> None:
        self.done = 0
        self.steps = 0
        self._skipped = 0
        self._at_step = at_step
        self._console = Console(stderr=True, quiet=silent)
        self._bar = Progress(
            TextColumn("fit"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=silent or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> "FitBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int, steps: int, curves: Curves) -> None:
        """Move the bar."""
        width = max(1, steps // _LINES)
        numbers = _numbers(curves, width)
        self.done, self.steps = done, steps
        self._bar.update(self._task, completed=done, total=steps, description=numbers)
        if not self._console.is_terminal and (done % width == 0 or done == steps):
            self._print(f"step {done} of {steps}: {numbers}")
        self._at_step()

    def bad(self, sample: BadSample) -> None:
        """Name a sample that cannot be used, the first few at least."""
        self._skipped += 1
        if self._skipped <= _LISTED:
            self._print(f"skipped {sample.name}: {' '.join(sample.reason.split())}")
        elif self._skipped == _LISTED + 1:
            self._print("skipped more samples")
        self._at_step()

    def say(self, line: str) -> None:
        """Print a line."""
        self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _numbers(curves: Curves, width: int) -> str:
    """The last steps' means."""

    def mean(values: Sequence[float]) -> float:
        return sum(values[-width:]) / len(values[-width:])

    answers, budget = mean(curves.answers), mean(curves.budget)
    return (
        f"loss {answers + budget:.4f}, of answers {answers:.4f}; {mean(curves.tokens):.1f} visual tokens; "
        f"{mean(curves.right):.1%} right"
    )
