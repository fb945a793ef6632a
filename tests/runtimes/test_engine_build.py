"""Engines, built by the real TensorRT for RTX without a GPU: what it accepts, what is kept, what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from edgeprune.bundle import Bundle, file_entry, sha256_of
from edgeprune.cli import main
from edgeprune.errors import BundleError, EngineError
from edgeprune.inspection import inspect
from edgeprune.manifest import MANIFEST_FILE, Manifest, ProfileEntry, manifest_from_json, manifest_to_json
from edgeprune.runtimes import engine_builder
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_build import build, plan_build
from edgeprune.runtimes.engine_builder import build_engine
from edgeprune.runtimes.engine_profiles import ONE, SPLIT, Limits, profiles
from edgeprune.runtimes.external_weights import external_bytes
from edgeprune.runtimes.preprocessing_kinds import preprocessing_from_json
from edgeprune.runtimes.tensorrt_library import library_for
from edgeprune.targets import find_target

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is in the extra 'dev' on x86-64 Linux")
# The builds take most of the time: one worker shares them.
pytestmark = pytest.mark.xdist_group("engines")

RTX40 = BuildOptions("rtx40", profile_choice=ONE, plugin="off")


class Log:
    """Remembers what a build reports; may end it."""

    def __init__(self, interrupt_at: str = "") -> None:
        self.finished: dict[str, str] = {}
        self.interrupt_at = interrupt_at

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        if self.interrupt_at and name.startswith(self.interrupt_at) and step == "build":
            raise KeyboardInterrupt
        if done == steps:
            self.finished[name] = step

    def warning(self, line: str) -> None:
        raise AssertionError(line)


@pytest.fixture(scope="module")
def built_folder(atp_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ATP's bundle with engines for SM 89, one profile each."""
    folder = Path(shutil.copytree(atp_bundle, tmp_path_factory.mktemp("engines") / "atp"))
    build(folder, RTX40)
    return folder


@pytest.fixture
def built(built_folder: Path, tmp_path: Path) -> Path:
    """A copy of it to edit."""
    return Path(shutil.copytree(built_folder, tmp_path / "atp"))


def manifest_of(bundle: Path) -> Manifest:
    return manifest_from_json(bundle / MANIFEST_FILE)


def check_against_the_builder(bundle: Path, target: str, strategy: str, *graphs: str) -> None:
    """TensorRT's inputs, outputs and profiles of the graphs, all if none is named, are those of the manifest and of the
    profiles.
    """
    manifest, device = manifest_of(bundle), find_target(target)
    library = library_for(device)
    for name, entries in profiles(manifest, Limits.of(manifest), strategy).items():
        if graphs and name not in graphs:
            continue
        graph = manifest.graphs[name]
        engine = build_engine(library, bundle / graph.file.path, graph, entries, sm=device.sm)
        # Once, whatever the number of profiles; code takes up to 12 MB.
        weights = external_bytes(bundle / graph.file.path)
        assert max(10_000, weights) < engine.data.nbytes < 1.08 * weights + 12e6
        for found, expected in ((engine.inputs, graph.inputs), (engine.outputs, graph.outputs)):
            assert [(tensor.name, tensor.dtype) for tensor in found] == [
                (tensor.name, tensor.dtype) for tensor in expected
            ]
        for found, expected in zip(engine.inputs, graph.inputs, strict=True):
            assert found.shape == tuple(-1 if isinstance(dim, str) else dim for dim in expected.shape)
        assert len(engine.profiles) == len(entries)
        for taken, entry in zip(engine.profiles, entries, strict=True):
            for tensor in graph.inputs:
                if not any(isinstance(dim, str) for dim in tensor.shape):
                    continue
                for place in range(3):
                    assert taken[tensor.name][place] == tuple(
                        entry.ranges[dim][place] if isinstance(dim, str) else dim for dim in tensor.shape
                    )
            if "num_keep" in taken:
                assert taken["num_keep"] == tuple((size,) for size in entry.ranges["num_keep"])


