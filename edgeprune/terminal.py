"""The terminal that tables are printed to."""

import sys

from rich.console import Console


def console() -> Console:
    """A console that keeps whole tables when the output is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=110)
