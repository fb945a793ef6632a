"""The library as others get it: symbols, packages, an embedding program, the C++ units, memory."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune import __version__
from edgeprune.bundle import Bundle
from edgeprune.export.check_pictures import check_pictures
from edgeprune.runtimes.cpp.build import CppLibrary, find_onnxruntime

from conftest import SANITIZE  # isort: skip

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_units_of_c_and_cpp_pass(cpp):
    for name in ("unit_tests", "c_abi"):
        ran = cpp.run(cpp.built.folder / "tests" / name)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "FAILED" not in cpp.run(cpp.built.folder / "tests" / "unit_tests").stdout


def test_copies_of_several_threads_to_a_gpu_and_back_lose_nothing(cpp):
    doubles = cpp.built.folder / "tests" / "tensorrt_double"
    ran = cpp.run(doubles / "device_copies", LD_LIBRARY_PATH=str(doubles))
    assert ran.returncode == 0, ran.stderr


def test_only_the_c_abi_is_visible(cpp):
    if shutil.which("nm") is None:
        pytest.skip("no nm: install binutils")
    library: CppLibrary = cpp.built
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library.library], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    header = (REPOSITORY / "runtimes/cpp/include/edgeprune/edgeprune.h").read_text()
    assert names == {name for name in names if f"{name}(" in header}
    assert len(names) > 20


@pytest.fixture(scope="module")
def prefix(cpp, tmp_path_factory) -> Path:
    """The library installed."""
    folder = tmp_path_factory.mktemp("prefix")
    cmake = cmake_program()
    subprocess.run(
        [cmake, "--install", cpp.built.folder, "--prefix", folder], check=True, capture_output=True
    )
    return folder


def cmake_program() -> str:
    beside = Path(sys.executable).parent / "cmake"
    return str(beside) if beside.is_file() else "cmake"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    check_pictures(1, size=(60, 40))[0].save(path)
    return path


@pytest.mark.skipif(SANITIZE, reason="a program without sanitizers cannot load a library with them")
def test_other_projects_find_the_package_and_run(cpp, prefix, picture, atp_bundle, host_bundle, tmp_path):
    example = REPOSITORY / "examples" / "cpp"
    command = [cmake_program(), "-S", example, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run([cmake_program(), "--build", tmp_path], check=True, capture_output=True)
    ran = cpp.run(tmp_path / "ask", atp_bundle, picture, "What is it?")
    assert ran.returncode == 0, ran.stderr
    assert "visual tokens kept" in ran.stderr
    filmed = cpp.run(tmp_path / "camera_loop", atp_bundle, picture, "What is it?", 200, 10)
    assert filmed.returncode == 0, filmed.stderr
    lines = filmed.stdout.splitlines()
    assert lines
    assert all(line.startswith("frame ") for line in lines)
    # The last frame is never dropped.
    assert lines[-1].startswith("frame 9:")
    for milliseconds, kept in (1e6, "36"), (1e-3, "1"):
        timed = cpp.run(tmp_path / "time_budget", host_bundle, picture, "What is it?", milliseconds, 2)
        assert timed.returncode == 0, timed.stderr
        # What a token costs is known from the first answer on.
        said = re.findall(r"^(\d+) of 36 visual tokens, first token after ", timed.stdout, re.MULTILINE)
        assert said == ["36", kept], timed.stdout
    assert len((example / "ask.cpp").read_text().splitlines()) <= 60


@pytest.mark.skipif(SANITIZE, reason="a program without sanitizers cannot load a library with them")
def test_pkg_config_names_the_library(prefix):
    if shutil.which("pkg-config") is None:
        pytest.skip("no pkg-config: install pkg-config")
    folder = next(prefix.rglob("edgeprune.pc")).parent
    environment = os.environ | {"PKG_CONFIG_PATH": str(folder)}
    said = [
        subprocess.run(
            ["pkg-config", asked, "edgeprune"], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        for asked in ("--modversion", "--libs")
    ]
    assert said[0] == __version__
    assert said[1].endswith("-ledgeprune")
    assert next(prefix.rglob("libedgeprune.so.1")).exists()


def test_memory_does_not_grow_over_1000_answers(cpp, dyrate_bundle, picture):
    # Of the same length each time, so that ONNX Runtime's arenas have reached their size early.
    text = "\n".join(
        ['{"images": ["' + str(picture) + '"], "prompt": "What is it?", "max_new_tokens": 2}'] * 10
    )
    program = cpp.built.folder / "tests" / "ask_many"
    most = {}
    for repeats in (20, 100):
        command = [program, str(dyrate_bundle), "1", str(repeats)]
        environment = os.environ | {
            "EDGEPRUNE_ONNXRUNTIME": str(find_onnxruntime()),
            "ASAN_OPTIONS": "quarantine_size_mb=1",
        }
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True
        )
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        assert status == 0
        most[repeats] = usage.ru_maxrss
    # 800 answers more: a leak of 8 KiB in each would show.
    assert most[100] - most[20] < 6400, most


def test_two_sessions_in_two_threads_answer_alike_and_graphs_share_one_pool(cpp, dyrate_bundle, picture):
    ran = cpp.run(cpp.built.folder / "tests" / "two_sessions", dyrate_bundle, picture)
    assert ran.returncode == 0, ran.stderr
    graphs = len(Bundle.open(dyrate_bundle).manifest.graphs)
    # The thread that asks is one of an operator's.
    assert json.loads(ran.stdout) == {
        "alone": 3,
        "beside one of its size": 0,
        "beside one of another size": 2 * graphs,
        "in a program's environment": 3 * graphs,
    }


def test_the_python_camera_loop_runs(picture, atp_bundle):
    program = REPOSITORY / "examples" / "cpp" / "camera_loop.py"
    command = [sys.executable, program, atp_bundle, picture, "What is it?", "100", "8"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("frame 7:")
