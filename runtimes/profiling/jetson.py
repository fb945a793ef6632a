"""Power, power mode and clocks of a Jetson, read from jetson-stats while bundles answer.

Written after jetson-stats 4's documentation; not executed on a Jetson yet. Without the package, or without its
service, there is simply nothing to report.
"""

import importlib
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from edgeprune.runtimes.profiling.report import EnergyEntry

_INTERVAL = 0.1
Reading = tuple[float, float]
"""``time.perf_counter`` and watts of the whole board."""


class PowerSensor:
    """Reads the board's power in a thread of its own while it is open.

    Attributes:
        readings: So far.
        state: Power mode and clocks when it was opened; empty without jetson-stats.
    """

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.state: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._jtop: Any = None

    def __enter__(self) -> "PowerSensor":
        try:
            stats = importlib.import_module("jtop")
        except ImportError:
            return self
        try:
            self._jtop = stats.jtop(interval=_INTERVAL)
            self._jtop.start()
        except stats.JtopException:  # its service does not run, or may not be asked
            self._jtop = None
            return self
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._jtop.close()

    def _read(self) -> None:
        while not self._stop.is_set() and self._jtop.ok():
            stats = self._jtop.stats
            if not self.state:
                self.state = board_state(stats, self._jtop.gpu)
            if "Power TOT" in stats:
                self.readings.append((time.perf_counter(), stats["Power TOT"] / 1000))


def board_state(stats: dict[str, Any], gpus: dict[str, Any]) -> dict[str, str]:
    """What jetson-stats says about power mode and clocks, in words."""
    state = {
        "nvpmodel": str(stats.get("nvp model", "unknown")),
        "jetson_clocks": str(stats.get("jetson_clocks", "unknown")),
    }
    for name, gpu in gpus.items():
        state[f"{name} clock"] = f"{gpu['freq']['cur'] / 1000:.0f} MHz"
    return state


def energy(
    readings: Sequence[Reading], intervals: Sequence[tuple[float, float]], tokens: int
) -> EnergyEntry | None:
    """The mean power inside of intervals, and the energy of a token.

    Args:
        readings: Of the sensor.
        intervals: When one bundle answered, start and end in seconds.
        tokens: Generated in all of them.

    Returns:
        None if no reading lies inside.
    """
    inside = [watts for at, watts in readings if any(start <= at <= end for start, end in intervals)]
    if not inside or tokens < 1:
        return None
    watts = sum(inside) / len(inside)
    return EnergyEntry(watts, watts * sum(end - start for start, end in intervals) / tokens, len(inside))
