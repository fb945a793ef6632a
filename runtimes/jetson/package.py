"""Packing edgeprune for Jetson: everything compiled across for aarch64, in one archive with its installer.

``python -m edgeprune.runtimes.jetson.package [--output DIR] [--tensorrt-root DIR] [--jpeg DIR] [--without-kernels]``

Needs g++-aarch64-linux-gnu. libjpeg-turbo comes through apt, ONNX Runtime and the CUDA runtime through pip, all for
aarch64; what cannot be had is left out and named.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from edgeprune import __version__
from edgeprune.bundle import sha256_of
from edgeprune.errors import BackendError, EdgepruneError
from edgeprune.plugins import build as plugins
from edgeprune.plugins.cross_compiler import toolchain
from edgeprune.plugins.shared_object import machine_of
from edgeprune.runtimes.cpp import build as cpp
from edgeprune.runtimes.jetson.licences import third_party_licences
from edgeprune.runtimes.jetson.static_jpeg import StaticJpeg, fetch_jpeg, given_jpeg
from edgeprune.runtimes.jetson.symbol_versions import check_versions
from edgeprune.runtimes.jetson.wheels import fetch_from_wheel
from edgeprune.runtimes.kit_plugin import plugin_sources
from edgeprune.whole_folder import whole_folder

MACHINE, ORIN = "aarch64", 87
INSTALLER, CHECKSUMS = "install.sh", "SHA256SUMS"
_HERE = Path(__file__).resolve().parent
_CHECKOUT = _HERE.parent.parent
_RUNTIME = "nvidia-cuda-runtime"
Part = TypeVar("Part")


@dataclass(frozen=True)
class JetsonPackage:
    """What was packed.

    Attributes:
        archive: The archive.
        folder: The same unpacked.
        left_out: One line for each part that could not be had.
    """

    archive: Path
    folder: Path
    left_out: tuple[str, ...]


@dataclass
class _Parts:
    """Parts that may be missing: what was left out is collected."""

    left_out: list[str] = field(default_factory=list)

    def get(self, what: str, make: Callable[[], Part]) -> Part | None:
        try:
            return make()
        except BackendError as error:
            self.left_out.append(f"without {what}: {str(error).splitlines()[0]}")
            return None


def build(
    output: Path,
    *,
    tensorrt_root: Path | None = None,
    jpeg: Path | None = None,
    kernels: bool = True,
    jobs: int = 2,
) -> JetsonPackage:
    """Compile, check and pack; what is up to date in ``output`` is kept.

    Args:
        output: Folder of the archive and of everything on the way to it.
        tensorrt_root: Folder of a TensorRT with headers, for its plugin and backend.
        jpeg: Folder of a libjpeg for aarch64 (:class:`StaticJpeg`); else Debian's.
        kernels: Whether to build the CUDA kernels.
        jobs: Files compiled at a time.

    Raises:
        BackendError: A tool is missing, a file does not compile, or a binary would not load on JetPack 6.
    """
    parts = _Parts()
    work = output / "build"
    found_jpeg = given_jpeg(jpeg) if jpeg is not None else None
    toolchain(MACHINE)  # its compiler is there, before anything is fetched
    if found_jpeg is None:
        found_jpeg = parts.get("JPEG files", lambda: fetch_jpeg(work / "jpeg"))
    library = build_library(work / "cpp", found_jpeg, tensorrt_root, jobs=jobs)
    runtime = parts.get("ONNX Runtime", lambda: fetch_onnxruntime(work / "onnxruntime"))
    cudart = parts.get("CUDA kernels", lambda: fetch_cudart(work / "cudart")) if kernels else None
    native = _kernels(work / "plugins", cudart, tensorrt_root, jobs) if cudart is not None else None
    if not kernels:
        parts.left_out.append("without CUDA kernels: they were not asked for")
    elif native is not None and native.without_tensorrt:
        parts.left_out.append(f"without a compiled TensorRT plugin: {native.without_tensorrt}")
    name = f"edgeprune-{__version__}-jetson-{MACHINE}"
    with whole_folder(output / name, INSTALLER, "package for Jetson", BackendError) as folder:
        _run([cpp.cmake_program(), "--install", str(library.folder), "--prefix", str(folder), "--strip"])
        _add_examples(folder, work / "examples", jobs)
        _add_plugins(folder, native)
        if runtime is not None:
            shutil.copyfile(runtime / "libonnxruntime.so.1", folder / "lib" / "libonnxruntime.so.1")
        licences = third_party_licences(library.folder / "dependencies", found_jpeg, runtime, cudart)
        for file, text in {"edgeprune.txt": _licence(), **licences}.items():
            _write(folder / "share" / "doc" / "edgeprune" / "licences" / file, text)
        _write(folder / "README.md", _readme(parts.left_out))
        shutil.copy(_HERE / INSTALLER, folder / INSTALLER)
        check_versions(_binaries(folder))
        _write_checksums(folder)
    return JetsonPackage(
        _pack(output / name, output / f"{name}.tar.gz"), output / name, tuple(parts.left_out)
    )


def build_library(
    folder: Path,
    jpeg: StaticJpeg | None,
    tensorrt_root: Path | None = None,
    *,
    tests: bool = False,
    jobs: int = 2,
) -> cpp.CppLibrary:
    """The C++ library and edgeprune-run for aarch64.

    Args:
        folder: CMake's build folder.
        jpeg: libjpeg; None for a library that reads no JPEG files.
        tensorrt_root: Folder of a TensorRT with headers.
        tests: Whether to build the tests, too.
        jobs: Files compiled at a time.

    Raises:
        BackendError: A tool is missing or a file does not compile.
    """
    options = jpeg.cmake_options() if jpeg is not None else ["-DEDGEPRUNE_JPEG=OFF"]
    root = tensorrt_root.resolve() if tensorrt_root is not None else ""
    # Debian's own choice of folder depends on the machine that compiles; a Jetson's prefix has lib.
    options += ["-DCMAKE_INSTALL_LIBDIR=lib", f"-DTENSORRT_ROOT={root}"]
    return cpp.build(folder, tests=tests, machine=MACHINE, options=options, jobs=jobs)


def fetch_onnxruntime(folder: Path) -> Path:
    """ONNX Runtime's library for aarch64 (CPU) and its licences, of the version that is installed here.

    Raises:
        BackendError: pip cannot fetch it.
    """
    try:
        version = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendError(
            "onnxruntime, whose version the package takes, is not installed: pip install 'edgeprune[cpu]'"
        ) from error
    wanted = {
        "libonnxruntime.so.1": f"capi/libonnxruntime.so.{version}",
        "LICENSE": "onnxruntime/LICENSE",
        "ThirdPartyNotices.txt": "onnxruntime/ThirdPartyNotices.txt",
    }
    fetch_from_wheel(f"onnxruntime=={version}", wanted, folder)
    return folder


def fetch_cudart(folder: Path) -> Path:
    """The CUDA runtime for aarch64 and its licence, of the nvcc that is installed here.

    Raises:
        BackendError: There is no nvcc, or pip cannot fetch the runtime.
    """
    plugins.find_nvcc()
    try:
        version = importlib.metadata.version(_RUNTIME)
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendError(
            f"{_RUNTIME}, whose version the package takes, is not installed: pip install -c constraints.txt -e '.[dev]'"
        ) from error
    wanted = {"libcudart_static.a": "lib/libcudart_static.a", "License.txt": "licenses/License.txt"}
    fetch_from_wheel(f"{_RUNTIME}=={version}", wanted, folder)
    return folder


def _kernels(folder: Path, cudart: Path, tensorrt_root: Path | None, jobs: int) -> plugins.NativeLibraries:
    return plugins.build(
        folder,
        architectures=(ORIN,),
        tensorrt_root=tensorrt_root,
        machine=MACHINE,
        cudart=cudart / "libcudart_static.a",
        jobs=jobs,
    )


def _add_examples(folder: Path, work: Path, jobs: int) -> None:
    """The examples' programs, compiled against the package as a user compiles them, and their sources."""
    sources = _CHECKOUT / "examples" / "cpp"
    if not sources.is_dir():
        raise BackendError(f"{sources} is missing: run this in a checkout of edgeprune")
    # Anew, because the package that it found the last time is gone.
    shutil.rmtree(work, ignore_errors=True)
    options = [
        f"-Dedgeprune_DIR={folder.resolve() / 'lib' / 'cmake' / 'edgeprune'}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    options += ["-DCMAKE_INSTALL_RPATH=$ORIGIN/../../../lib", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON"]
    options += cpp.cross_options(MACHINE)
    _run([cpp.cmake_program(), "-S", str(sources), "-B", str(work), *options])
    _run([cpp.cmake_program(), "--build", str(work), "--parallel", str(jobs)])
    target = folder / "share" / "edgeprune" / "examples"
    shutil.copytree(sources, target)
    for source in sources.glob("*.cpp"):
        shutil.copy(work / source.stem, target / source.stem)


