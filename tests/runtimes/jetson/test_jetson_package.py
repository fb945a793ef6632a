"""The package for Jetson: compiled across, whole, loadable on JetPack 6, and, emulated, with this machine's answers."""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from edgeprune import __version__
from edgeprune.errors import BackendError
from edgeprune.export.exporter import export
from edgeprune.plugins.build import find_nvcc
from edgeprune.plugins.cross_compiler import toolchain
from edgeprune.plugins.shared_object import machine_of
from edgeprune.runtimes.cpp.build import fetch
from edgeprune.runtimes.jetson.package import JetsonPackage, build, build_library
from edgeprune.runtimes.jetson.static_jpeg import StaticJpeg, given_jpeg
from edgeprune.runtimes.jetson.symbol_versions import UBUNTU_22_04, check_versions, required_versions
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session

# One worker compiles, for several minutes where processors are few, and runs all tests of it.
pytestmark = [pytest.mark.xdist_group("jetson"), pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[3]
SHAPES = REPOSITORY / "examples" / "shapes"
OUTPUT = REPOSITORY / "out" / "jetson-test"
COMPILER = "aarch64-linux-gnu-g++"
MAX_NEW_TOKENS = 8


@pytest.fixture(scope="module")
def package() -> Iterator[JetsonPackage]:
    """The package, with the kernels where nvcc is."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}: install Debian's g++-aarch64-linux-gnu")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            fetch(OUTPUT / "build" / "cpp" / "dependencies")
        except BackendError as error:
            pytest.skip(f"the header-only libraries cannot be fetched: {' '.join(str(error).split())[-300:]}")
        try:
            find_nvcc()
        except BackendError:
            yield build(OUTPUT, kernels=False)
        else:
            yield build(OUTPUT)


@dataclass(frozen=True)
class Emulated:
    """Runs programs for aarch64."""

    command: tuple[str, ...]
    root: Path

    def run(
        self, program: Path, *arguments: object, text: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = [*self.command, str(program), *map(str, arguments)]
        # What the machine's own programs are told would reach the emulated one.
        variables = {key: value for key, value in os.environ.items() if not key.startswith("EDGEPRUNE_")}
        variables |= {"QEMU_LD_PREFIX": str(self.root), **environment}
        return subprocess.run(
            words, input=text, capture_output=True, text=True, check=False, env=variables, timeout=600
        )


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    root = tmp_path_factory.mktemp("aarch64")
    if platform.machine() == "aarch64":
        return Emulated((), root)
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip("no qemu-aarch64: install Debian's qemu-user-static")
    (root / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
    # ONNX Runtime reads what processors there are, and ends the process where they are not of its kind.
    processors = root / "sys" / "devices" / "system" / "cpu"
    processors.mkdir(parents=True)
    for name in ("possible", "present"):
        (processors / name).write_text("0\n")
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(
        "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\nCPU revision\t: 1\n"
    )
    return Emulated((qemu,), root)


@pytest.fixture(scope="module")
def installed(package, tmp_path_factory) -> Path:
    """The package as install.sh puts it on a Jetson with JetPack 6."""
    root = tmp_path_factory.mktemp("jetson")
    for name in ("lib", "etc"):
        (root / name).mkdir()
    (root / "lib" / "ld-linux-aarch64.so.1").touch()
    (root / "etc" / "nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n"
    )
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(package.archive) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    ran = subprocess.run(
        ["bash", folder / "install.sh", "--root", root], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return root / "opt" / "edgeprune"


def jpeg_of(package: JetsonPackage) -> StaticJpeg | None:
    folder = OUTPUT / "build" / "jpeg"
    return None if any("JPEG" in line for line in package.left_out) else given_jpeg(folder)


def test_the_archive_holds_everything_and_names_the_rest(package):
    with tarfile.open(package.archive) as archive:
        members = {member.name: member for member in archive.getmembers()}
    (top,) = {name.partition("/")[0] for name in members}
    assert top == f"edgeprune-{__version__}-jetson-aarch64"
    assert {member.uname for member in members.values()} == {"root"}
    names = {name.partition("/")[2] for name, member in members.items() if member.isfile()}
    assert names >= {
        "README.md",
        "install.sh",
        "SHA256SUMS",
        "bin/edgeprune-run",
        "include/edgeprune/edgeprune.h",
        "include/edgeprune/edgeprune.hpp",
        "lib/cmake/edgeprune/edgepruneConfig.cmake",
        "lib/pkgconfig/edgeprune.pc",
        "share/edgeprune/examples/ask",
        "share/edgeprune/examples/time_budget",
        "share/edgeprune/examples/camera_loop.cpp",
        "share/edgeprune/plugins/CMakeLists.txt",
        "share/edgeprune/plugins/kernels/token_select.cu",
        "share/doc/edgeprune/licences/edgeprune.txt",
        "share/doc/edgeprune/licences/stb.txt",
    }
    assert not any(name.startswith("lib/libjpeg") for name in names)
    parts = {
        "ONNX Runtime": "lib/libonnxruntime.so.1",
        "JPEG files": "share/doc/edgeprune/licences/libjpeg-turbo.txt",
        "CUDA kernels": "share/edgeprune/plugins/compiled/libedgeprune_kernels.so",
    }
    readme = (package.folder / "README.md").read_text()
    for what, file in parts.items():
        missing = [line for line in package.left_out if line.startswith(f"without {what}: ")]
        assert (file in names) == (not missing), package.left_out
        assert all(f"- {line}\n" in readme for line in missing)


def test_checksums_cover_every_file(package):
    found = {
        path.relative_to(package.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "SHA256SUMS"
    }
    lines = (package.folder / "SHA256SUMS").read_text().splitlines()
    assert {name: value for value, name in (line.split("  ") for line in lines)} == found


def test_every_binary_is_for_aarch64_and_loads_on_ubuntu_22_04(package):
    binaries = [path for path in package.folder.rglob("*") if path.is_file() and machine_of(path)]
    assert {"edgeprune-run", "ask", "camera_loop", "libedgeprune.so.1"} <= {path.name for path in binaries}
    for path in binaries:
        assert machine_of(path) == "aarch64"
        listed = subprocess.run(
            ["aarch64-linux-gnu-readelf", "--wide", "--dyn-syms", path],
            capture_output=True,
            text=True,
            check=True,
        )
        # Another table of the file than the one that the build reads.
        for name, version in re.findall(r" UND \S+@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", listed.stdout):
            assert tuple(map(int, version.split("."))) <= UBUNTU_22_04[name], (path.name, name, version)


def compiled(folder: Path, code: str) -> Path:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}: install Debian's g++-aarch64-linux-gnu")
    (folder / "code.cpp").write_text(code)
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", folder / "code.cpp", "-o", folder / "library.so"], check=True
    )
    return folder / "library.so"


def test_a_binary_for_a_newer_system_is_refused(tmp_path):
    library = compiled(tmp_path, '#include <cstdio>\nextern "C" int say() { return std::puts("word"); }\n')
    check_versions([library])
    needed = required_versions(library)["GLIBC"]
    assert needed == (2, 17)  # the first glibc for aarch64
    with pytest.raises(
        BackendError, match=r"^library.so needs GLIBC_2.17, .* has GLIBC_2.16 at most: compile "
    ):
        check_versions([library], {**UBUNTU_22_04, "GLIBC": (2, 16)})
    with pytest.raises(BackendError, match="has no GLIBC"):
        check_versions([library], {})
    newer = compiled(tmp_path, '#include <stdlib.h>\nextern "C" unsigned draw() { return arc4random(); }\n')
    with pytest.raises(BackendError, match=r"needs GLIBC_2.36, JetPack 6 .* has GLIBC_2.35 at most"):
        check_versions([newer])
    with pytest.raises(BackendError, match="is no program or shared object for aarch64"):
        check_versions([tmp_path / "code.cpp"])


def test_a_missing_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(
        BackendError, match=r"^aarch64-linux-gnu-g\+\+ was not found: install it \(Debian: g\+\+-"
    ):
        toolchain("aarch64")


def test_a_folder_without_a_jpeg_library_is_refused(tmp_path):
    with pytest.raises(BackendError, match=r"must hold include/.*correct --jpeg"):
        build(tmp_path / "out", jpeg=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def example_bundle(tmp_path_factory) -> Path:
    return export(SHAPES / "checkpoint", tmp_path_factory.mktemp("example") / "shapes").path


def test_the_units_of_c_and_cpp_pass_emulated(package, emulated):
    built = build_library(OUTPUT / "build" / "cpp", jpeg_of(package), tests=True)
    for name in ("unit_tests", "c_abi"):
        ran = emulated.run(built.folder / "tests" / name)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_installed_programs_find_their_libraries(package, installed, emulated, example_bundle):
    shown = emulated.run(installed / "bin" / "edgeprune-run", "--version")
    assert (shown.returncode, __version__ in shown.stdout) == (0, True), shown.stderr
    if any("ONNX Runtime" in line for line in package.left_out):
        pytest.skip("; ".join(package.left_out))
    picture = SHAPES / "pictures" / "scene4.png"
    program = installed / "share" / "edgeprune" / "examples" / "ask"
    ran = emulated.run(program, example_bundle, picture, "which letter is in the green diamond?")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "K"
    assert "visual tokens kept" in ran.stderr


def test_the_emulated_answers_are_those_of_this_machine(
    package, installed, emulated, example_bundle, tmp_path
):
    if any("ONNX Runtime" in line for line in package.left_out):
        pytest.skip("; ".join(package.left_out))
    built = build_library(OUTPUT / "build" / "cpp", jpeg_of(package), tests=True)
    asked = questions(8)
    if jpeg_of(package) is not None:
        photo = tmp_path / "photo.jpg"
        Image.open(asked[0]["images"][0]).convert("RGB").save(photo, quality=85)
        asked.append({**asked[0], "images": [str(photo)]})
    text = "\n".join(map(json.dumps, asked))
    # The library that was installed, not the one of the build.
    ran = emulated.run(
        built.folder / "tests" / "ask_many",
        example_bundle,
        text=text,
        LD_LIBRARY_PATH=str(installed / "lib"),
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    with open_session(example_bundle, threads=1) as session:
        for one, ours in zip(asked, found, strict=True):
            options = SamplingOptions(max_new_tokens=MAX_NEW_TOKENS)
            theirs = session.answer(one["images"], one["prompt"], options).to_json()
            assert {key: ours.get(key) for key in ("token_ids", "text", "sites")} == {
                key: theirs[key] for key in ("token_ids", "text", "sites")
            }, one
            assert ours["sites"][-1]["kept"] >= 1


def questions(count: int) -> list[dict]:
    """So many of the example's questions, each about the next of its pictures."""
    pictures = json.loads((SHAPES / "pictures" / "questions.json").read_text(encoding="utf-8"))
    chosen = [pictures[number % len(pictures)] for number in range(count)]
    return [
        {
            "images": [str(SHAPES / "pictures" / entry["picture"])],
            "prompt": entry["questions"][3 * number % len(entry["questions"])]["question"],
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        for number, entry in enumerate(chosen)
    ]
