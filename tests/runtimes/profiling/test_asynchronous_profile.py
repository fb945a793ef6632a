"""A profile of TensorRT engines, whose graphs run on after the host has started them, on a double of the runtime."""

import shutil
from pathlib import Path

import pytest
from tensorrt_double import GpuDouble, add_engines

from edgeprune.runtimes.engine_profiles import SPLIT
from edgeprune.runtimes.profiling.measuring import measure
from edgeprune.runtimes.profiling.profiler import ProfileOptions, profile
from edgeprune.runtimes.session import open_session

pytestmark = pytest.mark.xdist_group("engines")


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> GpuDouble:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = GpuDouble()
    machine.install(monkeypatch)
    return machine


@pytest.fixture
def folder(atp_bundle: Path, tmp_path: Path) -> Path:
    """ATP with engines."""
    copy = Path(shutil.copytree(atp_bundle, tmp_path / "bundle"))
    add_engines(copy, SPLIT)
    return copy


def test_stages_are_waited_for_in_an_answer_of_their_own(folder, gpu, samples):
    with open_session(folder, backend="tensorrt") as session:
        sample = samples.samples[0]
        before = gpu.waits
        session.answer(sample.pictures, sample.prompt)
        ((run,),) = measure([session], [sample], runs=1, warmup=0, max_new_tokens=2)
    # Three sites and two tokens in the undisturbed answer; in the other one every span waits, too.
    assert len(run.stages) == len(run.spans)
    assert gpu.waits - before > 2 * len(run.stages)


def test_without_onnxruntime_there_is_no_peak(folder, gpu, samples):
    options = ProfileOptions(runs=1, warmup=0, max_new_tokens=2, backend="tensorrt")
    report = profile(folder, samples, options=options).report
    assert report.machine.device == "tensorrt"
    assert (report.peak, report.knee_tokens) == (None, None)
    assert any("peak was not measured" in note for note in report.notes)
    (bundle,) = report.bundles
    assert {stage.roofline for stage in bundle.stages} == {None}
    # The process of its own finds no GPU here.
    assert bundle.memory.host_peak is None
