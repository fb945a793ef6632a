"""Finding and checking the library of TensorRT's plugins, with real shared objects; plugins would need headers."""

import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import edgeprune.plugins
from edgeprune.errors import EngineError
from edgeprune.operators import schema
from edgeprune.plugins.build import SOURCES
from edgeprune.plugins.plugin_library import LIBRARY, PluginLibrary, find, load

SOURCE = Path(__file__).with_name("stub_plugin.cpp")


@pytest.fixture(scope="module")
def compile_stub(tmp_path_factory):
    def compile_one(version=schema.PLUGIN_LIBRARY_VERSION, major=11, source=SOURCE):
        path = tmp_path_factory.mktemp("stub") / LIBRARY
        text = f"edgeprune plugin {version}; TensorRT {major}.3; CUDA 13000; SM 80,87,89"
        command = ["c++", "-shared", "-fPIC", f'-DBUILT_FOR="{text}"', str(source), "-o", str(path)]
        subprocess.run(command, check=True)
        return path

    return compile_one


@pytest.fixture(scope="module")
def stub(compile_stub):
    return compile_stub()


def module(name, version):
    made = types.ModuleType(name)
    made.__version__ = version
    return made


def refusal(call, *arguments):
    with pytest.raises(EngineError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_library_says_what_it_is(stub):
    library = PluginLibrary.open(stub)
    assert (library.version, library.tensorrt, library.cuda) == (1, (11, 3), 13)
    assert (library.machine, library.architectures) == (platform.machine(), (80, 87, 89))


def test_one_of_another_edgeprune_is_refused(compile_stub):
    message = refusal(PluginLibrary.open, compile_stub(version=7))
    assert "has plugin version 7, this edgeprune needs 1: build it again" in message


def test_what_is_no_plugin_library_is_refused(tmp_path, stub, compile_stub):
    source = tmp_path / "other.cpp"
    source.write_text("int something_else;")
    assert "is no plugin library of edgeprune" in refusal(PluginLibrary.open, compile_stub(source=source))
    missing = refusal(PluginLibrary.open, tmp_path / "none.so")
    assert "none.so does not exist: build it with python -m edgeprune.plugins.build" in missing
    for content in (b"", b"no library", stub.read_bytes()[:-100], stub.read_bytes()[:5000]):
        (tmp_path / LIBRARY).write_bytes(content)
        assert "is no whole library: build it again" in refusal(PluginLibrary.open, tmp_path / LIBRARY)


def test_a_library_of_another_machine_is_refused(tmp_path, stub):
    content = bytearray(stub.read_bytes())
    content[18] = {0x3E: 0xB7, 0xB7: 0x3E}[content[18]]
    path = tmp_path / LIBRARY
    path.write_bytes(content)
    library = PluginLibrary.open(path)
    assert library.machine == {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    assert f"is for {library.machine}, this machine is" in refusal(
        library.check_fits, module("tensorrt", "11.1")
    )


@pytest.mark.parametrize(
    ("name", "version", "major", "fits"),
    [
        ("tensorrt", "10.3.0", 10, True),
        ("tensorrt", "10.16.2.1", 10, True),
        ("tensorrt", "11.4.1", 11, True),
        ("tensorrt", "11.4.1", 10, False),
        ("tensorrt", "10.3.0", 11, False),
        ("tensorrt_rtx", "1.7.1.116", 11, True),
        ("tensorrt_rtx", "1.7.1.116", 10, False),
        ("tensorrt_rtx", "1.4.0.76", 11, False),
    ],
)
def test_only_the_same_plugin_interface_fits(compile_stub, name, version, major, fits):
    library = PluginLibrary.open(compile_stub(major=major))
    if fits:
        library.check_fits(module(name, version))
        return
    message = refusal(library.check_fits, module(name, version))
    assert re.search(
        r"compiled with the headers of TensorRT \d+\.3, but .* --tensorrt-root DIR|takes no plugins", message
    )


@pytest.mark.parametrize(
    ("sm", "runs"), [(80, True), (86, True), (87, True), (89, True), (75, False), (90, False), (120, False)]
)
def test_kernels_run_on_later_gpus_of_the_same_kind(stub, sm, runs):
    library = PluginLibrary.open(stub)
    if runs:
        library.check_has_kernels(sm)
    else:
        assert f"has kernels for SM 80, 87, 89, not for SM {sm}" in refusal(library.check_has_kernels, sm)


def test_kernels_of_a_jetson_run_on_nothing_else(stub):
    jetson, card = (PluginLibrary(stub, "x86_64", 1, (11, 3), 13, (number,)) for number in (87, 86))
    assert "not for SM 89" in refusal(jetson.check_has_kernels, 89)
    assert "not for SM 87" in refusal(card.check_has_kernels, 87)


def test_the_variable_comes_first_even_where_it_names_nothing(tmp_path, monkeypatch):
    assert find({"EDGEPRUNE_PLUGIN": "/nowhere/plugin.so"}) == Path("/nowhere/plugin.so")
    monkeypatch.setenv("EDGEPRUNE_PLUGIN", str(tmp_path / "plugin.so"))
    assert "plugin.so does not exist" in refusal(load, module("tensorrt", "11.1"))


def test_without_the_variable_package_and_checkout_are_searched(tmp_path, monkeypatch, stub):
    package = tmp_path / "checkout" / "plugins"
    checkout = tmp_path / "checkout" / "out" / "plugins"
    for folder in (package, checkout):
        folder.mkdir(parents=True)
    monkeypatch.setattr("edgeprune.plugins.plugin_library.__file__", str(package / "plugin_library.py"))
    assert find({}) is None
    shutil.copy(stub, checkout)
    assert find({}) == checkout / LIBRARY
    shutil.copy(stub, package)
    assert find({"EDGEPRUNE_PLUGIN": ""}) == package / LIBRARY


def test_a_missing_library_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("edgeprune.plugins.plugin_library.find", lambda: None)
    message = refusal(edgeprune.plugins.load, module("tensorrt", "11.1"))
    assert "there is no plugin library: build it with python -m edgeprune.plugins.build" in message


def test_engines_of_another_plugin_version_are_refused(stub):
    with pytest.raises(EngineError, match=r"built with plugin version 9, .* has 1: build them again"):
        load(module("tensorrt", "11.1"), stub, needed="9")


def test_tensorrt_is_asked_whether_it_took_the_plugins(stub):
    """TensorRT for RTX itself: without its own name it is not given a plugin, for it would end the process."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is in the extra 'dev' on x86-64 Linux")
    code = (
        "import sys, tensorrt_rtx; from pathlib import Path; from edgeprune.errors import EngineError\n"
        "from edgeprune.plugins import load\n"
        "try:\n    load(tensorrt_rtx, Path(sys.argv[1]))\n"
        "except EngineError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, stub], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (
        "takes plugins only where the loader finds libtensorrt_rtx.so: build the plugin again" in ran.stdout
    )


def test_library_and_package_agree():
    header = (SOURCES / "tensorrt" / "plugin_version.h").read_text("utf-8")
    values = dict(re.findall(r"#define EDGEPRUNE_PLUGIN_(\w+) (\S+)", header))
    assert values == {
        "LIBRARY_VERSION": str(schema.PLUGIN_LIBRARY_VERSION),
        "NAMESPACE": f'"{schema.PLUGIN_NAMESPACE}"',
        "VERSION": f'"{schema.PLUGIN_VERSION}"',
    }
    limit = re.search(r"kMaxSelectRows = (\d+);", (SOURCES / "kernels" / "token_select.h").read_text("utf-8"))
    assert int(limit[1]) == schema.PLUGIN_MAX_ROWS
