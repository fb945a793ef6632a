"""libjpeg-turbo for aarch64 as a static library.

Static, because the shared one has another name on every system (``libjpeg.so.62`` on Debian, ``libjpeg.so.8`` on a
Jetson): inside libedgeprune it fits all.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BackendError

_PACKAGE = "libjpeg62-turbo-dev"
_HEADERS = ("jpeglib.h", "jmorecfg.h", "jerror.h", "jconfig.h")
# A state of apt's own: the machine's list of packages and its architectures stay as they are.
_APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "root";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
"""


@dataclass(frozen=True)
class StaticJpeg:
    """A folder with ``include``, ``lib/libjpeg.a`` and ``copyright``.

    Attributes:
        folder: The folder.
    """

    folder: Path

    def cmake_options(self) -> list[str]:
        """What makes libedgeprune use it."""
        return [
            "-DEDGEPRUNE_JPEG=ON",
            f"-DJPEG_INCLUDE_DIR={self.folder / 'include'}",
            f"-DJPEG_LIBRARY={self.folder / 'lib' / 'libjpeg.a'}",
        ]

    def is_whole(self) -> bool:
        """Whether all of it is there."""
        files = [*(f"include/{name}" for name in _HEADERS), "lib/libjpeg.a", "copyright"]
        return all((self.folder / name).is_file() for name in files)


def given_jpeg(folder: Path) -> StaticJpeg:
    """One that a user has.

    Raises:
        BackendError: Something is missing in it.
    """
    jpeg = StaticJpeg(folder.resolve())
    if not jpeg.is_whole():
        raise BackendError(
            f"{folder} must hold include/{{{','.join(_HEADERS)}}}, lib/libjpeg.a for aarch64 and its licence as "
            "copyright: correct --jpeg"
        )
    return jpeg


def fetch_jpeg(folder: Path) -> StaticJpeg:
    """Debian's, fetched through apt into ``folder`` where it is not there; nothing is installed.

    Raises:
        BackendError: There is no apt, or it cannot fetch the package.
    """
    jpeg = StaticJpeg(folder.resolve())
    if jpeg.is_whole():
        return jpeg
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BackendError(
            f"apt-get, which brings Debian's {_PACKAGE} for arm64, was not found: give --jpeg DIR"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unpacked = _unpack(Path(scratch).resolve())
        files = {f"include/{name}": f"usr/include/{name}" for name in _HEADERS}
        files["include/jconfig.h"] = "usr/include/aarch64-linux-gnu/jconfig.h"
        files["lib/libjpeg.a"] = "usr/lib/aarch64-linux-gnu/libjpeg.a"
        files["copyright"] = f"usr/share/doc/{_PACKAGE}/copyright"
        for name, source in files.items():
            if not (unpacked / source).is_file():
                raise BackendError(f"{_PACKAGE} for arm64 lacks {source}: give --jpeg DIR")
            (jpeg.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (unpacked / source).replace(jpeg.folder / name)
    return jpeg


def _unpack(scratch: Path) -> Path:
    for name in ("state/lists/partial", "cache/archives/partial", "unpacked"):
        (scratch / name).mkdir(parents=True)
    (scratch / "state" / "status").touch()
    (scratch / "apt.conf").write_text(_APT.format(folder=scratch))
    environment = os.environ | {"APT_CONFIG": str(scratch / "apt.conf")}
    for command in (["apt-get", "update"], ["apt-get", "download", f"{_PACKAGE}:arm64"]):
        ran = subprocess.run(
            command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
        )
    packages = list(scratch.glob("*.deb"))
    if not packages:
        last = (ran.stderr.strip().splitlines() or ["apt-get said nothing"])[-1]
        raise BackendError(f"apt-get cannot fetch {_PACKAGE} for arm64 ({last}): give --jpeg DIR")
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(scratch / "unpacked")], check=True)
    return scratch / "unpacked"