@pytest.fixture(scope="module")
def example_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, with its own ATP, in float32."""
    from edgeprune.export.exporter import export

    checkpoint = Path(__file__).parents[2] / "examples" / "shapes" / "checkpoint"
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "shapes").path


@pytest.fixture(scope="module")
def real_size_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 0.4 B parameters in float16 with IVTP, AdaptPrune and ATP, each at its own sites."""
    import random_llava

    from edgeprune.checkpoint import load_checkpoint
    from edgeprune.export.exporter import export
    from edgeprune.prune.adaptprune import AdaptPrune
    from edgeprune.prune.atp import Atp
    from edgeprune.prune.ivtp import Ivtp

    # Fewer visual tokens than the benchmark has: they cost time in the export's comparison and nothing in a build.
    folder, size = tmp_path_factory.mktemp("real-size"), replace(random_llava.FEW_LAYERS, image_size=112)
    llava = random_llava.write_random_llava(folder / "llava", size)
    assert 0.38e9 < sum(parameter.numel() for parameter in llava.parameters()) < 0.42e9
    random_llava.write_random_clip(folder / "clip", size, llava)
    del llava
    ivtp = Ivtp(tokens_after_vision=30, tokens_after_decoder=20, decoder_layers=2, group_size=2)
    atp = Atp(layers=(5,), hidden_width=8)
    geometry = load_checkpoint(folder / "llava", methods=()).model.config.geometry
    random_llava.write_random_thresholds(folder / "llava", atp, geometry)
    bundle = export(
        folder / "llava",
        folder / "bundle",
        methods=[ivtp, AdaptPrune(layer=3, keep=15), atp],
        clip=folder / "clip",
        dtype="float16",
    )
    shutil.rmtree(folder / "llava")
    return bundle.path


@pytest.mark.slow
@pytest.mark.parametrize(("target", "sm"), [("rtx30", 86), ("rtx40", 89), ("rtx50", 120)])
@pytest.mark.parametrize("bundle", ["example_bundle", "real_size_bundle"])
def test_every_graph_builds_with_prefill_and_decode_profiles(bundle, target, sm, request):
    """ATP, IVTP with its guide and AdaptPrune with its loop; an engine holds its weights once."""
    assert find_target(target).sm == sm
    check_against_the_builder(request.getfixturevalue(bundle), target, SPLIT)


@pytest.mark.parametrize(
    ("bundle", "graphs"),
    [
        ("dyrate_bundle", ("site0", "rate", "compact")),
        ("random_bundle", ("vision", "segment0")),
        ("cdpruner_bundle", ("site0", "site1")),
        ("sparsevlm_bundle", ("site0",)),
        ("combined_bundle", ("site0", "site1", "site2")),
        ("tower_bundle", ("vision",)),
    ],
)
def test_other_graphs_build(bundle, graphs, request):
    """DyRate's rate and compaction, opset 20, CDPruner's loop and DART, a site that merges, AdaptPrune's loop and
    PyramidDrop in float32, and a tower with ToMe.
    """
    check_against_the_builder(request.getfixturevalue(bundle), "rtx30", ONE, *graphs)


def test_pictures_of_any_size(tmp_path):
    """Qwen2.5-VL: patches, windows and rows of pictures of very different sizes lie inside the profile."""
    import tiny_qwen

    from edgeprune.export.exporter import export

    bundle = export(
        tiny_qwen.build_qwen(tmp_path / "qwen", tiny_qwen.QWEN25), tmp_path / "bundle", methods=()
    )
    check_against_the_builder(bundle.path, "rtx40", ONE, "vision")
    manifest = bundle.manifest
    (profile,) = profiles(manifest, Limits.of(manifest), ONE)["vision"]
    assert {"patches", "pictures", "longest_picture", "windows"} == set(profile.ranges)
    preprocessing = preprocessing_from_json(manifest.preprocessing)
    specs = manifest.graphs["vision"].inputs
    for sizes in ([(8, 8)], [(400, 8)], [(64, 64)], [(16, 200), (200, 16), (40, 40), (8, 8)]):
        pictures = [tiny_qwen.picture(*size) for size in sizes]
        prepared = preprocessing.prepare(pictures, manifest.geometry.grid)
        for spec in specs:
            for dim, size in zip(spec.shape, prepared.inputs[spec.name].shape, strict=True):
                if isinstance(dim, str):
                    assert profile.ranges[dim][0] <= size <= profile.ranges[dim][2], (sizes, dim, size)


