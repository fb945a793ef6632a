"""``python -m edgeprune.runtimes.profiling.memory_probe JOB``: answer once and print the peak of this process' memory.

Linux keeps the peak of a process in its status; elsewhere ``getrusage`` has it, in units of the system's own.
"""

import json
import sys
from pathlib import Path

import edgeprune


def main(job: str) -> None:
    """Do what the JSON text says (:func:`edgeprune.runtimes.profiling.memory.measure_memory`)."""
    request = json.loads(job)
    options = edgeprune.SamplingOptions(max_new_tokens=request["max_new_tokens"], ignore_eos=True)
    with edgeprune.open_session(
        request["bundle"],
        backend=request["backend"],
        provider=request["provider"],
        threads=request["threads"],
    ) as session:
        session.answer(request["pictures"], request["prompt"], options)
        sys.stdout.write(f"{peak_bytes()}\n")


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1])
