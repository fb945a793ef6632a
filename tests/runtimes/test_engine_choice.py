"""Which engines run on a GPU, and which profile takes which sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calibrations import calibration_of
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError
from edgeprune.manifest import EngineEntry, EngineSetEntry, FileEntry, Manifest, ProfileEntry
from edgeprune.runtimes.backend import DeviceTensor
from edgeprune.runtimes.engine_choice import (
    choose_engines,
    choose_profile,
    dimension_places,
    dimension_sizes,
    longest_sequence,
)
from edgeprune.runtimes.engine_profiles import ONE, SPLIT, Limits, profiles


@pytest.fixture
def atp(atp_bundle: Path) -> Manifest:
    return Bundle.open(atp_bundle).manifest


def engines(manifest: Manifest, **changes: object) -> EngineSetEntry:
    entries = {
        name: EngineEntry(FileEntry(f"{name}.engine", "0" * 64, 1), "", graph.file.sha256, (), 1.0)
        for name, graph in manifest.graphs.items()
    }
    entry = EngineSetEntry("", "tensorrt", "10.3.0", 87, "fp16", None, "one", {}, entries)
    return replace(entry, **changes)


def test_the_engines_of_gpu_library_and_version_are_taken(atp):
    there = {
        "other GPU": engines(atp, sm=86),
        "other library": engines(atp, builder="tensorrt_rtx"),
        "other version": engines(atp, tensorrt_version="10.3.0.26"),
        "this": engines(atp),
    }
    manifest = replace(atp, engines=there)
    name, entry = choose_engines(manifest, 87, {"tensorrt": "10.3.0"})
    assert (name, entry) == ("this", there["this"])
    assert choose_engines(manifest, 87, {"tensorrt_rtx": "10.3.0", "tensorrt": "11"})[0] == "other library"


def test_what_does_not_fit_is_named(atp):
    build = "edgeprune build BUNDLE --target this"
    with pytest.raises(BackendError, match=f"^the bundle has no engines: {build}$"):
        choose_engines(atp, 87, {"tensorrt": "10.3.0"})
    manifest = replace(atp, engines={"orin": engines(atp)})
    with pytest.raises(BackendError, match=rf"engines for orin \(SM 87\), and this GPU is SM 89: {build}$"):
        choose_engines(manifest, 89, {"tensorrt": "10.3.0"})
    with pytest.raises(BackendError, match=r"are of tensorrt 10\.3\.0, .* installed is tensorrt 10\.16\.2: "):
        choose_engines(manifest, 87, {"tensorrt": "10.16.2"})
    older = engines(atp)
    embed = replace(older.engines["embed"], onnx_sha256="1" * 64)
    older = replace(older, engines={**older.engines, "embed": embed})
    with pytest.raises(BackendError, match="'orin' were built from other graphs than the bundle has now"):
        choose_engines(replace(atp, engines={"orin": older}), 87, {"tensorrt": "10.3.0"})
    fewer = {name: entry for name, entry in engines(atp).engines.items() if name != "embed"}
    lacking = replace(atp, engines={"orin": engines(atp, engines=fewer)})
    with pytest.raises(BackendError, match="were built from other graphs"):
        choose_engines(lacking, 87, {"tensorrt": "10.3.0"})


RANGES = st.tuples(*[st.integers(0, 20)] * 3).map(lambda sizes: tuple(sorted(sizes)))
PROFILES = st.lists(st.fixed_dictionaries({"sequence": RANGES, "past": RANGES}), min_size=1, max_size=4)


@given(ranges=PROFILES, sequence=st.integers(0, 20), past=st.integers(0, 20))
def test_the_chosen_profile_holds_the_sizes_and_no_smaller_one_does(ranges, sequence, past):
    entries = [ProfileEntry(str(index), one) for index, one in enumerate(ranges)]
    sizes = {"sequence": sequence, "past": past}

    def holds(entry: ProfileEntry) -> bool:
        return all(entry.ranges[dim][0] <= sizes[dim] <= entry.ranges[dim][2] for dim in sizes)

    def volume(entry: ProfileEntry) -> int:
        return max(1, entry.ranges["sequence"][2]) * max(1, entry.ranges["past"][2])

    if not any(holds(entry) for entry in entries):
        with pytest.raises(
            BackendError, match=r"^segment0: (sequence|past) is \d+, the engine was built for"
        ):
            choose_profile("segment0", entries, sizes)
        return
    chosen = entries[choose_profile("segment0", entries, sizes)]
    assert holds(chosen)
    assert volume(chosen) == min(volume(entry) for entry in entries if holds(entry))


def test_prefill_and_decode_have_profiles_of_their_own(atp):
    kept, buckets = [[20, 30], [8, 9], [2, 2]], {"segment1": [(1, 84, 94), (95, 100, 512)]}
    calibrated = replace(atp, calibration=calibration_of(atp, kept, buckets))
    found = profiles(calibrated, Limits.of(atp), SPLIT)["segment1"]
    names = [entry.name for entry in found]
    assert names == ["prefill0", "prefill1", "decode"]
    for sequence, past, expected in (
        (1, 0, "prefill0"),
        (94, 0, "prefill0"),
        (95, 0, "prefill1"),
        (512, 0, "prefill1"),
        (1, 1, "decode"),
        (1, 511, "decode"),
    ):
        assert names[choose_profile("segment1", found, {"sequence": sequence, "past": past})] == expected
    with pytest.raises(BackendError, match=r"past is 512, .*1 … 511: build with a larger --max-sequence"):
        choose_profile("segment1", found, {"sequence": 1, "past": 512})


@pytest.mark.parametrize("strategy", [ONE, SPLIT])
def test_the_longest_sequence_is_that_of_the_build(atp, strategy):
    found = profiles(atp, Limits.of(atp, 1, 100), strategy)
    entries = {
        name: EngineEntry(FileEntry(name, "0" * 64, 1), "", "", found[name], 1.0) for name in atp.graphs
    }
    assert longest_sequence(atp, engines(atp, engines=entries)) == 100
    # A segment without layers has no cache.
    first = replace(entries["segment0"], profiles=(ProfileEntry("all", {"sequence": (1, 1, 9)}),))
    assert longest_sequence(atp, engines(atp, engines=entries | {"segment0": first})) == 100


def test_pictures_beyond_the_profile_name_their_option(atp):
    found = profiles(atp, Limits.of(atp, 2), SPLIT)["vision"]
    with pytest.raises(BackendError, match=r"vision: tiles is 3, .* 1 … 2: build with a larger --max-images"):
        choose_profile("vision", found, {"tiles": 3})


def test_sizes_come_from_shapes_and_values(combined_bundle):
    manifest = Bundle.open(combined_bundle).manifest
    graph = manifest.graphs["site0"]
    places = dimension_places(graph)
    assert places["num_keep"] == ("num_keep", None)
    assert places["sequence"][1] is not None
    expected = {dim: 3 + index for index, dim in enumerate(places)}
    inputs = {
        tensor.name: DeviceTensor(
            256,
            tuple(expected[dim] if isinstance(dim, str) else dim for dim in tensor.shape),
            np.dtype(tensor.dtype),
            None,
        )
        for tensor in graph.inputs
    }
    assert dimension_sizes(places, inputs, {"num_keep": expected["num_keep"]}) == expected