def test_a_build_enters_its_engines(built_folder):
    manifest = manifest_of(built_folder)
    entry = manifest.engines["rtx40"]
    assert (entry.builder, entry.sm, entry.precision, entry.plugin_version) == (
        "tensorrt_rtx",
        89,
        "fp32",
        None,
    )
    assert entry.tensorrt_version == find_installed_version()
    assert set(entry.engines) == set(manifest.graphs)
    for name, engine in entry.engines.items():
        path = built_folder / engine.file.path
        assert path.parent == built_folder / "engines" / "rtx40"
        assert (path.stat().st_size, sha256_of(path)) == (engine.file.bytes, engine.file.sha256)
        assert engine.onnx_sha256 == manifest.graphs[name].file.sha256
        assert engine.seconds > 0
    assert entry.strategy_bytes == {ONE: sum(engine.file.bytes for engine in entry.engines.values())}
    assert inspect(built_folder).engines == ("rtx40",)


def find_installed_version() -> str:
    import tensorrt_rtx

    return tensorrt_rtx.__version__


def test_a_second_build_builds_nothing(built):
    before = (built / MANIFEST_FILE).read_bytes()
    log, started = Log(), time.perf_counter()
    build(built, RTX40, progress=log)
    assert time.perf_counter() - started < 2
    assert len(log.finished) == len(manifest_of(built).graphs)
    assert all(step.endswith("built before") for step in log.finished.values())
    assert (built / MANIFEST_FILE).read_bytes() == before


def test_auto_records_both_and_takes_what_fits(built):
    """The tiny model's engines are 18 and 25 MB: with room for both, prefill and decode get their own profiles."""
    log = Log()
    roomy = build(built, BuildOptions("rtx40"), progress=log)
    assert roomy.strategy == SPLIT
    assert set(roomy.strategy_bytes) == {SPLIT, ONE}
    assert roomy.strategy_bytes[SPLIT] > roomy.strategy_bytes[ONE]
    assert len(roomy.engines["segment0"].profiles) == 2
    files = {path.suffix for path in (built / "engines" / "rtx40").iterdir()}
    assert files == {".engine", ".json"}
    # Only the chosen engines stay, and choosing them again builds nothing.
    assert len(list((built / "engines" / "rtx40").glob("*.engine"))) == len(roomy.engines)
    again = Log()
    assert build(built, BuildOptions("rtx40"), progress=again) == roomy
    assert all(step.endswith("built before") for step in again.finished.values())
    # What is used beside the engines, the reserve and a little more than the smaller set: half a GiB and the estimate.
    memory = plan_build(built, BuildOptions("rtx40")).memory
    between = (roomy.strategy_bytes[SPLIT] + roomy.strategy_bytes[ONE]) // 2
    gib = (between + memory.run - memory.weights) / 2**30 + 0.5
    assert build(built, BuildOptions("rtx40", memory_gib=gib)).strategy == ONE


@pytest.mark.parametrize("suffix", [".engine", ".json"])
def test_a_damaged_engine_is_built_again(built, suffix):
    entry = manifest_of(built).engines["rtx40"].engines["gather"]
    path = (built / entry.file.path).with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    log = Log()
    engines = build(built, RTX40, progress=log)
    rebuilt = [name for name, step in log.finished.items() if not step.endswith("built before")]
    assert rebuilt == ["gather (1 profile)"]
    assert sha256_of(built / engines.engines["gather"].file.path) == engines.engines["gather"].file.sha256
    assert manifest_of(built).engines["rtx40"] == engines


