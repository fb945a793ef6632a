"""The progress of a fit on standard error."""

from collections.abc import Callable, Sequence

from edgeprune.calib.count_bar import CountBar
from edgeprune.calib.samples import BadSample
from edgeprune.calib.training import Curves

_LINES = 20
_LISTED = 10


class FitBar(CountBar):
    """A bar over the steps with the running numbers; without a terminal, a line after every twentieth of them.

    Args:
        at_step: Called between two steps, where it may raise to end the training.
        silent: Whether another process tells.
    """

    def __init__(self, at_step: Callable[[], None] = lambda: None, *, silent: bool = False) -> None:
        super().__init__("fit", silent=silent)
        self.done = 0
        self.steps = 0
        self._num_bad = 0
        self._at_step = at_step

    def step(self, done: int, steps: int, curves: Curves) -> None:
        """Move the bar."""
        width = max(1, steps // _LINES)
        numbers = _numbers(curves, width)
        self.done, self.steps = done, steps
        self.move(done, steps, numbers)
        if not self.drawn and (done % width == 0 or done == steps):
            self.line(f"step {done} of {steps}: {numbers}")
        self._at_step()

    def bad(self, sample: BadSample) -> None:
        """Name a sample that cannot be used, the first few at least."""
        self._num_bad += 1
        if self._num_bad <= _LISTED:
            self.skipped(sample)
        elif self._num_bad == _LISTED + 1:
            self.line("skipped more samples")
        self._at_step()

    def say(self, line: str) -> None:
        """Print a line."""
        self.line(line)


def _numbers(curves: Curves, width: int) -> str:
    """The last steps' means."""

    def mean(values: Sequence[float]) -> float:
        return sum(values[-width:]) / len(values[-width:])

    answers, budget = mean(curves.answers), mean(curves.budget)
    return (
        f"loss {answers + budget:.4f}, of answers {answers:.4f}; {mean(curves.tokens):.1f} visual tokens; "
        f"{mean(curves.right):.1%} right"
    )
