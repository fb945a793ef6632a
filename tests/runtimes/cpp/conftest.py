"""The C++ library and the programs that its tests drive, built once; all tests of this folder are one xdist group."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import BackendError
from edgeprune.export.exporter import export
from edgeprune.runtimes.cpp.build import CppLibrary, build, fetch, find_onnxruntime

REPOSITORY = Path(__file__).resolve().parents[3]
SHAPES = REPOSITORY / "examples" / "shapes"
# "make cpp-sanitize" runs the same tests on a build with sanitizers.
SANITIZE = os.environ.get("EDGEPRUNE_CPP_SANITIZE") == "1"
OUTPUT = REPOSITORY / "out" / ("cpp-sanitize" if SANITIZE else "cpp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker builds and runs them all."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("cpp"))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time builds in a folder; the next finds what is up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Programs:
    """What was built, and how to run it."""

    built: CppLibrary

    def run(
        self, program: str | Path, *arguments: object, text: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program with ONNX Runtime's library in sight, and with more variables."""
        environment = os.environ | {"EDGEPRUNE_ONNXRUNTIME": str(find_onnxruntime())} | variables
        # ONNX Runtime keeps what it allocates once: only our own leaks count.
        suppressions = "print_suppressions=0:suppressions=" + str(Path(__file__).parent / "leaks.txt")
        environment |= {"LSAN_OPTIONS": suppressions, "UBSAN_OPTIONS": "print_stacktrace=1"}
        return subprocess.run(
            [str(program), *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )

    def edgeprune_run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """The command-line program."""
        return self.run(self.built.runner, *arguments)

    def parts(self, part: str, requests: list[Any], *arguments: object) -> list[Any]:
        """Results of a part of the library, one per request."""
        return self._lines("parts", requests, part, *arguments)

    def ask(self, bundle: Path, requests: list[dict[str, Any]], *arguments: object) -> list[dict[str, Any]]:
        """Answers of one session."""
        return self._lines("ask_many", requests, bundle, *arguments)

    def _lines(self, program: str, requests: list[Any], *arguments: object) -> list[Any]:
        text = "\n".join(map(json.dumps, requests))
        ran = self.run(self.built.folder / "tests" / program, *arguments, text=text)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        # Not splitlines(): it breaks at Unicode's separators, too.
        lines = ran.stdout.rstrip("\n").split("\n")
        assert len(lines) == len(requests)
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def cpp() -> Programs:
    """The library with its test programs; what does not compile fails, what cannot be had is named and skipped."""
    return programs(OUTPUT)


def programs(folder: Path, tensorrt_root: Path | None = None) -> Programs:
    """The library with its test programs, built in a folder, with the headers of a TensorRT or the system's, if any."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler: install g++")
    if find_onnxruntime() is None:
        pytest.skip("no libonnxruntime.so in Python's onnxruntime: pip install onnxruntime")
    with alone(folder):
        try:
            fetch(folder / "dependencies")
        except BackendError as error:
            pytest.skip(f"the header-only libraries cannot be fetched: {' '.join(str(error).split())[-300:]}")
        return Programs(build(folder, sanitize=SANITIZE, tests=True, tensorrt_root=tensorrt_root))


@pytest.fixture(scope="session")
def example_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, exported as its files say."""
    return export(SHAPES / "checkpoint", tmp_path_factory.mktemp("example") / "shapes").path


@pytest.fixture(scope="session")
def has_jpeg(cpp: Programs) -> bool:
    """Whether the library was built with libjpeg."""
    return "JPEG_INCLUDE_DIR:PATH=/" in (cpp.built.folder / "CMakeCache.txt").read_text()
