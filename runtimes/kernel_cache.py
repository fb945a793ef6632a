"""The kernels that TensorRT for RTX compiles when engines first run, kept from one process to the next.

Without it every ``edgeprune run`` compiles them again. TensorRT checks by itself whether a cache is whole and of this
GPU, version and driver, and refuses it otherwise. Nothing depends on it but the time of the first answer, so a file
that cannot be used or written costs a warning.
"""

import warnings
from pathlib import Path
from typing import Any

from edgeprune.whole_file import write_whole


class KernelCache:
    """The kernels of one GPU and one version of TensorRT for RTX.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None
        self._kept = b""

    def attach(self, config: Any) -> None:
        """Let an execution context that is made with this configuration use the kernels and add to them."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._kept = self._read()
            # Refused: of another driver or damaged. It stays empty and replaces the file at the end.
            if self._kept and not self._cache.deserialize(self._kept):
                self._kept = b""
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled since, whole or not at all."""
        if self._cache is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        if data == self._kept:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, data)
            self._kept = data
        except OSError as error:
            self._warn("written", error)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._warn("read", error)
            return b""

    def _warn(self, done: str, error: OSError) -> None:
        warnings.warn(
            f"TensorRT's kernels cannot be {done} in {self.path} ({error.strerror or error}): they are compiled again",
            stacklevel=3,
        )
