"""The machine that a profile was measured on."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from edgeprune.available_cores import available_cores


@dataclass(frozen=True)
class MachineEntry:
    """A machine.

    Attributes:
        processor: Its name, as the system gives it.
        system: Operating system and architecture.
        cores: That this process may use.
        memory_bytes: Of the host; None where the system does not say.
        device: What the graphs ran on.
        board: Of an embedded system; empty elsewhere.
    """

    processor: str
    system: str
    cores: int
    memory_bytes: int | None
    device: str
    board: str


def describe_machine(device: str) -> MachineEntry:
    """Ask the system."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = None
    return MachineEntry(
        processor=_processor(),
        system=f"{platform.system()} {platform.machine()}",
        cores=available_cores(),
        memory_bytes=memory,
        device=device,
        board=_read("/proc/device-tree/model").strip("\0\n "),
    )


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
