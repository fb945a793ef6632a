"""The TensorRT backend on a double of CUDA and TensorRT: whole prompts give what ONNX Runtime gives."""

import gc
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorrt_double
from backend_comparison import (
    CPU,
    KINDS,
    PICTURES,
    QUESTION,
    answers,
    chain_of,
    compare_answers,
    compare_logits,
)
from click.testing import CliRunner
from tensorrt_double import SM, VERSION, GpuDouble, add_engines
from tiny_checkpoints import random_prompt

import edgeprune.plugins
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import BackendError, EngineError, PromptError
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.runtimes.cuda_device import CudaDevice
from edgeprune.runtimes.engine_profiles import DECODE, ONE, PREFILL, SPLIT, WHOLE, Limits, parse_profile_file
from edgeprune.runtimes.graph_chain import Stopwatch
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session

# The tests of engines export the same bundles.
pytestmark = pytest.mark.xdist_group("engines")


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory, monkeypatch) -> Path:
    """Where compiled kernels are kept."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "edgeprune"


@pytest.fixture
def gpu(monkeypatch) -> GpuDouble:
    machine = GpuDouble()
    machine.install(monkeypatch)
    return machine


def copy_of(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "bundle"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[str, Path]:
    """A bundle with engines."""
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    folder = copy_of(bundle, tmp_path_factory.mktemp("tensorrt"))
    add_engines(folder, SPLIT)
    return request.param, folder


def test_answers_are_those_of_onnxruntime(kind, gpu):
    name, folder = kind
    compare_answers(folder, name, backend="tensorrt")


def test_logits_are_those_of_onnxruntime(kind, gpu):
    compare_logits(kind[1], backend="tensorrt")


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("strategy", [ONE, SPLIT])
def test_both_libraries_and_strategies(atp_bundle, tmp_path, monkeypatch, library, strategy):
    gpu = GpuDouble(version="10.3.0")
    gpu.install(monkeypatch, library)
    folder = copy_of(atp_bundle, tmp_path)
    add_engines(folder, strategy, builder=library, version="10.3.0")
    assert answers(folder, tokens=4, backend="tensorrt") == answers(folder, tokens=4, **CPU)
    used = {profile for graph, profile in gpu.runs if graph.startswith("segment")}
    assert used == ({WHOLE} if strategy == ONE else {PREFILL, DECODE})
    # One context per engine and profile, however many prompts there were.
    assert len(gpu.contexts) == len(set(gpu.contexts)) == len(set(gpu.runs))
    if library == "tensorrt_rtx":
        # Kernels made for one length of a cache that grows would be thrown away at the next token.
        grows = {key for key, name in gpu.strategies.items() if name == "NONE"}
        assert {graph for graph, _ in grows} == {"segment0", "segment1", "segment2", "segment3"}
        assert {profile for _, profile in grows} == ({WHOLE} if strategy == ONE else {DECODE})


# What the host waits for


def test_the_host_waits_for_one_number_per_site_where_the_count_depends_on_the_picture(
    atp_bundle, tmp_path, gpu
):
    folder = copy_of(atp_bundle, tmp_path)
    add_engines(folder, SPLIT)
    session, chain = chain_of(folder, backend="tensorrt")
    ids, pixels = random_prompt(num_images=1, seed=1)
    tower = chain.encode_pictures(pixels, Stopwatch())
    assert (gpu.waits, gpu.read_bytes) == (0, 0)
    logits, sequence = chain.prefill(ids, tower, None, 4, Stopwatch())
    sites = len(session.bundle.manifest.sites)
    assert (gpu.waits, gpu.read_bytes) == (sites + 1, 8 * sites + logits.nbytes)
    before = gpu.waits, gpu.read_bytes
    chain.decode(20, sequence, Stopwatch())
    assert (gpu.waits, gpu.read_bytes) == (before[0] + 1, before[1] + logits.nbytes)


def test_the_host_waits_for_the_logits_alone_where_the_count_is_known(combined_bundle, tmp_path, gpu):
    folder = copy_of(combined_bundle, tmp_path)
    add_engines(folder, SPLIT)
    _, chain = chain_of(folder, backend="tensorrt")
    ids, pixels = random_prompt(num_images=2, seed=1)
    tower = chain.encode_pictures(pixels, Stopwatch())
    logits, _ = chain.prefill(ids, tower, None, 4, Stopwatch())
    assert (gpu.waits, gpu.read_bytes) == (1, logits.nbytes)


def test_the_table_of_places_is_uploaded_once_per_prompt(tmp_path, gpu, combined_bundle):
    folder = copy_of(combined_bundle, tmp_path)
    add_engines(folder, SPLIT)
    _, chain = chain_of(folder, backend="tensorrt")
    ids, pixels = random_prompt(num_images=2, seed=1)
    tower = chain.encode_pictures(pixels, Stopwatch())
    gpu.uploads.clear()
    chain.prefill(ids, tower, None, 4, Stopwatch())
    reading = [
        site.graph
        for site in chain.manifest.sites
        if any(entry.name == "visual_places" for entry in chain.manifest.graphs[site.graph].inputs)
    ]
    assert reading
    assert gpu.uploads.count(tower.layout.table.nbytes) == 1


def test_uploads_do_not_wait_until_their_page_locked_memory_is_full(gpu):
    device = CudaDevice()
    arrays = [np.full(1 << 18, value, np.int64) for value in range(5)]
    blocks = [device.upload(array) for array in arrays[:2]]
    assert gpu.waits == 0, "two of 2 MiB each fill it"
    blocks += [device.upload(array) for array in arrays[2:]]
    assert gpu.waits == 2
    for array, block in zip(arrays, blocks, strict=True):
        expected = array.copy()
        array[:] = -1  # the caller may use its memory for something else
        assert np.array_equal(device.download(block.address, array.shape, array.dtype), expected)


def test_an_upload_that_is_larger_than_the_page_locked_memory_is_waited_for(gpu):
    device = CudaDevice()
    array = np.arange(1 << 20, dtype=np.int64)
    block = device.upload(array)
    assert gpu.waits == 1
    array[:] = -1
    assert np.array_equal(device.download(block.address, array.shape, array.dtype), np.arange(1 << 20))


def test_nothing_is_allocated_from_the_second_token_on(atp_bundle, tmp_path, gpu):
    folder = copy_of(atp_bundle, tmp_path)
    add_engines(folder, SPLIT)
    _, chain = chain_of(folder, backend="tensorrt")
    ids, pixels = random_prompt(num_images=1, seed=1)
    tower = chain.encode_pictures(pixels, Stopwatch())
    _, sequence = chain.prefill(ids, tower, None, 20, Stopwatch())
    chain.decode(20, sequence, Stopwatch())
    before = gpu.mallocs
    for step in range(10):
        chain.decode(20 + step, sequence, Stopwatch())
    assert gpu.mallocs == before


def test_a_session_gives_its_memory_back(atp_bundle, tmp_path, gpu):
    folder = copy_of(atp_bundle, tmp_path)
    add_engines(folder, SPLIT)
    with open_session(folder, backend="tensorrt") as session:
        session.answer(PICTURES[:1], QUESTION, SamplingOptions(3))
        first = gpu.used()
        session.answer(PICTURES[:1], QUESTION, SamplingOptions(3))
        assert gpu.used() == first > 0
    del session
    gc.collect()
    assert gpu.used() == 0
    assert not gpu.page_locked


def test_compiled_kernels_outlive_a_session(folder, gpu, kernels):
    add_engines(folder, SPLIT)
    for opened in range(2):
        with open_session(folder, backend="tensorrt") as session:
            session.answer([], QUESTION, SamplingOptions(2))
        del session
        gc.collect()
        assert (gpu.kernels_read > 0) == (opened > 0)
        (file,) = kernels.iterdir()
        assert (file.name, file.stat().st_size) == (f"kernels-{VERSION}-sm{SM}", len(gpu.contexts))


@pytest.mark.parametrize("on_host", [(), ("num_keep", "keep_count")])
def test_numbers_on_the_device_and_on_the_host(combined_bundle, tmp_path, gpu, on_host):
    """TensorRT decides by itself which numbers are sizes to it."""
    folder = copy_of(combined_bundle, tmp_path)
    add_engines(folder, ONE, on_host=on_host)
    assert answers(folder, tokens=3, backend="tensorrt") == answers(folder, tokens=3, **CPU)


# What is refused, in one line


def refused(folder: Path, images: int = 1, tokens: int = 3) -> str:
    with pytest.raises(BackendError) as caught, open_session(folder, backend="tensorrt") as session:
        session.answer(PICTURES[:images], QUESTION, SamplingOptions(tokens))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(atp_bundle, tmp_path) -> Path:
    return copy_of(atp_bundle, tmp_path)


def test_a_bundle_without_engines(folder, gpu):
    assert refused(folder) == "the bundle has no engines: edgeprune build BUNDLE --target this"


def test_engines_of_another_gpu(folder, gpu):
    add_engines(folder, ONE, sm=120, target="rtx50")
    assert refused(folder).startswith(
        "the bundle has engines for rtx50 (SM 120), and this GPU is SM 89: edgeprune build"
    )


def test_engines_of_another_version(folder, gpu):
    add_engines(folder, ONE, version="1.6.0")
    message = refused(folder)
    assert "of tensorrt_rtx 1.6.0, and an engine runs with the very version that built it" in message
    assert f"installed is tensorrt_rtx {VERSION}: edgeprune build" in message


def test_prompts_beyond_the_profiles(folder, gpu):
    add_engines(folder, SPLIT, limits=(1, 100))
    message = "vision: tiles is 2, the engine was built for 1 … 1: build with a larger --max-images"
    assert message in refused(folder, 2)
    with open_session(folder, backend="tensorrt") as session:
        length = session.answer([], QUESTION, SamplingOptions(1)).prompt_tokens
        runs = len(gpu.runs)
        with pytest.raises(
            PromptError,
            match=r"exceed what the engines were built for, 100 by 1: .* a larger --max-sequence$",
        ):
            session.answer([], QUESTION, SamplingOptions(101 - length))
        assert len(gpu.runs) == runs
        assert session.answer([], QUESTION, SamplingOptions(100 - length)).finish_reason in ("length", "end")


def test_a_profile_that_is_too_short(folder, gpu):
    """A file of profiles may leave out what a prompt then needs."""
    manifest = Bundle.open(folder).manifest
    given = {"segment0": [{"sequence": [1, 20, 30], "past": [0, 0, 0]}, {"sequence": [1, 1, 1]}]}
    path = folder.parent / "profiles.json"
    path.write_text(json.dumps(given))
    add_engines(folder, ONE, chosen=parse_profile_file(path, manifest, Limits.of(manifest)))
    assert re.search(
        r"segment0: sequence is \d+, the engine was built for 1 … 30 or 1 … 1: .*larger --max-sequence",
        refused(folder, 1),
    )


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "empty"])
def test_a_damaged_engine(folder, gpu, damage):
    entry = add_engines(folder, ONE).engines["gather"]
    path = folder / entry.file.path
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-3], "changed": content, "empty": b""}[damage])
    before = (folder / MANIFEST_FILE).read_bytes()
    message = refused(folder)
    assert f"the engine {path.name} is" in message
    assert message.endswith(
        "build it again with edgeprune build BUNDLE --target this; the rest of the bundle is whole"
    )
    assert (folder / MANIFEST_FILE).read_bytes() == before
    assert Bundle.open(folder, check_all=True)


def test_an_engine_that_tensorrt_does_not_take(folder, gpu, monkeypatch):
    monkeypatch.setattr(tensorrt_double, "MAGIC", "another")
    add_engines(folder, ONE)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        gpu.install(patch)
        assert "does not take the engine vision-0000000000000000.engine (Assertion bufferSize" in refused(
            folder
        )


def test_engines_of_older_graphs(folder, gpu):
    add_engines(folder, ONE)
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    data["engines"]["double"]["engines"]["embed"]["onnx_sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    assert "were built from other graphs than the bundle has now" in refused(folder)


@pytest.mark.parametrize(("how", "reason"), [("says no", "a kernel failed"), ("raises", "Error in enqueue")])
def test_a_run_that_fails(folder, gpu, how, reason):
    add_engines(folder, ONE, failing={"projector": how})
    assert f"tensorrt_rtx {VERSION} failed in projector, profile 'all' ({reason}): " in refused(folder)


def test_the_command(folder, gpu):
    add_engines(folder, SPLIT)
    asked = ["run", str(folder), "--prompt", QUESTION, "--max-new-tokens", "4", "--json"]
    found = [
        CliRunner().invoke(main, [*asked, "--backend", backend]) for backend in ("tensorrt", "onnxruntime")
    ]
    ours, theirs = (json.loads(result.stdout) for result in found)
    assert ours["token_ids"] == theirs["token_ids"]
    wrong = CliRunner().invoke(main, [*asked, "--backend", "tensorrt", "--provider", "cuda"])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("edgeprune: --provider is of ONNX Runtime")


def test_too_little_memory(folder, gpu):
    add_engines(folder, ONE)
    gpu.capacity = 40_000
    assert "the GPU has no" in refused(folder)
    assert gpu.used() <= gpu.capacity


def test_too_little_memory_for_an_engine(folder, gpu):
    add_engines(folder, ONE, failing={"segment1": "memory"})
    assert "(Error Code 2: OutOfMemory (Requested size was 5 bytes.)): close other programs" in refused(
        folder
    )


def test_a_missing_plugin(folder, gpu, monkeypatch, tmp_path):
    add_engines(folder, ONE, plugin="1")
    monkeypatch.setenv("EDGEPRUNE_PLUGIN", str(tmp_path / "none.so"))
    with pytest.raises(EngineError, match=r"the plugin library .*none\.so does not exist: build it with"):
        open_session(folder, backend="tensorrt")


def test_the_plugins_that_engines_need_are_loaded_before_them(folder, gpu, monkeypatch):
    add_engines(folder, ONE, plugin="1")
    loaded = []
    monkeypatch.setattr(
        edgeprune.plugins, "load", lambda module, *, needed: loaded.append((module.__name__, needed))
    )
    with open_session(folder, backend="tensorrt") as session:
        assert session.answer([], QUESTION, SamplingOptions(2)).token_ids
    assert loaded == [("tensorrt_rtx", "1")]


def test_options_of_onnxruntime_are_refused(folder, gpu):
    add_engines(folder, ONE)
    for option in ({"provider": "cuda"}, {"threads": 2}):
        with pytest.raises(BackendError, match=f"--{next(iter(option))} is of ONNX Runtime"):
            open_session(folder, backend="tensorrt", **option)


def test_no_tensorrt_is_installed(folder, gpu, monkeypatch):
    add_engines(folder, ONE)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        EngineError, match=r"no TensorRT is installed to run engines: pip install 'edgeprune\[rtx\]'"
    ):
        open_session(folder, backend="tensorrt")


def test_two_answers_at_a_time(folder, gpu):
    """Streams that are read in turn share contexts and scratch memory and have caches of their own."""
    add_engines(folder, SPLIT)
    options = SamplingOptions(max_new_tokens=6)
    with open_session(folder, backend="tensorrt") as session:
        alone = [list(session.generate([picture], QUESTION, options)) for picture in PICTURES[:2]]
        streams = [session.generate([picture], QUESTION, options) for picture in PICTURES[:2]]
        turns: list[list[str]] = [[], []]
        for _ in range(max(map(len, alone))):
            for turn, stream in zip(turns, streams, strict=True):
                turn += [piece for piece in [next(stream, None)] if piece is not None]
        assert turns == alone


def test_threads_share_a_session(folder, gpu):
    add_engines(folder, SPLIT)
    options = SamplingOptions(max_new_tokens=5)
    with open_session(folder, backend="tensorrt") as session:
        expected = [session.answer([picture], QUESTION, options).token_ids for picture in PICTURES]
        with ThreadPoolExecutor(3) as threads:
            asked = [threads.submit(session.answer, [picture], QUESTION, options) for picture in PICTURES * 2]
            assert [one.result().token_ids for one in asked] == expected * 2


# Without a double: what the real libraries do on a machine without a GPU


def without_gpu() -> bool:
    from edgeprune.this_machine import this_machine

    return this_machine() is None


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU: 'make test-gpu' uses it")
def test_without_a_gpu(folder):
    add_engines(folder, ONE)
    assert "this machine has no NVIDIA GPU with a driver" in refused(folder)


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU: 'make test-gpu' uses it")
def test_the_real_cuda_without_a_driver():
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is in the extra 'dev' on Linux")
    with pytest.raises(
        BackendError, match=r"CUDA cannot use a GPU here .*update the NVIDIA driver"
    ) as caught:
        CudaDevice()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not without_gpu(), reason="this machine has a GPU: 'make test-gpu' uses it")
def test_the_real_tensorrt_without_a_driver(folder, monkeypatch):
    """It refuses to deserialize a real engine; the line says which."""
    real = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT for RTX is in the extra 'dev' on x86-64 Linux"
    )
    from edgeprune.runtimes.build_options import BuildOptions
    from edgeprune.runtimes.engine_build import build

    engines = build(folder, BuildOptions("rtx40", profile_choice=ONE))
    assert engines.sm == SM
    GpuDouble().install(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", real)
    message = refused(folder)
    assert f"tensorrt_rtx {real.__version__} does not take the engine vision-" in message
    assert "Cuda Runtime" in message
