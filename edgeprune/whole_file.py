"""Files that are there as a whole or not at all."""

import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: Any) -> None:
    """Write aside and rename, so that an interrupted write leaves what was there.

    Args:
        path: The file.
        data: Bytes, or a buffer of them.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
