"""A bar that counts to a known number on standard error, and the lines beside it."""

from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edgeprune.calib.samples import BadSample

Bar = TypeVar("Bar", bound="CountBar")


class CountBar:
    """The bar of one command; without a terminal there are only the lines.

    Args:
        name: Of the command.
        silent: Whether nothing is told.
    """

    def __init__(self, name: str, *, silent: bool = False) -> None:
        self._console = Console(stderr=True, quiet=silent)
        self._bar = Progress(
            TextColumn(name),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=silent or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self: Bar) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def drawn(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._console.is_terminal

    def move(self, done: int, total: int, description: str) -> None:
        """Show how far it is."""
        self._bar.update(self._task, completed=done, total=total, description=description)

    def skipped(self, sample: BadSample) -> None:
        """Name a sample that cannot be used."""
        self.line(f"skipped {sample.name}: {' '.join(sample.reason.split())}")

    def line(self, text: str) -> None:
        """Print a line beside the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
