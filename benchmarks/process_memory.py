"""Memory of a process that is measured, without importing anything that would add to it."""

from pathlib import Path


def own_memory(field: str) -> int:
    """Bytes of this process, by the kernel's name (Linux).

    "VmHWM" is the most that was resident at once, "RssAnon" what is now and belongs to no file, "RssFile" what is now
    and is mapped from files. ``getrusage`` would answer with the parent's peak where that is larger.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])
