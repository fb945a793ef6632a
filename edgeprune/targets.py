"""The devices that engines are built for, as data.

Peak rates are those of dense matrix products on the tensor cores of the GPU, in 10¹² operations per second; the
deep-learning accelerators (DLA) of a Jetson take no dynamic shapes and count for nothing here. Vendors print sparse
rates, which are twice as high, and on a Jetson add the DLA's.

A rate is SMs · operations per cycle and SM · clock. INT8 operations per cycle and SM: 4096 on the Orin (170 sparse TOPS
of 64 tensor cores at 1.3 GHz: NVIDIA Jetson AGX Orin technical brief), 2048 on GeForce GPUs from RTX 30 to RTX 50 (238
dense TOPS of 68 SMs at 1.71 GHz: NVIDIA Ampere GA102 whitepaper, RTX 3080). FP16 runs at half the INT8 rate, with
accumulation in FP16 on GeForce; FP8 like INT8; FP4 at twice the INT8 rate. INT4 holds weights only, computed in FP16.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edgeprune.errors import TargetError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")
ARCHITECTURES = ("aarch64", "x86_64")
THIS_MACHINE = "this"
GIB = 2**30

_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "fp4")
_VERSION = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
        name: What ``--target`` takes.
        title: Its full name.
        sm: Compute capability, 87 for 8.7.
        memory_bytes: Memory that the GPU can use.
        shared_memory: Whether host and GPU share it.
        bandwidth: Of the memory, in bytes per second.
        tops: Peak rate of dense matrix products by precision, 10¹² operations per second; empty = unknown.
        precisions: Precisions that engines for it may have.
        tensorrt: Oldest TensorRT that knows the device, and newest major version that edgeprune knows.
        rtx: Whether TensorRT for RTX builds for it.
        architecture: Of the host, as ``uname -m`` says.
        note: What the numbers stand for, where that is not plain.
    """

    name: str
    title: str
    sm: int
    memory_bytes: int
    shared_memory: bool
    bandwidth: float
    tops: Mapping[str, float]
    precisions: tuple[str, ...]
    tensorrt: tuple[str, str]
    rtx: bool
    architecture: str
    note: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise TargetError(f"a target cannot be called {self.name!r}: use lower case, digits and dashes")
        if not 50 <= self.sm <= 199:
            raise TargetError(f"target {self.name}: {self.sm} is no compute capability: 8.7 is 87")
        if self.memory_bytes < 1 or self.bandwidth < 0 or any(rate <= 0 for rate in self.tops.values()):
            raise TargetError(f"target {self.name}: memory, bandwidth and rates must be positive")
        unknown = [name for name in (*self.precisions, *self.tops) if name not in PRECISIONS]
        if unknown or not self.precisions:
            raise TargetError(
                f"target {self.name}: precision {', '.join(unknown) or 'missing'}, known: {', '.join(PRECISIONS)}"
            )
        if not set(self.tops) <= set(self.precisions):
            raise TargetError(f"target {self.name} has a rate for a precision that it lacks")
        if not all(_VERSION.fullmatch(version) for version in self.tensorrt):
            raise TargetError(f"target {self.name}: TensorRT versions look like 10.3, not {self.tensorrt}")
        if self.architecture not in ARCHITECTURES:
            raise TargetError(
                f"target {self.name}: architecture {self.architecture!r}, known: {', '.join(ARCHITECTURES)}"
            )
        object.__setattr__(self, "tops", MappingProxyType(dict(self.tops)))

    @property
    def usable_bytes(self) -> int:
        """What engines may use: the system, and on a shared memory the host's programs, need the rest."""
        return max(0, self.memory_bytes - int((1.5 if self.shared_memory else 0.5) * GIB))

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the device lacks.

        Raises:
            TargetError: It is unknown, or the device lacks it; the message names what it has.
        """
        if precision not in PRECISIONS:
            raise TargetError(f"precision '{precision}' is unknown, known: {', '.join(PRECISIONS)}")
        if precision not in self.precisions:
            raise TargetError(
                f"{self.title} (SM {self.sm}) has no {precision}: choose {', '.join(self.precisions)}"
            )


def _orin(
    name: str, title: str, gib: int, bandwidth: float, sms: int, megahertz: int, note: str = ""
) -> Target:
    int8 = sms * 4096 * megahertz / 1e6
    return Target(
        name=name,
        title=title,
        sm=87,  # CUDA GPU compute capabilities, NVIDIA
        memory_bytes=gib * GIB,
        shared_memory=True,
        bandwidth=bandwidth * 1e9,
        tops={"fp16": round(int8 / 2, 1), "int8": round(int8, 1)},
        precisions=_AMPERE,  # no FP8 and no FP4: these came with SM 8.9 and 10.0
        tensorrt=("10.3", "11"),  # JetPack 6.1 has 10.3.0, 7.2 has 10.16.2; 11.4 installs on 7.2.2
        rtx=False,  # TensorRT for RTX 1.7 knows SM 75, 80, 86, 89, 120 and 121
        architecture="aarch64",
        note=note,
    )


def _geforce(
    name: str,
    title: str,
    card: str,
    sm: int,
    gib: int,
    bandwidth: float,
    sms: int,
    megahertz: int,
    precisions: tuple[str, ...],
    tensorrt: str,
) -> Target:
    int8 = sms * 2048 * megahertz / 1e6
    rates = {"fp16": int8 / 2, "bf16": int8 / 4, "int8": int8, "fp8": int8, "fp4": 2 * int8}
    return Target(
        name=name,
        title=title,
        sm=sm,
        memory_bytes=gib * GIB,
        shared_memory=False,
        bandwidth=bandwidth * 1e9,
        tops={key: round(rate, 1) for key, rate in rates.items() if key in precisions},
        precisions=precisions,
        tensorrt=(tensorrt, "11"),
        rtx=True,
        architecture="x86_64",
        note=f"memory, bandwidth and rates of the {card}",
    )


_ALL = (
    # Bandwidth: NVIDIA's Jetson Orin series data sheets; 4 GB: 64 bit · 6400 MT/s / 8, 8 GB: 128 bit, AGX: 256 bit.
    # GPU clocks of the highest power mode, with "Super" (JetPack 6.2) on Nano and NX: Jetson Linux developer guide.
    # SMs: CUDA cores of the data sheets / 128.
    _orin("orin-nano-4", "Jetson Orin Nano 4 GB", 4, 51.2, 4, 1020, "Super mode; its rate is not verified"),
    _orin("orin-nano-8", "Jetson Orin Nano 8 GB", 8, 102.4, 8, 1020, "Super mode"),
    _orin("orin-nx-8", "Jetson Orin NX 8 GB", 8, 102.4, 8, 1173, "Super mode; its rate is not verified"),
    _orin("orin-nx-16", "Jetson Orin NX 16 GB", 16, 102.4, 8, 1173, "Super mode"),
    _orin("agx-orin-32", "Jetson AGX Orin 32 GB", 32, 204.8, 14, 930),
    _orin("agx-orin-64", "Jetson AGX Orin 64 GB", 64, 204.8, 16, 1300),
    # SMs, boost clocks, memory and bandwidth: NVIDIA's product pages of the named cards. A common small desktop card of
    # each generation stands for it; --memory gives the memory of another. RTX 30 and 40 are known to TensorRT 10.3,
    # RTX 50 from 10.8 on (its release notes). BF16 accumulates in FP32, at half the rate of FP16 on GeForce.
    _geforce("rtx30", "GeForce RTX 30", "RTX 3060 12 GB", 86, 12, 360.0, 28, 1777, _AMPERE, "10.3"),
    _geforce("rtx40", "GeForce RTX 40", "RTX 4060 8 GB", 89, 8, 272.0, 24, 2460, _ADA, "10.3"),
    _geforce("rtx50", "GeForce RTX 50", "RTX 5060 8 GB", 120, 8, 448.0, 30, 2497, _BLACKWELL, "10.8"),
    Target(
        name="dgx-spark",
        title="DGX Spark (GB10)",
        sm=121,  # CUDA GPU compute capabilities, NVIDIA
        memory_bytes=128 * 10**9,  # data sheet: 128 GB LPDDR5X, unified
        shared_memory=True,
        bandwidth=273e9,  # data sheet
        # Data sheet: 1 PFLOP of sparse FP4; half of it dense, and half again per doubling of the width.
        tops={"fp4": 500.0, "fp8": 250.0, "int8": 250.0, "fp16": 125.0},
        precisions=_BLACKWELL,
        tensorrt=("10.13", "11"),  # CUDA 13.0, the first for this GPU, came with 10.13
        rtx=True,
        architecture="aarch64",
        note="rates derived from the sparse FP4 rate",
    ),
)
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _ALL})


def targets() -> tuple[Target, ...]:
    """Every target, and the GPU of this machine if it has one."""
    from edgeprune.this_machine import this_machine

    own = this_machine()
    return (*TARGETS.values(), *([own] if own is not None else []))


def find_target(name: str) -> Target:
    """A target by name.

    Raises:
        TargetError: There is none of that name, or this machine has no GPU.
    """
    if name == THIS_MACHINE:
        from edgeprune.this_machine import this_machine

        own = this_machine()
        if own is None:
            raise TargetError(
                "this machine has no NVIDIA GPU with a driver: name the device to build for, "
                "edgeprune targets lists them"
            )
        return own
    if name not in TARGETS:
        raise TargetError(
            f"target '{name}' is unknown, known: {', '.join(TARGETS)}, {THIS_MACHINE} (edgeprune targets)"
        )
    return TARGETS[name]
