"""Workers of Ray find what this process finds, also when one of them is killed."""

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from noise_data import write_data

from edgeprune.bundle import Bundle
from edgeprune.calib.calibration import CalibrationOptions, calibrate
from edgeprune.calib.ray_runner import RayRunner
from edgeprune.calib.runner import Engine, Outcome
from edgeprune.calib.samples import Sample
from edgeprune.errors import BackendError, DataError

COUNT = 24
OPTIONS = CalibrationOptions(max_new_tokens=24)


def workers() -> list[int]:
    """Ray's processes that run samples for this one: children of a child."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "cmdline").read_bytes()
            parent = _parent(entry)
            if name.startswith(b"ray::MapWorker") and _parent(Path("/proc") / str(parent)) == os.getpid():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _parent(entry: Path) -> int:
    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])


@dataclass
class WithAccident:
    """Ray's runner, of which one worker is killed as soon as the first record has come.

    Attributes:
        runner: Ray's.
        killed: The worker.
    """

    runner: RayRunner
    killed: int | None = None

    @property
    def engine(self) -> Engine:
        return self.runner.engine

    def run(self, bundle: Path, samples: Sequence[Sample], max_new_tokens: int) -> Iterator[Outcome]:
        for found in self.runner.run(bundle, samples, max_new_tokens):
            if self.killed is None:
                self.killed = workers()[0]
                os.kill(self.killed, signal.SIGKILL)
            yield found


@pytest.mark.slow
def test_counts_are_identical_although_a_worker_is_killed(atp_bundle, tmp_path):
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'edgeprune[ray]'")
    data = write_data(tmp_path / "data", COUNT)
    lines = data.read_text().splitlines()
    lines[5] = '{"image": "none.png", "prompt": "What?"}'
    data.write_text("\n".join(lines))
    here, there = (Path(shutil.copytree(atp_bundle, tmp_path / name)) for name in ("here", "there"))
    runner = WithAccident(RayRunner(Engine(), workers=2))
    on_ray = calibrate(there, data, OPTIONS, runner=runner)
    assert runner.killed is not None
    assert not Path(f"/proc/{runner.killed}").exists()
    assert (on_ray.samples, on_ray.skipped) == (COUNT - 1, 1)
    assert on_ray == calibrate(here, data, OPTIONS)
    assert Bundle.open(there).manifest == Bundle.open(here).manifest
    assert not workers()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there(atp_bundle, tmp_path, address):
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'edgeprune[ray]'")
    data = write_data(tmp_path / "data", 1)
    bundle = Path(shutil.copytree(atp_bundle, tmp_path / "atp"))
    with pytest.raises(BackendError, match=f"nothing answers at {address}"):
        calibrate(bundle, data, OPTIONS, runner=RayRunner(Engine(), address))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atp", "data"]


def test_no_workers():
    with pytest.raises(DataError, match="--workers is 0"):
        RayRunner(Engine(), workers=0)