def _add_plugins(folder: Path, native: plugins.NativeLibraries | None) -> None:
    """The plugins' sources, for the device to compile, and what could be compiled here."""
    target = folder / "share" / "edgeprune" / "plugins"
    for path, content in plugin_sources().items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)
    compiled = target / "compiled"
    for library in (native.kernels, native.tensorrt) if native is not None else ():
        if library is not None:
            compiled.mkdir(exist_ok=True)
            shutil.copy(library, compiled / library.name)


def _licence() -> str:
    return (_CHECKOUT / "LICENSE").read_text(encoding="utf-8")


def _readme(left_out: list[str]) -> str:
    text = (_HERE / "package_readme.md").read_text(encoding="utf-8")
    lines = "".join(f"- {line}\n" for line in left_out) or "Nothing was left out.\n"
    return text.replace("@VERSION@", __version__).replace("@LEFT_OUT@", lines.rstrip("\n"))


def _binaries(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [path for path in files if machine_of(path) is not None]


def _write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    _write(folder / CHECKSUMS, "\n".join(lines) + "\n")


def _pack(folder: Path, archive: Path) -> Path:
    partial = archive.with_name(f".{archive.name}.partial-{os.getpid()}")
    try:
        with tarfile.open(partial, "w:gz") as packed:
            packed.add(folder, folder.name, filter=_owned_by_root)
        partial.replace(archive)
    except OSError as error:
        raise BackendError(
            f"cannot write {archive} ({error.strerror or error}): free disk space or choose another --output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return archive


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        output = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-40:])
        raise BackendError(f"'{' '.join(command[:4])} …' failed: mend what its last lines name\n{output}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pack edgeprune for Jetson.")
    parser.add_argument("--output", type=Path, default=Path("out/jetson"), help="folder of the archive")
    parser.add_argument(
        "--tensorrt-root",
        type=Path,
        default=os.environ.get("TENSORRT_ROOT") or None,
        help="folder of a TensorRT with include/NvInferRuntime.h",
    )
    parser.add_argument(
        "--jpeg",
        type=Path,
        help="folder with include, lib/libjpeg.a for aarch64 and copyright; else Debian's",
    )
    parser.add_argument("--without-kernels", action="store_true", help="no CUDA kernels, no nvcc needed")
    arguments = parser.parse_args()
    try:
        package = build(
            arguments.output,
            tensorrt_root=arguments.tensorrt_root,
            jpeg=arguments.jpeg,
            kernels=not arguments.without_kernels,
        )
    except EdgepruneError as error:
        sys.exit(f"edgeprune: {error}")
    for line in package.left_out:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{package.archive}\n")


if __name__ == "__main__":
    main()
