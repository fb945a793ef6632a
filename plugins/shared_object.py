"""What a file of a native library is, before the loader touches it."""

import struct
from pathlib import Path

# e_machine of the ELF header, as platform.machine() names it.
_MACHINES = {0x3E: "x86_64", 0xB7: "aarch64"}


def machine_of(path: Path) -> str | None:
    """The architecture of a whole shared object of 64-bit Linux; None for anything else.

    The loader maps a file that was cut off, and the process dies when it reads behind the end; the section headers lie
    last, so they show whether all is there.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
        size = path.stat().st_size
    except OSError:
        return None
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return None
    kind, machine = struct.unpack_from("<HH", header, 16)
    (sections,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    if kind != 3 or sections + entry * count > size:
        return None
    return _MACHINES.get(machine)
