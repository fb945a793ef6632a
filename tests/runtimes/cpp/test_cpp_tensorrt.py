"""The C++ library's TensorRT backend on doubles of libcuda and libnvinfer: whole prompts give what ONNX Runtime gives.

The doubles (``runtimes/cpp/tests/tensorrt_double``) are compiled with the headers that ``TENSORRT_ROOT`` names.
They end the process where the backend does what CUDA or TensorRT forbid, and say nothing of TensorRT's kernels.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tensorrt_double
from backend_comparison import KINDS, PICTURES, QUESTION, answers
from tensorrt_double import add_engines

from edgeprune.bundle import Bundle
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.runtimes.engine_profiles import DECODE, ONE, PREFILL, SPLIT, WHOLE, Limits, parse_profile_file

from conftest import OUTPUT, Programs, programs  # isort: skip

ROOT = os.environ.get("TENSORRT_ROOT")
needs_headers = pytest.mark.skipif(
    not ROOT, reason="no TensorRT headers: make cpp-tensorrt TENSORRT_ROOT=DIR names a folder of them"
)


def headers_version() -> str:
    """Of the headers, as a manifest writes it."""
    text = next(Path(ROOT or "").glob("**/NvInferVersion.h")).read_text()
    found = dict(re.findall(r"define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)? (\d+)", text))
    return ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH"))


@dataclass
class Machine:
    """A machine with a GPU, TensorRT, and the library that was built with its headers."""

    programs: Programs
    notes_file: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def doubles(self) -> Path:
        return self.programs.built.folder / "tests" / "tensorrt_double"

    @property
    def plugin(self) -> Path:
        return self.doubles / "libplugin_double.so"

    def run(self, program: str | Path, *arguments: object, text: str = "") -> Any:
        variables = {
            "LD_LIBRARY_PATH": str(self.doubles),
            "EDGEPRUNE_DOUBLE_NOTES": str(self.notes_file),
            "EDGEPRUNE_TENSORRT": "",
        }
        self.notes_file.unlink(missing_ok=True)
        ran = self.programs.run(program, *arguments, text=text, **(variables | self.variables))
        assert "double:" not in ran.stderr, ran.stderr
        assert ran.returncode in (0, 1, 2), ran.stderr[-3000:]
        return ran

    def ask(
        self,
        bundle: Path,
        requests: list[dict[str, Any]],
        threads: int = 1,
        pruner: str = "",
        backend: str = "tensorrt",
    ) -> list[dict[str, Any]]:
        """Answers of one session."""
        ask_many = self.programs.built.folder / "tests" / "ask_many"
        text = "\n".join(map(json.dumps, requests))
        ran = self.run(ask_many, bundle, threads, 1, pruner, backend, text=text)
        return [json.loads(line) for line in ran.stdout.splitlines()]

    def refused(self, bundle: Path, images: list[str]) -> str:
        """The line of one request that cannot be answered."""
        (found,) = self.ask(bundle, [{"images": images, "prompt": QUESTION, "max_new_tokens": 3}])
        assert "\n" not in found["error"]
        assert found["status"] == 5, found
        return str(found["error"])

    @property
    def notes(self) -> list[str]:
        """Everything that happened in the last run."""
        return self.notes_file.read_text().splitlines()


@pytest.fixture(scope="module")
def built() -> Programs:
    folder = OUTPUT.with_name(OUTPUT.name.replace("cpp", "cpp-tensorrt"))
    return programs(folder, Path(ROOT or ""))


@pytest.fixture
def machine(built, tmp_path) -> Machine:
    return Machine(built, tmp_path / "notes")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{index}.png" for index in range(len(PICTURES))]
    for picture, path in zip(PICTURES, paths, strict=True):
        picture.save(path)
    return list(map(str, paths))


@pytest.fixture
def folder(atp_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(atp_bundle, tmp_path / "bundle"))


def with_engines(folder: Path, strategy: str = SPLIT, **changes: Any) -> Path:
    add_engines(folder, strategy, **({"builder": "tensorrt", "version": headers_version()} | changes))
    return folder


def essence(found: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """As :func:`backend_comparison.answers` gives it."""
    return [
        (
            tuple(one["token_ids"]),
            [(s["kept"], tuple(s["indices"]), tuple(map(tuple, s["evictions"]))) for s in one["sites"]],
        )
        for one in found
    ]


def comparable(found: list[tuple[Any, ...]]) -> list[tuple[object, ...]]:
    return [
        (tuple(ids), [(kept, tuple(indices), tuple(map(tuple, evicted))) for kept, indices, evicted in sites])
        for ids, sites in found
    ]


def requests_about(pictures: list[str], tokens: int) -> list[dict[str, Any]]:
    return [{"images": pictures[:n], "prompt": QUESTION, "max_new_tokens": tokens} for n in range(3)]


def compare(machine: Machine, bundle: Path, pictures: list[str], tokens: int = 12) -> None:
    """About no picture, one and two: ids, kept indices and evictions are those of ONNX Runtime."""
    found = essence(machine.ask(bundle, requests_about(pictures, tokens)))
    expected = comparable(answers(bundle, tokens=tokens, backend="onnxruntime", threads=1))
    assert found == expected
    assert any(indices for _, sites in expected for _, indices, _ in sites), "the comparison would be empty"
    assert machine.notes[-1] == "released"


@needs_headers
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_onnxruntime(kind, machine, pictures, tmp_path, request):
    bundle = shutil.copytree(request.getfixturevalue(f"{kind}_bundle"), tmp_path / "bundle")
    with_engines(bundle)
    compare(machine, bundle, pictures, tokens=30 if kind == "dyrate" else 12)
    if kind == "dyrate":
        assert any(note.startswith("run compact") for note in machine.notes), "nothing was dropped later"


@needs_headers
@pytest.mark.parametrize("strategy", [ONE, SPLIT])
def test_the_smallest_profile_that_fits_runs_in_one_context(machine, folder, pictures, strategy):
    compare(machine, with_engines(folder, strategy), pictures, tokens=4)
    ran = [note.split(" ", 2)[1:] for note in machine.notes if note.startswith("run ")]
    made = [note.split(" ", 2)[1:] for note in machine.notes if note.startswith("context ")]
    used = {profile for graph, profile in ran if graph.startswith("segment")}
    assert used == ({WHOLE} if strategy == ONE else {PREFILL, DECODE})
    # One context per engine and profile, however many prompts there were.
    assert sorted(made) == sorted(map(list, set(map(tuple, ran))))


@needs_headers
@pytest.mark.parametrize("on_host", [(), ("num_keep", "keep_count")])
def test_numbers_on_the_device_and_on_the_host(machine, combined_bundle, tmp_path, pictures, on_host):
    """TensorRT decides by itself which numbers are sizes to it."""
    bundle = shutil.copytree(combined_bundle, tmp_path / "bundle")
    compare(machine, with_engines(bundle, ONE, on_host=on_host), pictures, tokens=3)


@needs_headers
def test_half_precision(machine, atp_float16_bundle, tmp_path, pictures):
    bundle = shutil.copytree(atp_float16_bundle, tmp_path / "bundle")
    compare(machine, with_engines(bundle), pictures, tokens=6)


@needs_headers
def test_a_pruner_of_the_program_chooses(machine, host_bundle, tmp_path, pictures):
    bundle = with_engines(shutil.copytree(host_bundle, tmp_path / "bundle"))
    asked = requests_about(pictures, 4)
    found = machine.ask(bundle, asked, pruner="third")
    expected = machine.ask(bundle, asked, pruner="third", backend="onnxruntime")
    assert essence(found) == essence(expected)
    assert essence(found) != essence(machine.ask(bundle, asked))


def between(notes: list[str], first: str, last: str) -> list[str]:
    """From the first note that begins with a word to the last."""
    begins = next(index for index, note in enumerate(notes) if note.startswith(first))
    ends = max(index for index, note in enumerate(notes) if note.startswith(last))
    return notes[begins : ends + 1]


@needs_headers
def test_the_host_waits_for_the_numbers_that_it_reads_alone(
    machine, folder, combined_bundle, tmp_path, pictures
):
    asked = [{"images": pictures[:1], "prompt": QUESTION, "max_new_tokens": 3}]
    machine.ask(with_engines(folder), asked)
    manifest = Bundle.open(folder).manifest
    logits = f"read {4 * manifest.geometry.vocab_size}"
    chain = [note for note in between(machine.notes, "run vision", "read ") if re.match("read|wait", note)]
    # One integer per site of ATP and the logits of three tokens; what the sites kept is read when all is over.
    expected = ["read 8", "wait"] * len(manifest.sites) + [logits, "wait"] * 3
    assert chain[: len(expected)] == expected
    combined = with_engines(shutil.copytree(combined_bundle, tmp_path / "combined"))
    machine.ask(combined, [asked[0] | {"images": pictures[:2], "max_new_tokens": 1}])
    logits = f"read {4 * Bundle.open(combined).manifest.geometry.vocab_size}"
    chain = [note for note in between(machine.notes, "run vision", "read ") if re.match("read|wait", note)]
    assert chain[:2] == [logits, "wait"]


@needs_headers
def test_nothing_is_allocated_from_the_second_token_on(machine, folder, pictures):
    machine.ask(with_engines(folder), [{"images": pictures[:1], "prompt": QUESTION, "max_new_tokens": 12}])
    notes = machine.notes
    tokens = [index for index, note in enumerate(notes) if note.startswith("run embed")]
    assert len(tokens) == 12
    assert any(note.startswith("malloc") for note in notes[: tokens[1]])
    assert not [note for note in notes[tokens[2] : tokens[-1]] if note.startswith(("malloc", "free"))]


@needs_headers
def test_the_table_of_places_is_uploaded_once_per_prompt(machine, combined_bundle, tmp_path, pictures):
    bundle = with_engines(shutil.copytree(combined_bundle, tmp_path / "bundle"))
    manifest = Bundle.open(bundle).manifest
    reading = [
        s for s in manifest.sites if "visual_places" in {e.name for e in manifest.graphs[s.graph].inputs}
    ]
    assert reading
    machine.ask(bundle, [{"images": pictures[:2], "prompt": QUESTION, "max_new_tokens": 1}])
    table = 2 * manifest.geometry.tokens_per_image * 5 * 8
    assert machine.notes.count(f"upload {table}") == 1


@needs_headers
def test_threads_share_a_session(machine, folder, pictures):
    asked = requests_about(pictures, 5)
    alone = essence(machine.ask(with_engines(folder), asked))
    assert essence(machine.ask(folder, asked, threads=3)) == alone
    assert machine.notes[-1] == "released"


@needs_headers
def test_the_program(machine, folder, pictures):
    with_engines(folder)
    words = [folder, "--image", pictures[0], "--prompt", QUESTION, "--max-new-tokens", "4", "--json"]
    runner = machine.programs.built.runner
    ours, theirs = (
        json.loads(machine.run(runner, *words, "--backend", b).stdout) for b in ("tensorrt", "onnxruntime")
    )
    assert ours["token_ids"] == theirs["token_ids"]
    for option in (("--provider", "cuda"), ("--threads", "2")):
        wrong = machine.run(runner, *words, "--backend", "tensorrt", *option)
        assert wrong.returncode == 1
        assert wrong.stderr.startswith(f"edgeprune: {option[0]} is of ONNX Runtime: leave it away")
    wrong = machine.run(runner, *words, "--backend", "tpu")
    assert "backend 'tpu' is unknown, known: onnxruntime, tensorrt" in wrong.stderr


@needs_headers
def test_the_library_is_named_by_variable_and_option(machine, folder, pictures, tmp_path):
    """TensorRT lies elsewhere than the linker looks, the driver does not."""
    with_engines(folder)
    (tmp_path / "driver").mkdir()
    shutil.copy(machine.doubles / "libcuda.so.1", tmp_path / "driver")
    asked = [{"images": [], "prompt": QUESTION, "max_new_tokens": 2}]
    driver = {"LD_LIBRARY_PATH": str(tmp_path / "driver")}
    machine.variables = driver
    assert "TensorRT was not found" in machine.refused(folder, [])
    machine.variables = driver | {"EDGEPRUNE_TENSORRT": str(machine.doubles / "libnvinfer.so")}
    assert machine.ask(folder, asked)[0]["token_ids"]
    machine.variables = {"EDGEPRUNE_TENSORRT": str(tmp_path / "none.so")}
    assert machine.refused(folder, []).startswith(
        f"TensorRT was not found ({tmp_path / 'none.so'}: cannot open"
    )
    words = [folder, "--prompt", QUESTION, "--backend", "tensorrt", "--runtime-library"]
    ran = machine.run(machine.programs.built.runner, *words, machine.doubles / "libcuda.so.1")
    assert (
        "the library that was opened is not TensorRT (it lacks getInferLibMajorVersion): name another"
        in ran.stderr
    )


# What is refused, in one line


@needs_headers
def test_a_bundle_without_engines(machine, folder):
    assert machine.refused(folder, []) == "the bundle has no engines: edgeprune build BUNDLE --target this"


@needs_headers
def test_engines_of_another_gpu(machine, folder):
    with_engines(folder, sm=120, target="rtx50")
    expected = "the bundle has engines for rtx50 (SM 120), and this GPU is SM 89: edgeprune build"
    assert machine.refused(folder, []).startswith(expected)
    machine.variables = {"EDGEPRUNE_DOUBLE_SM": "120"}
    assert machine.ask(folder, [{"images": [], "prompt": QUESTION, "max_new_tokens": 2}])[0]["token_ids"]


@needs_headers
def test_engines_of_another_version(machine, folder):
    with_engines(folder, version="10.2.0")
    message = machine.refused(folder, [])
    assert "of tensorrt 10.2.0, and an engine runs with the very version that built it" in message
    assert f"installed is tensorrt {headers_version()}." in message


@needs_headers
def test_engines_of_tensorrt_for_rtx(machine, folder):
    with_engines(folder, builder="tensorrt_rtx", version="1.7.1")
    assert "tensorrt_rtx 1.7.1, and the C++ runtime runs those of tensorrt (libnvinfer)" in machine.refused(
        folder, []
    )


@needs_headers
def test_engines_of_older_graphs(machine, folder):
    path = with_engines(folder) / MANIFEST_FILE
    data = json.loads(path.read_text())
    data["engines"]["double"]["engines"]["embed"]["onnx_sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    assert "were built from other graphs than the bundle has now" in machine.refused(folder, [])


@needs_headers
def test_prompts_beyond_the_profiles(machine, folder, pictures):
    with_engines(folder, limits=(1, 100))
    message = "vision: tiles is 2, the engine was built for 1 … 1: build with a larger --max-images"
    assert message in machine.refused(folder, pictures[:2])
    asked = {"images": [], "prompt": QUESTION}
    (alone,) = machine.ask(folder, [asked | {"max_new_tokens": 1}])
    most = 100 - alone["prompt_tokens"]
    whole, longer = machine.ask(
        folder, [asked | {"max_new_tokens": most}, asked | {"max_new_tokens": most + 1}]
    )
    assert whole["finish_reason"] in ("length", "end")
    assert longer["status"] == 4
    assert re.search(
        r"exceed what the engines were built for, 100 by 1: .* a larger --max-sequence$", longer["error"]
    )


@needs_headers
def test_a_profile_that_is_too_short(machine, folder, pictures):
    """A file of profiles may leave out what a prompt then needs."""
    manifest = Bundle.open(folder).manifest
    path = folder.parent / "profiles.json"
    given = {"segment0": [{"sequence": [1, 20, 30], "past": [0, 0, 0]}, {"sequence": [1, 1, 1]}]}
    path.write_text(json.dumps(given))
    with_engines(folder, ONE, chosen=parse_profile_file(path, manifest, Limits.of(manifest)))
    message = r"segment0: sequence is \d+, the engine was built for 1 … 30 or 1 … 1: .*larger --max-sequence"
    assert re.search(message, machine.refused(folder, pictures[:1]))


@needs_headers
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "empty"])
def test_a_damaged_engine(machine, folder, damage):
    entry = add_engines(folder, ONE, builder="tensorrt", version=headers_version()).engines["gather"]
    path = folder / entry.file.path
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-3], "changed": content, "empty": b""}[damage])
    message = machine.refused(folder, [])
    assert f"the engine {path.name} is" in message
    assert message.endswith(
        "build it again with edgeprune build BUNDLE --target this; the rest of the bundle is whole"
    )
    assert not any(note.startswith("engine gather") for note in machine.notes)


@needs_headers
def test_an_engine_that_tensorrt_does_not_take(machine, folder, monkeypatch):
    monkeypatch.setattr(tensorrt_double, "MAGIC", "another")
    with_engines(folder)
    assert re.search(
        r"does not take the engine \w+-0+\.engine \(Assertion bufferSize", machine.refused(folder, [])
    )


@needs_headers
@pytest.mark.parametrize(
    ("how", "reason"), [("says no", "a kernel failed"), ("is silent", "no reason given")]
)
def test_a_run_that_fails(machine, folder, how, reason):
    with_engines(folder, ONE, failing={"embed": how})
    message = machine.refused(folder, [])
    assert re.match(
        rf"tensorrt [\d.]+ failed in embed, profile 'all' \({reason}\): build the engines again", message
    )


@needs_headers
def test_too_little_memory(machine, folder, pictures):
    with_engines(folder, ONE)
    machine.variables = {"EDGEPRUNE_DOUBLE_MEMORY": "40000"}
    assert "the GPU has no" in machine.refused(folder, pictures[:1])
    assert machine.notes[-1] == "released"


@needs_headers
def test_too_little_memory_for_an_engine(machine, folder):
    with_engines(folder, ONE, failing={"segment1": "memory"})
    expected = "(Error Code 2: OutOfMemory (Requested size was 5 bytes.)): close other programs"
    assert expected in machine.refused(folder, [])


@needs_headers
def test_another_version_of_tensorrt_than_the_headers(machine, folder):
    with_engines(folder)
    major, minor, _ = headers_version().split(".")
    machine.variables = {"EDGEPRUNE_DOUBLE_VERSION": "9.1.0.1"}
    message = machine.refused(folder, [])
    assert message.startswith(
        f"TensorRT 9 is installed, and this libedgeprune was built with the headers of {major}.{minor}"
    )
    machine.variables = {"EDGEPRUNE_DOUBLE_VERSION": f"{major}.{int(minor) - 1}.0.1"}
    message = machine.refused(folder, [])
    assert re.search("The headers are newer than the library|is installed, and this libedgeprune", message)


@needs_headers
def test_no_driver_and_no_gpu_and_no_tensorrt(machine, folder, tmp_path):
    with_engines(folder)
    machine.variables = {"LD_LIBRARY_PATH": ""}
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert "this machine has no NVIDIA GPU with a driver" in machine.refused(folder, [])
    # The same program answers with ONNX Runtime there.
    words = [folder, "--prompt", QUESTION, "--max-new-tokens", "2"]
    assert machine.run(machine.programs.built.runner, *words).returncode == 0
    machine.variables = {"EDGEPRUNE_DOUBLE_DEVICES": "0"}
    message = "CUDA cannot use a GPU here (no CUDA-capable device is detected): update the NVIDIA driver"
    assert message in machine.refused(folder, [])
    (tmp_path / "driver").mkdir()
    shutil.copy(machine.doubles / "libcuda.so.1", tmp_path / "driver")
    machine.variables = {"LD_LIBRARY_PATH": str(tmp_path / "driver")}
    assert machine.refused(folder, []).startswith("TensorRT was not found (libnvinfer.so.")


@needs_headers
def test_the_plugins_that_engines_need_are_loaded_before_them(machine, folder):
    with_engines(folder, plugin="1")
    machine.variables = {"EDGEPRUNE_PLUGIN": str(machine.plugin)}
    assert machine.ask(folder, [{"images": [], "prompt": QUESTION, "max_new_tokens": 2}])[0]["token_ids"]
    ordered = [note.split()[0] for note in machine.notes if note.startswith(("plugins", "engine"))]
    assert ordered[0] == "plugins"
    assert ordered.count("plugins") == 1


@needs_headers
def test_plugins_that_do_not_fit(machine, folder, tmp_path):
    with_engines(folder, plugin="1")
    machine.variables = {"EDGEPRUNE_PLUGIN": str(tmp_path / "none.so")}
    assert re.search(
        r"the plugin library .*none\.so does not exist: build it with", machine.refused(folder, [])
    )
    path = tmp_path / "libedgeprune_tensorrt.so"
    machine.variables = {"EDGEPRUNE_PLUGIN": str(path)}
    path.write_bytes(b"no library")
    assert "is no plugin library of edgeprune" in machine.refused(folder, [])
    content = machine.plugin.read_bytes()
    path.write_bytes(content.replace(b"edgeprune plugin 1;", b"edgeprune plugin 2;"))
    assert "built with plugin version 1, " in machine.refused(folder, [])
    path.write_bytes(re.sub(rb"; TensorRT 1\d\.", b"; TensorRT 19.", content))
    assert "was compiled with the headers of TensorRT 19." in machine.refused(folder, [])
    path.write_bytes(content.replace(b"getCreators", b"getNothings"))
    assert "does not take the plugins of" in machine.refused(folder, [])
    machine.variables = {"EDGEPRUNE_PLUGIN": ""}
    assert "the engines need the plugin library, and there is none" in machine.refused(folder, [])


@needs_headers
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda engines: engines.pop("sm"), "lacks the field 'sm'"),
        (lambda engines: engines["engines"]["embed"]["file"].update(path="../x"), "names a file outside"),
        (lambda engines: engines["engines"]["embed"].update(profiles=5), "expected a list"),
        (
            lambda engines: engines["engines"]["embed"].update(profiles=[]),
            "profiles are not those of the graph",
        ),
        (
            lambda engines: engines["engines"]["embed"]["profiles"][0].update(ranges={"x": [1, 2, 3]}),
            "profiles are not those of the graph",
        ),
        (
            lambda engines: engines["engines"]["embed"]["profiles"][0].update(ranges={"prompt": [3, 2, 1]}),
            "expected three sizes, ascending",
        ),
    ],
)
def test_manifests_with_engines_that_are_none(machine, folder, change, part):
    path = with_engines(folder) / MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data["engines"]["double"])
    path.write_text(json.dumps(data))
    (found,) = machine.ask(folder, [{"images": [], "prompt": QUESTION, "max_new_tokens": 2}])
    assert part in found["error"]


@pytest.mark.skipif(bool(ROOT), reason="TENSORRT_ROOT gives headers to every build")
def test_a_library_without_headers_says_so(cpp, atp_bundle):
    if "EDGEPRUNE_TENSORRT_INCLUDE:PATH=/" in (cpp.built.folder / "CMakeCache.txt").read_text():
        pytest.skip("this machine has TensorRT's headers")
    ran = cpp.edgeprune_run(atp_bundle, "--prompt", "?", "--backend", "tensorrt")
    assert ran.returncode == 1
    assert ran.stderr.startswith("edgeprune: this libedgeprune was built without TensorRT: build it where")
    assert "-DTENSORRT_ROOT=" in ran.stderr
