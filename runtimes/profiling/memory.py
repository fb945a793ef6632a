"""How much memory a bundle takes, measured in a process of its own: two bundles in one would share a peak."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from edgeprune.runtimes.preprocessing import read_picture
from edgeprune.runtimes.profiling.samples import ProfileSample

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class MemoryRequest:
    """What the process is to do.

    Attributes:
        bundle: Folder of the bundle.
        backend: As :func:`edgeprune.open_session` takes it.
        provider: As :func:`edgeprune.open_session` takes it.
        threads: As :func:`edgeprune.open_session` takes it.
        max_new_tokens: Of the answer.
    """

    bundle: Path
    backend: str
    provider: str | None
    threads: int | None
    max_new_tokens: int


def measure_memory(request: MemoryRequest, sample: ProfileSample) -> tuple[int | None, int | None]:
    """Open the bundle alone, answer once, and return the peak of host and of device memory in bytes.

    The host's is of the whole process, interpreter and libraries included. The device's is what the memory in use grew
    by, as nvidia-smi sees it: of all processes, so others must be quiet. None where it cannot be known.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-memory-") as folder:
        paths: list[str] = []
        for index, picture in enumerate(sample.pictures):
            path = Path(folder) / f"{index}.png"
            read_picture(picture).save(path)
            paths.append(str(path))
        job = {
            "bundle": str(request.bundle),
            "backend": request.backend,
            "provider": request.provider,
            "threads": request.threads,
            "max_new_tokens": request.max_new_tokens,
            "pictures": paths,
            "prompt": sample.prompt,
        }
        before = device_memory_in_use()
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeprune.runtimes.profiling.memory_probe", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        most = before
        try:
            while before is not None and process.poll() is None:
                now = device_memory_in_use()
                most = max(value for value in (most, now, 0) if value is not None)
                time.sleep(_POLL_SECONDS)
            output, _ = process.communicate()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    host = int(output) if process.returncode == 0 and output.strip().isdigit() else None
    device = None if before is None or most is None else max(0, most - before)
    return host, device


def device_memory_in_use() -> int | None:
    """Bytes in use on the first NVIDIA GPU; None where nvidia-smi does not say, as on a Jetson."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    ran = subprocess.run(query, capture_output=True, text=True, check=False)
    first = ran.stdout.strip().partition("\n")[0]
    return int(first) * 2**20 if ran.returncode == 0 and first.isdigit() else None
