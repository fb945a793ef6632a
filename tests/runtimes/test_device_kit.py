"""The kit that is carried to a device: whole, checkable, and with the shapes that the profiles say."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import EngineError
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.device_kit import trtexec_arguments, write_kit
from edgeprune.runtimes.engine_builder import input_range
from edgeprune.runtimes.engine_profiles import SPLIT, Limits, profiles
from edgeprune.runtimes.score_select import fuse_score_select


@pytest.fixture(scope="module")
def kit(combined_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit of AdaptPrune and PyramidDrop for an Orin Nano."""
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(combined_bundle, folder, BuildOptions("orin-nano-8", profile_choice=SPLIT, workspace_mib=64))
    return folder


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


def test_the_bundle_in_it_opens(kit, combined_bundle):
    assert Bundle.open(kit / "bundle", check_all=True).manifest == Bundle.open(combined_bundle).manifest


def test_checksums_cover_every_file(kit):
    assert run("sha256sum --quiet --check SHA256SUMS", kit).returncode == 0
    listed = {line.split("  ")[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    files = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert listed == files - {"SHA256SUMS"}
    assert {"build.sh", "README.md", "bundle/manifest.json", "bundle/site0.onnx"} < listed


def test_every_graph_is_built_with_the_shapes_of_its_profiles(kit):
    manifest = Bundle.open(kit / "bundle").manifest
    script = (kit / "build.sh").read_text().replace("\\\n", " ")
    lines = {
        words[1]: words[2:] for words in map(shlex.split, re.findall(r"^build \w.*$", script, re.MULTILINE))
    }
    assert set(lines) == set(manifest.graphs)
    assert "--timingCacheFile=timing.cache" in script
    for name, entries in profiles(manifest, Limits.of(manifest), SPLIT).items():
        words = lines[name]
        assert words[:3] == ["--stronglyTyped", "--skipInference", "--memPoolSize=workspace:64M"]
        assert [word for word in words if word.startswith("--profile=")] == (
            [f"--profile={index}" for index in range(len(entries))] if len(entries) > 1 else []
        )
        for kind, place in (("min", 0), ("opt", 1), ("max", 2)):
            options = [word.partition("=")[2] for word in words if word.startswith(f"--{kind}Shapes=")]
            assert len(options) == len(entries)
            for option, entry in zip(options, entries, strict=True):
                given = dict(pair.split(":") for pair in option.split(","))
                for tensor in manifest.graphs[name].inputs:
                    if any(isinstance(dim, str) for dim in tensor.shape):
                        shape = input_range(tensor.shape, entry.ranges)[place]
                        assert tuple(int(size) for size in given.pop(tensor.name).split("x")) == shape
                    elif tensor.name == "num_keep":
                        assert int(given.pop("num_keep")) == entry.ranges["num_keep"][place]
                assert given == {}


def test_a_static_graph_needs_no_shapes(kit):
    graph = Bundle.open(kit / "bundle").manifest.graphs["gather"]
    static = type(graph)(graph.file, graph.data, (), ())
    assert trtexec_arguments(static, []) == ["--stronglyTyped", "--skipInference"]


def test_without_trtexec_the_script_says_so(kit):
    result = run("./build.sh", kit, TRTEXEC="/nowhere/trtexec")
    assert result.returncode == 1
    assert "trtexec is missing: install TensorRT from JetPack, or set TRTEXEC" in result.stderr


def test_a_damaged_kit_is_noticed_before_anything_is_built(kit):
    graph = kit / "bundle" / "gather.onnx"
    content = graph.read_bytes()
    try:
        graph.write_bytes(content[:-1])
        # Any program stands for trtexec: the script must stop before it.
        result = run("./build.sh", kit, TRTEXEC="/bin/false")
    finally:
        graph.write_bytes(content)
    assert result.returncode == 1
    assert "a file of the kit is damaged: copy the kit again" in result.stderr
    assert not (kit / "bundle" / "engines").exists()


def test_the_readme_says_what_to_do_and_what_nobody_did(kit):
    text = (kit / "README.md").read_text()
    for part in ("Jetson Orin Nano 8 GB", "./build.sh", "have been run on this device", "--opset 20"):
        assert part in text


def test_opset_20_needs_no_other_tensorrt(random_bundle, tmp_path):
    write_kit(random_bundle, tmp_path / "kit", BuildOptions("orin-nx-8"))
    text = (tmp_path / "kit" / "README.md").read_text()
    assert "TensorRT 10.3 to 11.x" in text
    assert "--opset" not in text


def test_the_command_and_a_folder_that_is_taken(random_bundle, tmp_path):
    arguments = ["build", str(random_bundle), "--target", "agx-orin-64", "--kit", str(tmp_path / "kit")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "run build.sh there" in result.stdout
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "exists and is not empty" in again.stderr


@pytest.fixture
def trtexec(tmp_path):
    """A program in its place that writes the engine and what it was told."""
    path = tmp_path / "trtexec"
    path.write_text(
        '#!/bin/sh\nfor word in "$@"; do\n    echo "$word"\n'
        '    case $word in --saveEngine=*) echo engine > "${word#*=}" ;; esac\ndone\n'
    )
    path.chmod(0o755)
    return str(path)


def told(kit, graph):
    return (kit / "bundle" / "engines" / "orin-nano-8" / f"{graph}.log").read_text().splitlines()


@pytest.fixture
def own_kit(kit, tmp_path):
    return Path(shutil.copytree(kit, tmp_path / "kit"))


def test_graphs_for_the_plugins_are_carried_without_functions(kit):
    manifest = Bundle.open(kit / "bundle").manifest
    carried = {path.name.removesuffix(".plugin.onnx") for path in (kit / "bundle").glob("*.plugin.onnx")}
    assert {"gather", "site0"} <= carried < set(manifest.graphs)
    for name in carried:
        ours = onnx.load(kit / "bundle" / f"{name}.plugin.onnx", load_external_data=False)
        theirs = fuse_score_select((kit / "bundle" / f"{name}.onnx").read_bytes())
        assert not ours.functions
        assert ours.graph == onnx.load_from_string(theirs).graph
    for source in (
        "CMakeLists.txt",
        "tensorrt/plugin_library.cpp",
        "kernels/token_gather.cu",
        "cmake/aarch64.cmake",
    ):
        assert (kit / "plugins" / source).is_file()


def test_engines_are_built_with_a_plugin_library_that_is_named(own_kit, trtexec):
    (own_kit / "plugin.so").write_text("stands for the library")
    result = run("./build.sh", own_kit, TRTEXEC=trtexec, EDGEPRUNE_PLUGIN="plugin.so")
    assert result.returncode == 0, result.stderr
    assert "site0: built with the plugins" in result.stdout
    assert "segment0: built\n" in result.stdout
    assert {"--onnx=bundle/site0.plugin.onnx", f"--dynamicPlugins={own_kit}/plugin.so"} <= set(
        told(own_kit, "site0")
    )
    assert "--onnx=bundle/segment0.onnx" in told(own_kit, "segment0")
    assert not [word for word in told(own_kit, "segment0") if "lugin" in word]


def test_a_device_that_cannot_compile_the_plugins_builds_the_functions(own_kit, trtexec):
    tools = own_kit / "tools"  # the shell's programs without cmake and nvcc
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "sha256sum", "rm", "mv", "grep", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    result = run("./build.sh", own_kit, TRTEXEC=trtexec, PATH=str(tools))
    assert result.returncode == 0, result.stderr
    assert "the plugins were not compiled, see plugin.log" in result.stderr
    assert "operators are built from standard operators instead" in result.stderr
    assert "--onnx=bundle/site0.onnx" in told(own_kit, "site0")
    assert "site0: built\n" in result.stdout


def test_a_plugin_library_that_is_not_there_is_named(own_kit, trtexec):
    result = run("./build.sh", own_kit, TRTEXEC=trtexec, EDGEPRUNE_PLUGIN="/nowhere.so")
    assert result.returncode == 1
    assert "there is no plugin library /nowhere.so: correct EDGEPRUNE_PLUGIN" in result.stderr


def test_a_kit_that_must_have_plugins_and_one_that_must_not(combined_bundle, tmp_path):
    write_kit(combined_bundle, tmp_path / "on", BuildOptions("orin-nx-8", plugin="on"))
    script = (tmp_path / "on" / "build.sh").read_text()
    assert "-DEDGEPRUNE_CUDA_ARCHITECTURES=87" in script
    assert "standard operators instead" not in script
    write_kit(combined_bundle, tmp_path / "off", BuildOptions("orin-nx-8", plugin="off"))
    assert "PLUGIN=off\n" in (tmp_path / "off" / "build.sh").read_text()
    assert not list((tmp_path / "off" / "bundle").glob("*.plugin.onnx"))
    assert "no plugin is needed" in " ".join((tmp_path / "off" / "README.md").read_text().split())


def test_a_library_compiled_for_the_device_comes_along(combined_bundle, tmp_path, monkeypatch):
    """Its text says what it was built for; the rest of the file is the head of a shared object of aarch64."""
    head = bytearray(64)
    head[:6], head[16:20] = b"\x7fELF\x02\x01", b"\x03\x00\xb7\x00"
    library = tmp_path / "libedgeprune_tensorrt.so"
    monkeypatch.setattr("edgeprune.runtimes.kit_plugin.find_for", {"aarch64": library}.get)
    library.write_bytes(bytes(head) + b"edgeprune plugin 1; TensorRT 10.3; CUDA 12060; SM 87\0")
    write_kit(combined_bundle, tmp_path / "kit", BuildOptions("orin-nx-8"))
    assert (tmp_path / "kit" / "plugins" / "aarch64" / library.name).read_bytes() == library.read_bytes()
    script = (tmp_path / "kit" / "build.sh").read_text()
    assert 'grep -q "libnvinfer.so.10 "' in script
    assert 'grep -q "libcudart.so.12 "' in script
    assert "TensorRT 10.3 and CUDA 12 comes along" in " ".join(
        (tmp_path / "kit" / "README.md").read_text().split()
    )
    library.write_bytes(bytes(head) + b"edgeprune plugin 1; TensorRT 10.3; CUDA 12060; SM 86\0")
    with pytest.raises(EngineError, match="has kernels for SM 86, not for SM 87"):
        write_kit(combined_bundle, tmp_path / "other", BuildOptions("orin-nx-8"))
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_refused(random_bundle, tmp_path):
    with pytest.raises(EngineError, match="too little: what helps is"):
        write_kit(random_bundle, tmp_path / "kit", BuildOptions("orin-nano-4", memory_gib=1.6))
    assert not (tmp_path / "kit").exists()
