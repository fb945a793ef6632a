"""Compiled kernels outlive a process; a file that is of no use costs a warning and no answer."""

import warnings
from pathlib import Path

import pytest

from edgeprune.runtimes.kernel_cache import KernelCache


class CacheDouble:
    """``IRuntimeCache``: takes what begins with its mark."""

    def __init__(self) -> None:
        self.kernels = b"mark"

    def deserialize(self, blob: bytes) -> bool:
        taken = bytes(blob).startswith(b"mark")
        self.kernels = bytes(blob) if taken else self.kernels
        return taken

    def serialize(self) -> memoryview:
        return memoryview(self.kernels)


class ConfigDouble:
    """``IRuntimeConfig``."""

    cache: CacheDouble | None = None

    def create_runtime_cache(self) -> CacheDouble:
        return CacheDouble()

    def set_runtime_cache(self, cache: CacheDouble) -> None:
        self.cache = cache


def attached(cache: KernelCache) -> CacheDouble:
    config = ConfigDouble()
    cache.attach(config)
    assert config.cache is not None
    return config.cache


def test_kernels_are_there_again(tmp_path):
    path = tmp_path / "new" / "kernels"
    first = KernelCache(path)
    kernels = attached(first)
    assert attached(first) is kernels, "all contexts share one"
    kernels.kernels += b" of one shape"
    first.keep()
    assert path.read_bytes() == b"mark of one shape"
    assert list(path.parent.iterdir()) == [path]
    assert attached(KernelCache(path)).kernels == b"mark of one shape"


def test_nothing_new_writes_nothing(tmp_path):
    path = tmp_path / "kernels"
    path.write_bytes(b"mark")
    before = path.stat().st_mtime_ns
    cache = KernelCache(path)
    cache.keep()
    attached(cache)
    cache.keep()
    assert path.stat().st_mtime_ns == before


def test_a_file_that_tensorrt_refuses_is_replaced(tmp_path):
    path = tmp_path / "kernels"
    path.write_bytes(b"damaged")
    cache = KernelCache(path)
    assert attached(cache).kernels == b"mark"
    cache.keep()
    assert path.read_bytes() == b"mark"


@pytest.mark.parametrize("place", ["folder", "behind a file"])
def test_a_place_that_cannot_be_used_costs_a_warning(tmp_path, place):
    path = Path(tmp_path / "kernels")
    if place == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"")
        path = path / "below"
    cache = KernelCache(path)
    with pytest.warns(UserWarning, match=r"cannot be read in .*: they are compiled again"):
        assert attached(cache).kernels == b"mark"
    with pytest.warns(UserWarning, match=r"cannot be written in .*: they are compiled again"):
        cache.keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KernelCache(tmp_path / "other").keep()
