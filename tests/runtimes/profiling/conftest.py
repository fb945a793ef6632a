"""One profile that many tests read."""

from pathlib import Path

import pytest

from edgeprune.export.check_pictures import check_pictures
from edgeprune.runtimes.profiling import machine_peak
from edgeprune.runtimes.profiling.profiler import Profile, ProfileOptions, profile
from edgeprune.runtimes.profiling.samples import GIVEN, ProfileSample, SampleSet


@pytest.fixture(scope="session", autouse=True)
def _quick_peak():
    """The machine's peak in milliseconds: tests look at what is made of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_peak, "_ENOUGH_SECONDS", 0.0)
        patch.setattr(machine_peak, "_SMALLEST", 128)
        patch.setattr(machine_peak, "_COPIED_BYTES", 2**20)
        yield


@pytest.fixture(scope="session")
def atp_unpruned_bundle(atp_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``atp_folder`` exported without its pruning."""
    from edgeprune.export.exporter import export

    return export(atp_folder, tmp_path_factory.mktemp("bundle") / "atp-unpruned", methods=()).path


@pytest.fixture(scope="session")
def samples() -> SampleSet:
    """Two pictures with a name that a page has to escape."""
    pictures = check_pictures(2, size=(60, 40))
    return SampleSet(
        GIVEN,
        tuple(
            ProfileSample(name, (picture,), "What colour is the circle?")
            for name, picture in zip(("<b>first</b> & only", "second"), pictures, strict=True)
        ),
        left_out=3,
    )


@pytest.fixture(scope="session")
def profiled(atp_bundle: Path, atp_unpruned_bundle: Path, samples: SampleSet) -> Profile:
    """ATP against its unpruned twin, three runs, predicted for two devices."""
    options = ProfileOptions(
        runs=3, warmup=1, max_new_tokens=3, threads=1, targets=("agx-orin-64", "rtx40"), precision="int8"
    )
    return profile(atp_bundle, samples, against=[atp_unpruned_bundle], options=options)