def test_an_interrupted_build_keeps_the_old_engines(built):
    before = manifest_of(built).engines["rtx40"]
    with pytest.raises(KeyboardInterrupt):
        build(built, replace(RTX40, max_sequence=256), progress=Log(interrupt_at="segment1"))
    assert manifest_of(built).engines["rtx40"] == before
    for engine in before.engines.values():
        assert sha256_of(built / engine.file.path) == engine.file.sha256
    assert not list(built.rglob("*.partial*"))
    # What was whole by then is not built a second time, and what is not needed any more goes.
    log = Log()
    engines = build(built, replace(RTX40, max_sequence=256), progress=log)
    assert log.finished["segment0 (1 profile)"].endswith("built before")
    assert " in " in log.finished["segment1 (1 profile)"]
    found = {path.name for path in (built / "engines" / "rtx40").glob("*.engine")}
    assert found == {Path(engine.file.path).name for engine in engines.engines.values()}


def test_ctrl_c_ends_a_build(atp_bundle, tmp_path):
    bundle = Path(shutil.copytree(atp_bundle, tmp_path / "atp"))
    before = (bundle / MANIFEST_FILE).read_bytes()
    command = [sys.executable, "-m", "edgeprune.cli", "build", str(bundle), "--target", "rtx50"]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore Ctrl-C, and their children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    first = running.stderr.readline()
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert first.startswith("vision (1 profile): ")
    assert running.returncode == 130, errors
    assert errors.splitlines()[-1] == "edgeprune: interrupted; nothing was left half-written"
    assert output == ""
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert not list(bundle.rglob("*.partial*"))


def test_targets_live_side_by_side(built):
    build(built, replace(RTX40, target="rtx30"))
    engines = manifest_of(built).engines
    assert {name: entry.sm for name, entry in engines.items()} == {"rtx40": 89, "rtx30": 86}
    assert engines["rtx40"].engines["segment0"].key != engines["rtx30"].engines["segment0"].key


def test_the_builder_refuses_a_profile_that_contradicts_the_graph(built_folder):
    """Hidden states of S rows and positions of other S rows."""
    manifest, device = manifest_of(built_folder), find_target("rtx40")
    graph = manifest.graphs["segment0"]
    odd = replace(
        graph,
        inputs=tuple(
            replace(tensor, shape=(1, "other")) if tensor.name == "position_ids" else tensor
            for tensor in graph.inputs
        ),
    )
    profile = ProfileEntry("odd", {"sequence": (5, 5, 5), "past": (0, 0, 0), "other": (7, 7, 7)})
    with pytest.raises(EngineError, match=r"builds no engine of segment0\.onnx: .*contradictory"):
        build_engine(library_for(device), built_folder / graph.file.path, odd, [profile], sm=device.sm)


def test_memory_that_runs_out_is_one_line(built_folder, monkeypatch):
    """TensorRT says "OutOfMemory" in its log or the binding raises; both were seen under a limit of address space."""

    def run_out(*_):
        raise MemoryError

    monkeypatch.setattr(engine_builder, "_serialize", run_out)
    manifest = manifest_of(built_folder)
    graph = manifest.graphs["gather"]
    entries = profiles(manifest, Limits.of(manifest), ONE)["gather"]
    with pytest.raises(
        EngineError, match=r"gather\.onnx: out of memory; close other programs.*--profiles one"
    ):
        build_engine(library_for(find_target("rtx40")), built_folder / graph.file.path, graph, entries, sm=89)


def test_a_folder_that_cannot_be_written_is_named(built):
    (built / "engines" / "rtx30").write_text("in the way")
    before = (built / MANIFEST_FILE).read_bytes()
    with pytest.raises(EngineError, match=r"cannot write .*engines.rtx30 .*: free disk space or copy"):
        build(built, replace(RTX40, target="rtx30"))
    assert (built / MANIFEST_FILE).read_bytes() == before


def test_a_damaged_onnx_file_is_named(built):
    path = built / "gather.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BundleError, match=r"gather\.onnx is not the file that was exported"):
        build(built, BuildOptions("rtx40"))


