"""The native libraries, built once. All tests of this folder belong to one xdist group: one worker builds them."""

import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from plugin_host import PluginHost

from edgeprune.plugins.build import SOURCES, NativeLibraries, build, find_nvcc
from edgeprune.plugins.kernel_library import KernelLibrary

FOLDER = Path(__file__).parent
OUTPUT = FOLDER.parents[1] / "out" / "plugins"


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time builds; the next finds what is up to date."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def native_libraries() -> NativeLibraries:
    """Both libraries; a machine without a C++ compiler or nvcc fails here."""
    with alone():
        return build(OUTPUT)


@pytest.fixture(scope="session")
def reference() -> KernelLibrary:
    """The references; their folder is their own, so that they are there when a kernel does not compile."""
    with alone():
        return KernelLibrary(build(OUTPUT / "reference", kernels=False).reference, "cpu")


@pytest.fixture(scope="session")
def emulated() -> KernelLibrary:
    """The kernels' sources as a host library; nvcc only passes its include folders to the host compiler."""
    library = OUTPUT / "libedgeprune_emulated.so"
    sources = sorted((SOURCES / "kernels").glob("*.cu"))
    flags = "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-Wno-unknown-pragmas"
    command = [
        find_nvcc(),
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-shared",
        "--cudart",
        "none",
        "-Xcompiler",
        flags,
    ]
    command += [
        "-DEDGEPRUNE_EMULATED",
        "-I",
        FOLDER / "emulator",
        *sources,
        SOURCES / "kernels/kv_compaction.cpp",
    ]
    used = [*(SOURCES / "kernels").iterdir(), *(FOLDER / "emulator").iterdir()]
    with alone():
        if library.is_file() and library.stat().st_mtime > max(path.stat().st_mtime for path in used):
            return KernelLibrary(library, "cpu")
        ran = subprocess.run([*command, "-o", library], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return KernelLibrary(library, "cpu")


@pytest.fixture(scope="session")
def reference_plugins() -> Path:
    """TensorRT's plugins over the references, compiled with the headers of the system or of ``TENSORRT_ROOT``."""
    folder = OUTPUT / "plugin"
    options = {
        "EDGEPRUNE_NVCC": find_nvcc(),
        "EDGEPRUNE_CUDA_ARCHITECTURES": "89",
        "EDGEPRUNE_WARNINGS_ARE_ERRORS": "ON",
        "TENSORRT_ROOT": os.environ.get("TENSORRT_ROOT", ""),
    }
    with alone():
        configured = run(
            "cmake", "-S", SOURCES, "-B", folder, *(f"-D{name}={value}" for name, value in options.items())
        )
        missing = re.search(r"edgeprune_tensorrt: not built, (.*)", configured)
        if missing:
            pytest.skip(f"TensorRT's plugins cannot be compiled here: {missing[1]}")
        run("cmake", "--build", folder, "--target", "edgeprune_tensorrt_reference", "edgeprune_rtx_name")
    return folder / "libedgeprune_tensorrt_reference.so"


@pytest.fixture(scope="session")
def plugin_host(reference_plugins: Path) -> PluginHost:
    """What stands for TensorRT; compiled with the same headers."""
    cache = (reference_plugins.parent / "CMakeCache.txt").read_text("utf-8")
    include = [
        word
        for name in ("EDGEPRUNE_TENSORRT_INCLUDE", "EDGEPRUNE_CUDART_INCLUDE")
        for word in ("-isystem", re.search(rf"^{name}:PATH=(.*)$", cache, re.MULTILINE)[1])
    ]
    host = reference_plugins.parent / "libplugin_host.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    with alone():
        run("c++", *flags, *include, FOLDER / "plugin_host" / "plugin_host.cpp", "-o", host, "-ldl")
    return PluginHost(host, reference_plugins)


def run(*command: object) -> str:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
