"""What a binary asks of the system's libraries: a Jetson's are older than those of the machine that compiles."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeprune.errors import BackendError

Version = tuple[int, ...]

# JetPack 6 is Ubuntu 22.04: glibc 2.35, and libstdc++ and libgcc of GCC 12 (its packages libc6, libstdc++6, libgcc-s1).
UBUNTU_22_04: Mapping[str, Version] = {
    "GLIBC": (2, 35),
    "GLIBCXX": (3, 4, 30),
    "CXXABI": (1, 3, 13),
    "GCC": (12, 0, 0),
}
_REFERENCE = re.compile(r"^\s+0x[0-9a-f]+ 0x[0-9a-f]+ \d+ (\S+)$", re.MULTILINE)
_VERSION = re.compile(r"([A-Z]+)_(\d+(?:\.\d+)*)")


def required_versions(binary: Path, machine: str = "aarch64") -> dict[str, Version]:
    """The newest version of each library's symbols that a program or shared object needs, such as GLIBC: (2, 34).

    Raises:
        BackendError: objdump is missing, or this is no program or shared object.
    """
    objdump = shutil.which(f"{machine}-linux-gnu-objdump")
    if objdump is None:
        raise BackendError(
            f"{machine}-linux-gnu-objdump was not found: install it (Debian: binutils-{machine}-linux-gnu)"
        )
    ran = subprocess.run([objdump, "-p", str(binary)], capture_output=True, text=True, check=False)
    if ran.returncode != 0 or "Dynamic Section" not in ran.stdout:
        raise BackendError(f"{binary} is no program or shared object for {machine}: build it again")
    needed: dict[str, Version] = {}
    for name in _REFERENCE.findall(ran.stdout.partition("Version References")[2]):
        found = _VERSION.fullmatch(name)
        if found is None:
            raise BackendError(f"{binary} needs {name}, a version that cannot be compared: link without it")
        version = tuple(int(part) for part in found[2].split("."))
        needed[found[1]] = max(version, needed.get(found[1], ()))
    return needed


def check_versions(binaries: Iterable[Path], newest: Mapping[str, Version] = UBUNTU_22_04) -> None:
    """Refuse binaries that do not load on an older system.

    Args:
        binaries: Programs and shared objects.
        newest: The newest version of each library's symbols that the system has.

    Raises:
        BackendError: One needs a newer version, or a library that is not named.
    """
    for binary in binaries:
        for name, version in required_versions(binary).items():
            if version > newest.get(name, ()):
                has = f"{name}_{'.'.join(map(str, newest[name]))} at most" if name in newest else f"no {name}"
                raise BackendError(
                    f"{binary.name} needs {name}_{'.'.join(map(str, version))}, JetPack 6 (Ubuntu 22.04) has {has}: "
                    "compile with an older g++-aarch64-linux-gnu, or on the device"
                )
