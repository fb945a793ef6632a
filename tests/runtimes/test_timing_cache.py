"""TensorRT's timings: kept whole, told apart by their owner, and never the reason that a build fails."""

from pathlib import Path

import pytest

from edgeprune.runtimes.tensorrt_library import library_for
from edgeprune.runtimes.timing_cache import TimingCache, timing_cache_of
from edgeprune.runtimes.user_cache import user_cache
from edgeprune.targets import find_target

OWNER = "tensorrt 10.3.0, SM 87, Jetson AGX Orin"


class Timings:
    """What TensorRT's builder gives; without a GPU it measures nothing."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class Config:
    """TensorRT's builder configuration, which refuses the timings in ``refused``."""

    def __init__(self, refused: bytes = b"?", *, returns_none: bool = False) -> None:
        self.refused, self.returns_none = refused, returns_none

    def create_timing_cache(self, data: bytes) -> Timings | None:
        return None if self.returns_none and data else Timings(data)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.attached = cache
        return cache.data != self.refused


def opened(path: Path, warnings: list[str], owner: str = OWNER) -> TimingCache:
    return TimingCache(path, owner, warnings.append)


def test_what_was_measured_is_there_at_the_next_build(tmp_path):
    path, warnings = tmp_path / "deep" / "orin.timings", []
    first = opened(path, warnings)
    assert first.attach(Config()).data == b""
    first.keep(Timings(b"\x00measured\xff"))
    second = opened(path, warnings)
    config = Config()
    assert second.attach(config).data == b"\x00measured\xff"
    assert config.attached.data == b"\x00measured\xff"
    assert warnings == []
    assert [found.name for found in path.parent.iterdir()] == ["orin.timings"]


def test_one_build_uses_what_it_measured_before(tmp_path):
    cache = opened(tmp_path / "a", [])
    cache.keep(Timings(b"first graph"))
    assert cache.attach(Config()).data == b"first graph"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "folder"])
def test_damaged_or_foreign_timings_cost_one_line(tmp_path, damage):
    path, warnings = tmp_path / "orin.timings", []
    opened(path, []).keep(Timings(b"0123456789"))
    content = path.read_bytes()
    if damage == "foreign":
        opened(path, [], OWNER.replace("10.3.0", "10.7.0")).keep(Timings(b"0123456789"))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": content[:-1], "flipped": content[:-1] + b"\x00", "empty": b""}[damage])
    cache = opened(path, warnings)
    assert cache.attach(Config()).data == b""
    (line,) = warnings
    assert str(path) in line
    assert "measured again" in line
    if damage != "folder":
        cache.keep(Timings(b"new"))
        assert opened(path, warnings).attach(Config()).data == b"new"
        assert len(warnings) == 1


@pytest.mark.parametrize("config", [Config(refused=b"old"), Config(returns_none=True)])
def test_timings_that_tensorrt_refuses_are_measured_again(tmp_path, config):
    path, warnings = tmp_path / "orin.timings", []
    opened(path, warnings).keep(Timings(b"old"))
    assert opened(path, warnings).attach(config).data == b""
    assert config.attached.data == b""
    assert len(warnings) == 1


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    warnings = []
    cache = opened(tmp_path / "file" / "orin.timings", warnings)
    cache.attach(Config())
    cache.keep(Timings(b"one"))
    cache.keep(Timings(b"two"))
    assert len([line for line in warnings if "cannot write the timings" in line]) == 1


def test_the_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "edgeprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache() == tmp_path / "home" / ".cache" / "edgeprune"


def test_tensorrt_for_rtx_times_nothing():
    """Its own cache object stays as empty after a build as before; reading one back takes a driver."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is in the extra 'dev' on x86-64 Linux")
    target = find_target("rtx40")
    assert timing_cache_of(library_for(target), target, pytest.fail) is None


def test_timings_are_told_apart_by_tensorrt_its_version_and_the_gpu(tmp_path, monkeypatch):
    import types

    from edgeprune.runtimes.tensorrt_library import TensorRtLibrary

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = set()
    for version, target in (("10.3.0", "agx-orin-64"), ("10.7.0", "agx-orin-64"), ("10.3.0", "rtx30")):
        library = TensorRtLibrary("tensorrt", version, types.ModuleType("tensorrt"))
        cache = timing_cache_of(library, find_target(target), pytest.fail)
        assert cache is not None
        assert version in cache.owner
        assert cache.path.parent == tmp_path / "edgeprune"
        paths.add(cache.path)
    assert len(paths) == 3
