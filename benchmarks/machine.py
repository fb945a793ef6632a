"""One line about the machine that a benchmark ran on."""

import datetime as dt
import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Date, processor, cores and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    return f"{today}, {model}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"
