"""Compiling for another machine: CMake's toolchain file and the compiler that it names."""

import platform
import shutil
from pathlib import Path

from edgeprune.errors import BackendError

_CMAKE = Path(__file__).resolve().parent / "cmake"


def toolchain(machine: str) -> Path | None:
    """The toolchain file for a machine; None for the one that this runs on.

    Args:
        machine: As ``uname -m`` says, such as "aarch64".

    Raises:
        BackendError: There is no toolchain file for it, or its compiler is missing.
    """
    if machine == platform.machine():
        return None
    file = _CMAKE / f"{machine}.cmake"
    if not file.is_file():
        raise BackendError(
            f"there is no way to compile for '{machine}' here: give --machine aarch64, or build there"
        )
    if shutil.which(f"{machine}-linux-gnu-g++") is None:
        raise BackendError(
            f"{machine}-linux-gnu-g++ was not found: install it (Debian: g++-{machine}-linux-gnu), or build there"
        )
    return file
