"""Ctrl-C that is never lost."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Remembers a Ctrl-C, so that long work can ask for it between its steps.

    Python raises ``KeyboardInterrupt`` wherever it happens to be. In a destructor or in the callback of a
    weak reference (PyTorch's tracer spends much of its time there) the interpreter prints and drops it, and
    libraries that are called back from C++ may turn it into errors of their own. Inside this context a dropped
    one is made up for at the next ``check``, and a converted one becomes a ``KeyboardInterrupt`` at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        self._report_unraisable = sys.unraisablehook

    def __enter__(self) -> "Interruption":
        # Only the main thread may set handlers; who ignores Ctrl-C (nohup, a background job) keeps doing so.
        mine = threading.current_thread() is threading.main_thread()
        if mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
            self._report_unraisable, sys.unraisablehook = sys.unraisablehook, self._drop_own
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            sys.unraisablehook = self._report_unraisable
        if self.requested and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def check(self) -> None:
        """Stop here if Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: It was.
        """
        if self.requested:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler's
        self.requested = True
        raise KeyboardInterrupt

    def _drop_own(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """``check`` raises again what was dropped, so there is nothing to report."""
        if not (self.requested and isinstance(unraisable.exc_value, KeyboardInterrupt)):
            self._report_unraisable(unraisable)