def test_an_operator_that_tensorrt_refuses_is_named(built):
    path = built / "gather.onnx"
    model = onnx.load(path)
    del model.functions[:]
    (node,) = model.graph.node
    names, outputs = list(node.input), list(node.output)
    del model.graph.node[:]
    model.graph.node.append(onnx.helper.make_node("NonZero", names[:1], ["nonzero"], name="find"))
    model.graph.node.extend(
        onnx.helper.make_node("Identity", [name], [output], name=output)
        for name, output in zip(names[1:], outputs, strict=True)
    )
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("nonzero", onnx.TensorProto.INT64, [1, None])
    )
    onnx.save(model, path)
    manifest = manifest_of(built)
    graph = replace(manifest.graphs["gather"], file=file_entry(built, path))
    manifest = replace(manifest, graphs={**manifest.graphs, "gather": graph})
    (built / MANIFEST_FILE).write_text(manifest_to_json(manifest))
    with pytest.raises(EngineError, match=r"refuses gather\.onnx at NonZero 'find'") as caught:
        build(built, RTX40)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "rtx99"], "target 'rtx99' is unknown, known: orin-nano-4"),
        (["--target", "orin-nx-16", "--precision", "fp8"], "has no fp8: choose fp32, fp16, bf16, int8, int4"),
        (["--target", "rtx40", "--precision", "fp4"], "has no fp4: choose"),
        (["--target", "rtx40", "--precision", "half"], "precision 'half' is unknown"),
        (["--target", "rtx40", "--precision", "fp16"], "export with --dtype float16 for fp16 engines"),
        (["--target", "rtx40", "--precision", "int8"], "need a bundle quantized to int8"),
        (["--target", "orin-nano-8"], "--kit DIR writes what to carry"),
        (["--target", "rtx40", "--profiles", "wide"], "neither a file nor one of auto, one, split"),
        (["--target", "rtx40", "--max-sequence", "100000"], "exceeds the model's context of 512"),
        (["--target", "rtx40", "--max-images", "0"], "--max-images is 0"),
        (["--target", "rtx40", "--workspace", "0"], "--workspace is 0 MiB"),
        (["--target", "rtx40", "--workspace", "nan"], "--workspace is nan MiB"),
        (["--target", "rtx40", "--memory", "0"], "--memory is 0 GiB"),
        (["--target", "rtx40", "--memory", "inf"], "--memory is inf GiB"),
        (["--target", "rtx40", "--memory", "0.6"], "too little: what helps is"),
        (["--target", "this"], "no NVIDIA GPU"),
    ],
)
def test_what_is_refused_is_refused_in_one_line(built_folder, arguments, message):
    if arguments == ["--target", "this"] and find_gpu():
        pytest.skip("this machine has a GPU")
    before = (built_folder / MANIFEST_FILE).read_bytes()
    result = CliRunner().invoke(main, ["build", str(built_folder), *arguments])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("edgeprune: ")
    assert message in line
    assert (built_folder / MANIFEST_FILE).read_bytes() == before


def find_gpu() -> bool:
    from edgeprune.this_machine import this_machine

    return this_machine() is not None


def test_the_command(built, tmp_path):
    file = tmp_path / "profiles.json"
    file.write_text(json.dumps({"gather": [{"kept": [1, 20, 100]}, {}]}))
    result = CliRunner().invoke(main, ["build", str(built), "--target", "rtx40", "--profiles", str(file)])
    assert result.exit_code == 0, result.output
    assert f"{len(manifest_of(built).graphs)} fp32 engines for rtx40 (SM 89)" in result.stdout
    assert "profiles 'file'" in result.stdout
    ranges = [
        profile.ranges["kept"] for profile in manifest_of(built).engines["rtx40"].engines["gather"].profiles
    ]
    assert ranges[0] == (1, 20, 100)
    assert ranges[1][2] == 512
    assert Bundle.open(built, check_all=True)
