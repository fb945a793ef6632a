"""Files out of wheels for aarch64, fetched through pip; nothing is installed."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from edgeprune.errors import BackendError

# Ubuntu 22.04 has glibc 2.35; packages name the oldest that they run on.
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64")


def fetch_from_wheel(requirement: str, wanted: Mapping[str, str], folder: Path) -> None:
    """Put files of a wheel into ``folder``, where they are not there.

    Args:
        requirement: Such as "onnxruntime==1.31.1".
        wanted: By its name in ``folder``, the end of a file's path in the wheel; just one file must end so.
        folder: Where they go.

    Raises:
        BackendError: pip cannot fetch the wheel, or it lacks a file.
    """
    if all((folder / name).is_file() for name in wanted):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        options = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.11", "-d", scratch]
        for platform in _PLATFORMS:
            options += ["--platform", platform]
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", requirement]
        ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if not wheels:
            last = (ran.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise BackendError(f"pip cannot fetch {requirement} for aarch64 ({last}): see to its network")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, end in wanted.items():
                found = [member for member in wheel.namelist() if member.endswith(end)]
                if len(found) != 1:
                    raise BackendError(
                        f"the wheel of {requirement} has {len(found)} files …{end}: take another one"
                    )
                partial = folder / f".{name}.partial"
                partial.write_bytes(wheel.read(found[0]))
                partial.replace(folder / name)
