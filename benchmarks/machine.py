"""The machine that a benchmark ran on: lines about it, and the rate that no matrix product exceeds."""

import datetime as dt
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

from edgeprune.available_cores import available_cores


def describe_machine() -> str:
    """Date, processor, cores and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        model = fields.get("model name", model)
        # A virtual machine may call every generation by the same name.
        if "cpu family" in fields:
            model += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    return f"{today}, {model}, {available_cores()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def describe_versions(*packages: str) -> str:
    """Versions of installed packages."""
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def gemm_rate(rows: int, inner: int, columns: int, repeats: int = 30) -> float:
    """The best of ``repeats`` float32 matrix products with torch on all cores, FLOP/s."""
    left, right = torch.rand(rows, inner), torch.rand(inner, columns)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.matmul(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best
