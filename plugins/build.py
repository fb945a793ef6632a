"""Building the native libraries of the operators with CMake.

``python -m edgeprune.plugins.build [--output DIR] [--architectures 87] [--references-only]``

``libedgeprune_reference.so`` needs a C++17 compiler, ``libedgeprune_kernels.so`` also nvcc: the CUDA compiler of
this Python environment (package nvidia-cuda-nvcc), of the variable ``CUDACXX``, of ``PATH`` or of
``/usr/local/cuda``, in this order after the variable.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BackendError

SOURCES = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 87, 89, 90, 120)
"""Compute capabilities that the kernels are compiled for: A100, RTX 30, Orin, RTX 40, H100/H200, RTX 50."""


@dataclass(frozen=True)
class NativeLibraries:
    """What a build left behind.

    Attributes:
        reference: The references for the host.
        kernels: The kernels for NVIDIA GPUs; None if they were not asked for.
        folder: Where both lie, with ptxas' reports.
    """

    reference: Path
    kernels: Path | None
    folder: Path


def find_nvcc() -> Path:
    """The CUDA compiler.

    Raises:
        BackendError: There is none.
    """
    for candidate in _candidates():
        if candidate.is_file():
            return candidate
    raise BackendError(
        "nvcc, the CUDA compiler, was not found: install it with pip install -c constraints.txt -e '.[dev]', "
        "or set CUDACXX to the nvcc of a CUDA toolkit"
    )


def build(
    folder: Path, *, kernels: bool = True, architectures: tuple[int, ...] = ARCHITECTURES, jobs: int = 2
) -> NativeLibraries:
    """Configure and build; what is up to date in ``folder`` is kept.

    Args:
        folder: CMake's build folder.
        kernels: Whether to build the CUDA kernels, too.
        architectures: Compute capabilities to compile for, without the dot.
        jobs: Files compiled at a time.

    Raises:
        BackendError: A tool is missing or a file does not compile.
    """
    cmake = _cmake()
    options = [f"-DEDGEPRUNE_KERNELS={'ON' if kernels else 'OFF'}"]
    if kernels:
        options += [
            f"-DEDGEPRUNE_NVCC={find_nvcc()}",
            f"-DEDGEPRUNE_CUDA_ARCHITECTURES={';'.join(map(str, architectures))}",
        ]
    _run([cmake, "-S", str(SOURCES), "-B", str(folder), *options])
    _run([cmake, "--build", str(folder), "--parallel", str(jobs)])
    return NativeLibraries(
        reference=folder / "libedgeprune_reference.so",
        kernels=folder / "libedgeprune_kernels.so" if kernels else None,
        folder=folder,
    )


def _candidates() -> list[Path]:
    candidates = [Path(os.environ["CUDACXX"])] if os.environ.get("CUDACXX") else []
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        candidates += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return candidates


def _cmake() -> str:
    beside = Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.is_file() else shutil.which("cmake")
    if cmake is None:
        raise BackendError("cmake was not found: install it with pip install 'cmake>=3.22'")
    return cmake


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        output = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-40:])
        raise BackendError(
            f"'{' '.join(command[:4])} …' failed: mend what its last lines name (a C++17 compiler such as g++ must "
            f"be there)\n{output}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the native libraries of the operators.")
    parser.add_argument("--output", type=Path, default=Path("out/plugins"), help="build folder")
    parser.add_argument("--architectures", default=",".join(map(str, ARCHITECTURES)), help="such as 87,120")
    parser.add_argument("--references-only", action="store_true", help="no kernels, no nvcc needed")
    arguments = parser.parse_args()
    architectures = tuple(int(number) for number in arguments.architectures.split(","))
    try:
        built = build(arguments.output, kernels=not arguments.references_only, architectures=architectures)
    except BackendError as error:
        sys.exit(f"edgeprune: {error}")
    sys.stdout.write(f"{built.reference}\n" + (f"{built.kernels}\n" if built.kernels else ""))


if __name__ == "__main__":
    main()
