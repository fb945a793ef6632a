"""Building the native libraries of the operators with CMake.

``python -m edgeprune.plugins.build [--output DIR] [--architectures 87] [--references-only]
[--tensorrt-root DIR] [--machine aarch64 --cudart FILE]``

``libedgeprune_reference.so`` needs a C++17 compiler, ``libedgeprune_kernels.so`` also nvcc: the CUDA compiler of
this Python environment (package nvidia-cuda-nvcc), of the variable ``CUDACXX``, of ``PATH`` or of
``/usr/local/cuda``, in this order after the variable. ``libedgeprune_tensorrt.so`` also needs TensorRT's headers: of a
JetPack, of NVIDIA's packages, or of the folder that ``--tensorrt-root`` or the variable ``TENSORRT_ROOT`` names.
"""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BackendError
from edgeprune.plugins.cross_compiler import toolchain
from edgeprune.plugins.plugin_library import LIBRARY

SOURCES = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 87, 89, 90, 120)
"""Compute capabilities that the kernels are compiled for: A100, RTX 30, Orin, RTX 40, H100/H200, RTX 50."""


@dataclass(frozen=True)
class NativeLibraries:
    """What a build left behind.

    Attributes:
        reference: The references for the host.
        kernels: The kernels for NVIDIA GPUs; None if they were not asked for.
        folder: Where they lie, with ptxas' reports.
        tensorrt: TensorRT's plugins; None if they were not built.
        without_tensorrt: Why they were not, with the remedy; empty if they were.
    """

    reference: Path
    kernels: Path | None
    folder: Path
    tensorrt: Path | None
    without_tensorrt: str


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
    folder: Path,
    *,
    kernels: bool = True,
    architectures: tuple[int, ...] = ARCHITECTURES,
    tensorrt_root: Path | None = None,
    machine: str | None = None,
    cudart: Path | None = None,
    jobs: int = 2,
) -> NativeLibraries:
    """Configure and build; what is up to date in ``folder`` is kept.

    Args:
        folder: CMake's build folder.
        kernels: Whether to build the CUDA kernels, and TensorRT's plugins where its headers are found, too.
        architectures: Compute capabilities to compile for, without the dot.
        tensorrt_root: Folder of the TensorRT whose headers are used; else those that the build folder has used before,
            or the system's.
        machine: "aarch64" on another machine to compile across, with g++-aarch64-linux-gnu.
        cudart: ``libcudart_static.a`` of that machine.
        jobs: Files compiled at a time.

    Raises:
        BackendError: A tool is missing or a file does not compile.
    """
    cmake = _cmake()
    options = [f"-DEDGEPRUNE_KERNELS={'ON' if kernels else 'OFF'}"]
    if tensorrt_root is not None:
        options.append(f"-DTENSORRT_ROOT={_with_headers(tensorrt_root)}")
    if kernels:
        options += [
            f"-DEDGEPRUNE_NVCC={find_nvcc()}",
            f"-DEDGEPRUNE_CUDA_ARCHITECTURES={';'.join(map(str, architectures))}",
        ]
    if machine is not None and (file := toolchain(machine)) is not None:
        options += [f"-DCMAKE_TOOLCHAIN_FILE={file}", f"-DEDGEPRUNE_CUDART={_runtime_for(machine, cudart)}"]
    configured = _run([cmake, "-S", str(SOURCES), "-B", str(folder), *options])
    _run([cmake, "--build", str(folder), "--parallel", str(jobs)])
    missing = re.search(r"edgeprune_tensorrt: not built, (.*)", configured)
    without = missing[1] if missing else "" if kernels else "the kernels are not built"
    return NativeLibraries(
        reference=folder / "libedgeprune_reference.so",
        kernels=folder / "libedgeprune_kernels.so" if kernels else None,
        folder=folder,
        tensorrt=None if without else folder / LIBRARY,
        without_tensorrt=without,
    )


def _with_headers(root: Path) -> Path:
    if not any(root.glob("NvInferRuntime.h")) and not any(root.glob("include/**/NvInferRuntime.h")):
        raise BackendError(
            f"{root} has no include/NvInferRuntime.h: --tensorrt-root (TENSORRT_ROOT) must name the folder of a "
            "TensorRT with its headers"
        )
    return root.resolve()


def _runtime_for(machine: str, cudart: Path | None) -> Path:
    if cudart is None or not cudart.is_file():
        raise BackendError(
            f"--cudart must name libcudart_static.a for {machine}, of nvcc's version: it is in the {machine} wheel of "
            "nvidia-cuda-runtime and in a CUDA toolkit there"
        )
    return cudart.resolve()


def _output(machine: str) -> Path:
    return Path("out/plugins" if machine == platform.machine() else f"out/plugins-{machine}")


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


def _run(command: list[str]) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        output = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-40:])
        raise BackendError(
            f"'{' '.join(command[:4])} …' failed: mend what its last lines name (a C++17 compiler such as g++ must "
            f"be there)\n{output}"
        )
    return ran.stdout


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the native libraries of the operators.")
    parser.add_argument(
        "--output", type=Path, help="build folder; out/plugins, or out/plugins-MACHINE for another machine"
    )
    parser.add_argument("--architectures", default=",".join(map(str, ARCHITECTURES)), help="such as 87,120")
    parser.add_argument("--references-only", action="store_true", help="no kernels, no nvcc needed")
    parser.add_argument(
        "--tensorrt-root",
        type=Path,
        default=os.environ.get("TENSORRT_ROOT") or None,
        help="folder of a TensorRT with include/NvInferRuntime.h",
    )
    parser.add_argument(
        "--machine", default=platform.machine(), help="aarch64 to compile across for a Jetson"
    )
    parser.add_argument("--cudart", type=Path, help="libcudart_static.a of that machine")
    arguments = parser.parse_args()
    architectures = tuple(int(number) for number in arguments.architectures.split(","))
    try:
        built = build(
            arguments.output or _output(arguments.machine),
            kernels=not arguments.references_only,
            architectures=architectures,
            tensorrt_root=arguments.tensorrt_root,
            machine=arguments.machine,
            cudart=arguments.cudart,
        )
    except BackendError as error:
        sys.exit(f"edgeprune: {error}")
    for path in (built.reference, built.kernels, built.tensorrt):
        if path is not None:
            sys.stdout.write(f"{path}\n")
    if built.without_tensorrt:
        sys.stdout.write(f"TensorRT's plugins were not built: {built.without_tensorrt}\n")


if __name__ == "__main__":
    main()
