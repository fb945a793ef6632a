"""The NVIDIA GPU of this machine, asked of its driver; nothing has to be installed for that."""

import ctypes
import platform
from pathlib import Path

from edgeprune.targets import ARCHITECTURES, THIS_MACHINE, Target

# CUdevice_attribute of cuda.h
_CLOCK_KHZ_MEMORY, _BUS_WIDTH, _INTEGRATED = 36, 37, 18
_MAJOR, _MINOR = 75, 76
# Compute capability from which on tensor cores take FP8 and FP4, and TensorRT for RTX's.
_FP8_SM, _FP4_SM = 89, 100
_RTX_SMS = (75, 80, 86, 89, 120, 121)
_TEGRA_MODEL = Path("/proc/device-tree/model")


def this_machine() -> Target | None:
    """Describe the first GPU; None without a GPU, or without its driver."""
    architecture = platform.machine()
    if architecture not in ARCHITECTURES:
        return None
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(library)
            break
        except OSError:
            continue
    else:
        return None
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device) or cuda.cuDeviceGetName(name, 128, device):
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        return 0 if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device) else value.value

    sm = 10 * attribute(_MAJOR) + attribute(_MINOR)
    precisions = ["fp32", "fp16", *(["bf16"] if sm >= 80 else []), "int8", "int4"]
    precisions += ["fp8"] if sm >= _FP8_SM else []
    precisions += ["fp4"] if sm >= _FP4_SM else []
    title = name.value.decode(errors="replace")
    if _TEGRA_MODEL.is_file():
        title = _TEGRA_MODEL.read_text(errors="replace").strip("\0\n ") or title
    return Target(
        name=THIS_MACHINE,
        title=title,
        sm=sm,
        memory_bytes=memory.value,
        shared_memory=bool(attribute(_INTEGRATED)),
        # Two transfers per clock.
        bandwidth=2e3 * attribute(_CLOCK_KHZ_MEMORY) * attribute(_BUS_WIDTH) / 8,
        tops={},
        precisions=tuple(precisions),
        tensorrt=("10.3", "11"),
        rtx=sm in _RTX_SMS,
        architecture=architecture,
        note="as its driver says; rates unknown",
    )
