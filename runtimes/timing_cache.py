"""How long TensorRT's kernels took on this GPU, kept from one build to the next.

Trying kernels is most of what TensorRT does while it builds, and layers of equal sizes need it once. The file lies in
the user's cache folder, one per TensorRT, version and GPU, and not in a bundle: exporting again replaces the bundle
just when the timings are wanted again, and other bundles have the same layers. Nothing depends on it but the time that
a build takes, so whatever is wrong with it costs a warning and no more.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.runtimes.tensorrt_library import TensorRtLibrary
from edgeprune.runtimes.user_cache import user_cache
from edgeprune.targets import Target
from edgeprune.this_machine import this_machine
from edgeprune.whole_file import write_whole


class TimingCache:
    """The timings of one GPU.

    Args:
        path: The file; it need not exist.
        owner: What the timings are of, in one line: TensorRT, its version, the GPU.
        warn: Hears one line where the file cannot be used or written.
    """

    def __init__(self, path: Path, owner: str, warn: Callable[[str], None]) -> None:
        self.path = path
        self.owner = owner
        self._warn = warn
        self._writable = True
        self._data = self._read()

    def attach(self, config: Any) -> Any:
        """Give the timings to TensorRT's builder configuration; the result goes to :meth:`keep` after building."""
        cache = config.create_timing_cache(self._data)
        if cache is None or not config.set_timing_cache(cache, False):
            self._warn(f"TensorRT does not take the timings in {self.path}: they are measured again")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache

    def keep(self, cache: Any) -> None:
        """Write what TensorRT measured, whole or not at all."""
        data = bytes(memoryview(cache.serialize()))
        if data == self._data or not self._writable:
            return
        self._data = data
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, _head(self.owner, data) + data)
        except OSError as error:
            self._writable = False
            self._warn(
                f"cannot write the timings to {self.path} ({error.strerror or error}): the next build measures again"
            )

    def _read(self) -> bytes:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._warn(
                f"cannot read the timings in {self.path} ({error.strerror or error}): they are measured again"
            )
            return b""
        data = content[len(_head(self.owner, b"")) :]
        if content != _head(self.owner, data) + data:
            self._warn(f"the timings in {self.path} are damaged or of another GPU: they are measured again")
            return b""
        return data


def timing_cache_of(
    library: TensorRtLibrary, target: Target, warn: Callable[[str], None]
) -> TimingCache | None:
    """The timings of the GPU in this machine; None where the builder times nothing.

    TensorRT for RTX chooses kernels without trying them: its timing cache stays empty, engines are the same with and
    without one, and reading one takes a driver.
    """
    if library.is_rtx:
        return None
    # A target may stand for several cards.
    own = this_machine()
    gpu = target.title if own is None else own.title
    owner = f"{library.name} {library.version}, SM {target.sm}, {gpu}"
    name = re.sub(r"[^a-z0-9.]+", "-", owner.lower()).strip("-")
    return TimingCache(user_cache() / f"{name}.timings", owner, warn)


def _head(owner: str, data: bytes) -> bytes:
    """Tells whose timings follow, and that they are whole."""
    digest = hashlib.sha256(owner.encode() + b"\n" + data).hexdigest()
    return f"{owner}\n{digest}\n".encode()
