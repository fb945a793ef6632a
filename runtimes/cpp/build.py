"""Building the C++ library with CMake.

``python -m edgeprune.runtimes.cpp.build [--output DIR] [--tensorrt-root DIR] [--sanitize] [--tests] [--fetch-only]``

Needs a C++17 compiler. The header-only libraries come through pip, pinned by hash (``dependencies.txt``), unless they
are in ``DIR/dependencies`` already. ONNX Runtime is opened when the library runs. The TensorRT backend is built where
TensorRT's headers are: of a JetPack, of NVIDIA's packages, or of the folder that ``--tensorrt-root`` or the variable
``TENSORRT_ROOT`` names. ``runtimes/jetson`` compiles across with the same function.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BackendError
from edgeprune.plugins.cross_compiler import toolchain

SOURCES = Path(__file__).resolve().parent
HEADERS = ("minja/minja.hpp", "nlohmann/json.hpp", "stb/stb_image.h")
FUZZERS = ("manifest", "tokenizer", "picture")


@dataclass(frozen=True)
class CppLibrary:
    """What a build left behind.

    Attributes:
        library: The shared library.
        runner: The program ``edgeprune-run``.
        folder: CMake's build folder; with tests, their programs are in its ``tests``.
    """

    library: Path
    runner: Path
    folder: Path


def fetch(folder: Path) -> Path:
    """The header-only libraries in ``folder``, fetched where they are not there.

    Raises:
        BackendError: pip cannot fetch them.
    """
    if all((folder / header).is_file() for header in HEADERS):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Without isolation, because only the archive is wanted: what would build it is here already.
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
        names = ["-r", str(SOURCES / "dependencies.txt"), "-d", scratch]
        _run([sys.executable, "-m", "pip", "download", "-q", *options, *names])
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as members:
            for member in members:
                for header in HEADERS:
                    if member.isfile() and member.name.endswith(f"/vendor/{header}"):
                        source = members.extractfile(member)
                        assert source is not None  # it is a file
                        _write(folder / header, source.read())
    if missing := [header for header in HEADERS if not (folder / header).is_file()]:
        raise BackendError(f"the archive of dependencies.txt lacks {', '.join(missing)}: pin another version")
    return folder


def build(
    folder: Path,
    *,
    sanitize: bool = False,
    tests: bool = False,
    machine: str | None = None,
    options: Sequence[str] = (),
    tensorrt_root: Path | None = None,
    jobs: int = 2,
) -> CppLibrary:
    """Fetch, configure and build; what is up to date in ``folder`` is kept.

    Args:
        folder: CMake's build folder.
        sanitize: Whether to build with the address and the undefined-behaviour sanitizer.
        tests: Whether to build the tests, too.
        machine: "aarch64" on another machine to compile across, with g++-aarch64-linux-gnu.
        options: More of CMake's, such as "-DEDGEPRUNE_JPEG=OFF".
        tensorrt_root: Folder of the TensorRT whose headers are used; else those that the build folder has used before,
            or the system's.
        jobs: Files compiled at a time.

    Raises:
        BackendError: A tool is missing or a file does not compile.
    """
    cmake = cmake_program()
    given = [
        f"-DEDGEPRUNE_DEPENDENCIES={fetch(folder / 'dependencies').resolve()}",
        f"-DEDGEPRUNE_SANITIZE={'ON' if sanitize else 'OFF'}",
        f"-DEDGEPRUNE_TESTS={'ON' if tests else 'OFF'}",
        *options,
        *(cross_options(machine) if machine is not None else []),
    ]
    if tensorrt_root is not None:
        given.append(f"-DTENSORRT_ROOT={tensorrt_root.resolve()}")
    _run([cmake, "-S", str(SOURCES), "-B", str(folder), *given])
    _run([cmake, "--build", str(folder), "--parallel", str(jobs)])
    return CppLibrary(folder / "libedgeprune.so", folder / "edgeprune-run", folder)


def build_fuzzers(folder: Path, *, jobs: int = 2) -> dict[str, Path]:
    """Fetch, configure and build libFuzzer's targets, with sanitizers; what is up to date in ``folder`` is kept.

    Args:
        folder: CMake's build folder.
        jobs: Files compiled at a time.

    Returns:
        The programs, by what they read.

    Raises:
        BackendError: clang or another tool is missing, or a file does not compile.
    """
    cmake = cmake_program()
    compilers = {
        language: shutil.which(program) for language, program in (("C", "clang"), ("CXX", "clang++"))
    }
    if missing := [language for language, path in compilers.items() if path is None]:
        raise BackendError(
            f"clang was not found (for {' and '.join(missing)}): install clang and its compiler-rt"
        )
    options = [f"-DCMAKE_{language}_COMPILER={path}" for language, path in compilers.items()]
    options += [f"-DEDGEPRUNE_DEPENDENCIES={fetch(folder / 'dependencies').resolve()}", "-DEDGEPRUNE_FUZZ=ON"]
    _run([cmake, "-S", str(SOURCES), "-B", str(folder), *options])
    _run([cmake, "--build", str(folder), "--target", "fuzzers", "--parallel", str(jobs)])
    return {name: folder / "fuzz" / f"fuzz_{name}" for name in FUZZERS}


def cross_options(machine: str) -> list[str]:
    """What makes CMake compile for a machine; nothing for the one that this runs on.

    Raises:
        BackendError: Its compiler is missing.
    """
    file = toolchain(machine)
    return [f"-DCMAKE_TOOLCHAIN_FILE={file}"] if file is not None else []


def find_onnxruntime() -> Path | None:
    """ONNX Runtime's library inside its Python package; None if the package is not installed."""
    package = importlib.util.find_spec("onnxruntime")
    if package is None or package.origin is None:
        return None
    found = sorted((Path(package.origin).parent / "capi").glob("libonnxruntime.so*"))
    return found[0] if found else None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def cmake_program() -> str:
    """CMake: the one of this Python environment, else that of the system.

    Raises:
        BackendError: There is none.
    """
    beside = Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.is_file() else shutil.which("cmake")
    if cmake is None:
        raise BackendError("cmake was not found: install it with pip install 'cmake>=3.22'")
    return cmake


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(_environment()))
    if ran.returncode != 0:
        output = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-40:])
        raise BackendError(
            f"'{' '.join(command[:4])} …' failed: mend what its last lines name (a C++17 compiler such as g++ must "
            f"be there)\n{output}"
        )


def _environment() -> Iterator[tuple[str, str]]:
    """Without what a make above sets for its own children."""
    for name, value in os.environ.items():
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
            yield name, value


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the C++ library.")
    parser.add_argument("--output", type=Path, default=Path("out/cpp"), help="build folder")
    parser.add_argument("--tensorrt-root", type=Path, help="folder of a TensorRT with its headers")
    parser.add_argument("--sanitize", action="store_true", help="with sanitizers")
    parser.add_argument("--tests", action="store_true", help="the tests, too")
    parser.add_argument(
        "--fetch-only", action="store_true", help="fetch the header-only libraries, build nothing"
    )
    arguments = parser.parse_args()
    try:
        if arguments.fetch_only:
            sys.stdout.write(f"{fetch(arguments.output / 'dependencies')}\n")
            return
        built = build(
            arguments.output,
            sanitize=arguments.sanitize,
            tests=arguments.tests,
            tensorrt_root=arguments.tensorrt_root,
        )
    except BackendError as error:
        sys.exit(f"edgeprune: {error}")
    sys.stdout.write(f"{built.library}\n{built.runner}\n")


if __name__ == "__main__":
    main()
