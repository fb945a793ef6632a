"""A progress bar per graph for the command line."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressBars:
    """Draws one bar per graph on standard error; without a terminal, one line per finished graph.

    Args:
        at_step: Called between two steps of the export, where it may raise to end it.
    """

    def __init__(self, at_step: Callable[[], None] = lambda: None) -> None:
        self._at_step = at_step
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[name]:<10}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """Move a graph's bar."""
        self._at_step()
        if self._bars is None:
            if done == steps:
                self._console.print(f"{name}: {step}", highlight=False, soft_wrap=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(step, total=steps, name=name)
        self._bars.update(self._tasks[name], completed=done, description=step)

    def warning(self, line: str) -> None:
        """Print a line that does not end what is done."""
        self._console.print(f"edgeprune: {line}", highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
