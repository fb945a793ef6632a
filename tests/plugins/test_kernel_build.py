"""The kernels compile for every architecture without spills, and what guards that does guard it."""

import ctypes
import os
import re
import subprocess

import pytest
import torch

from edgeprune.errors import BackendError
from edgeprune.plugins import build
from edgeprune.plugins.kernel_library import KernelError, KernelLibrary
from edgeprune.plugins.resources import KernelResources, read_resources, table

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

KERNELS = build.SOURCES / "kernels"
COMPILE_KERNEL = build.SOURCES / "cmake" / "compile_kernel.cmake"
SPILLING = """
__global__ __launch_bounds__(1024) void keeps_too_much(float* data, int rounds) {
  float value[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) value[i] = data[i * 1024 + threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 96; ++i) value[i] = value[i] * value[(i + 7) % 96] + value[(i + 31) % 96];
  }
#pragma unroll
  for (int i = 0; i < 96; ++i) data[i * 1024 + threadIdx.x] = value[i];
}
"""


@pytest.mark.parametrize("source", sorted(path.stem for path in KERNELS.glob("*.cu")))
def test_every_kernel_is_compiled_for_every_architecture_without_spills(native_libraries, source):
    found = read_resources(native_libraries.folder / f"{source}.ptxas.txt")
    kernels = {one.kernel for one in found}
    written = set(
        re.findall(r"__global__.*?void (\w+)\(", (KERNELS / f"{source}.cu").read_text("utf-8"), re.DOTALL)
    )
    assert {kernel.partition("<")[0] for kernel in kernels} == written
    compiled = sorted((one.kernel, one.architecture) for one in found)
    assert compiled == sorted((kernel, number) for kernel in kernels for number in build.ARCHITECTURES)
    for one in found:
        assert (one.stack_bytes, one.spill_bytes) == (0, 0), one
        assert 0 < one.registers <= 255


def test_a_report_is_read(tmp_path):
    symbol = "_ZN9edgeprune12_GLOBAL__N_113multiply_keysI6__halfLi8EEEvi"
    (tmp_path / "some.ptxas.txt").write_text(
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_87'\n"
        "ptxas info    : Function properties for it\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n",
        encoding="utf-8",
    )
    assert read_resources(tmp_path / "some.ptxas.txt") == [
        KernelResources("multiply_keys<float16, 8>", 87, registers=40, stack_bytes=8, spill_bytes=16)
    ]
    assert list(table(tmp_path))[-1] == "| some | `multiply_keys<float16, 8>` | 40 |"


@pytest.mark.parametrize(
    ("source", "message"),
    [(SPILLING, "spills registers"), ("void host_only() {}", "reported no kernel"), ("x", "error")],
)
def test_what_must_not_compile_does_not(tmp_path, source, message):
    (tmp_path / "kernel.cu").write_text(source, encoding="utf-8")
    arguments = {
        "NVCC": build.find_nvcc(),
        "SOURCE": tmp_path / "kernel.cu",
        "OBJECT": tmp_path / "kernel.o",
        "ARCHITECTURES": "90",
        "HOST_COMPILER": os.environ.get("CXX", "c++"),
    }
    defined = [f"-D{name}={value}" for name, value in arguments.items()]
    ran = subprocess.run(
        ["cmake", *defined, "-P", str(COMPILE_KERNEL)], capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert message in ran.stderr
    assert not (tmp_path / "kernel.o").exists()


def test_kernels_and_references_have_the_same_functions(native_libraries):
    headers = "".join(path.read_text(encoding="utf-8") for path in KERNELS.glob("*.h"))
    functions = re.findall(r"^EDGEPRUNE_API \w+ (edgeprune_\w+)\(", headers, re.MULTILINE)
    assert len(functions) == 11
    for path in (native_libraries.kernels, native_libraries.reference):
        library = ctypes.CDLL(str(path))
        for function in functions:
            assert getattr(library, function)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: 'make test-gpu' runs the kernels")
def test_without_a_gpu_a_launch_is_an_error_and_no_result(native_libraries):
    kernels = KernelLibrary(native_libraries.kernels, "cpu")
    with pytest.raises(KernelError, match="CUDA error"):
        kernels.select_top_k(torch.zeros(1, 4), torch.tensor([1]), torch.ones(1, 4, dtype=torch.bool))


def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_candidates", lambda: [tmp_path / "nvcc"])
    with pytest.raises(BackendError, match=r"nvcc.*was not found.*pip install"):
        build.find_nvcc()


def test_an_architecture_that_nvcc_does_not_know_is_named(tmp_path):
    with pytest.raises(BackendError, match=r"cannot\s+compile\s+for\s+sm_12345"):
        build.build(tmp_path, architectures=(12345,))


def test_a_file_that_is_no_library_is_named_with_the_remedy(tmp_path):
    (tmp_path / "broken.so").write_text("no library", encoding="utf-8")
    with pytest.raises(BackendError, match=r"broken\.so is no usable library.*plugins\.build"):
        KernelLibrary(tmp_path / "broken.so", "cpu")
