"""install.sh on the file systems of several Jetsons: what fits is installed whole, what does not is named."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

import edgeprune.runtimes.jetson

INSTALLER = Path(edgeprune.runtimes.jetson.__file__).resolve().parent / "install.sh"
PREFIX = "opt/edgeprune"
RELEASE = "# R{0} (release), REVISION: {1}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025"
BUILT_FOR = b"\0edgeprune plugin 1; TensorRT 10.3; CUDA 13000; SM 87\0"


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An unpacked package with little in it."""
    folder = tmp_path / "package"
    write(folder / "README.md", "# edgeprune 1.2.3 for Jetson\n")
    write(folder / "bin" / "edgeprune-run", "program").chmod(0o755)
    write(folder / "lib" / "libedgeprune.so.1", "library")
    (folder / "lib" / "libedgeprune.so").symlink_to("libedgeprune.so.1")
    write(folder / "include" / "edgeprune" / "edgeprune.h")
    write(folder / "share" / "edgeprune" / "plugins" / "compiled" / "libedgeprune_tensorrt.so", BUILT_FOR)
    shutil.copy(INSTALLER, folder / "install.sh")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" for path in files]
    write(folder / "SHA256SUMS", "\n".join(lines) + "\n")
    return folder


def jetson(folder: Path, *, l4t: tuple[str, str] = ("36", "4.3"), tensorrt: str = "10.3.0") -> Path:
    """The root of a Jetson's file system, as far as install.sh looks at it."""
    write(folder / "lib" / "ld-linux-aarch64.so.1")
    write(folder / "etc" / "nv_tegra_release", RELEASE.format(*l4t) + "\n# KERNEL_VARIANT: oot\n")
    packages = {
        "libc6": "2.35-0ubuntu3.8",
        "libstdc++6": "12.3.0-1ubuntu1~22.04",
        "nvidia-l4t-core": "36.4.3-2025",
    }
    set_packages(folder, packages)
    if tensorrt:
        write(folder / "usr" / "lib" / "aarch64-linux-gnu" / f"libnvinfer.so.{tensorrt}")
    return folder


def set_packages(root: Path, packages: dict[str, str]) -> None:
    entries = [
        f"Package: {name}\nStatus: install ok installed\nArchitecture: arm64\nVersion: {version}\n"
        for name, version in packages.items()
    ]
    write(root / "var" / "lib" / "dpkg" / "status", "\n".join(entries))


def install(package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(package / "install.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_it_installs_a_folder_of_its_own_and_removes_it_again(package, tmp_path):
    root = jetson(tmp_path / "root")
    before = files(root)
    done = install(package, "--root", root)
    assert done.returncode == 0, done.stderr
    assert "Jetson Linux 36.4.3: JetPack 6" in done.stdout
    installed = root / PREFIX
    assert (installed / "bin" / "edgeprune-run").stat().st_mode & 0o777 == 0o755
    assert (installed / "lib" / "libedgeprune.so").readlink() == Path("libedgeprune.so.1")
    listed = (installed / "share" / "edgeprune" / "installed.txt").read_text().splitlines()
    assert set(listed) == set(files(installed))
    assert list(installed.parent.iterdir()) == [installed]
    removed = install(package, "--root", root, "--uninstall")
    assert removed.returncode == 0, removed.stderr
    assert files(root) == before


def test_checking_changes_nothing(package, tmp_path):
    root = jetson(tmp_path / "root")
    before = files(root)
    looked = install(package, "--root", root, "--check")
    assert looked.returncode == 0, looked.stderr
    assert "edgeprune 1.2.3 fits; nothing was changed" in looked.stdout
    assert files(root) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "lib" / "ld-linux-aarch64.so.1").unlink(), "the package is for aarch64"),
        (lambda root: jetson(root, l4t=("35", "5.0")), "Jetson Linux 35.5.0 is older than 36.4"),
        (lambda root: jetson(root, l4t=("36", "3.0")), "Jetson Linux 36.3.0 is older than 36.4"),
        (lambda root: set_packages(root, {"libc6": "2.31-0ubuntu9"}), "glibc is 2.31"),
        (lambda root: set_packages(root, {"libstdc++6": "11.4.0-1"}), "libstdc++6 is 11.4.0-1"),
        (lambda root: write(root / PREFIX / "other"), "holds something else"),
        (lambda root: write(root / PREFIX), "is no folder"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_installed(package, tmp_path, change, said):
    root = jetson(tmp_path / "root")
    change(root)
    before = files(root)
    for arguments in (["--check"], []):
        refused = install(package, "--root", root, *arguments)
        assert refused.returncode == 1
        first, last = refused.stderr.splitlines()
        assert said in first
        assert last == "install.sh: nothing was installed"
        assert files(root) == before


def test_everything_that_does_not_fit_is_said_at_once(package, tmp_path):
    root = jetson(tmp_path / "root", l4t=("32", "7.1"))
    set_packages(root, {"libc6": "2.27-3", "libstdc++6": "8.4.0-1"})
    lines = install(package, "--root", root).stderr.splitlines()
    for word, line in zip(
        ("Linux 32.7.1", "glibc", "libstdc++6", "nothing was installed"), lines, strict=True
    ):
        assert word in line


def test_a_machine_that_is_no_jetson_is_refused(package, tmp_path):
    root = jetson(tmp_path / "root")
    (root / "etc" / "nv_tegra_release").unlink()
    set_packages(root, {"libc6": "2.35-0ubuntu3.8"})
    refused = install(package, "--root", root)
    assert refused.returncode == 1
    assert "this is no Jetson" in refused.stderr
    # The package says the release, too.
    set_packages(root, {"nvidia-l4t-core": "36.4.7-20250918154033"})
    assert "Jetson Linux 36.4.7: JetPack 6" in install(package, "--root", root, "--check").stdout


@pytest.mark.parametrize("name", ["lib/libedgeprune.so.1", "include/edgeprune/edgeprune.h", "SHA256SUMS"])
def test_a_damaged_package_is_refused(package, tmp_path, name):
    root = jetson(tmp_path / "root")
    if name == "SHA256SUMS":
        (package / name).unlink()
    else:
        write(package / name, "changed")
    before = files(root)
    refused = install(package, "--root", root)
    assert refused.returncode == 1
    assert "unpack the archive again" in refused.stderr
    assert files(root) == before


def test_a_second_installation_replaces_the_first_but_no_file_of_the_user(package, tmp_path):
    root = jetson(tmp_path / "root")
    old = write(package / "share" / "edgeprune" / "old.txt", "of an earlier version")
    assert install(package, "--root", root).returncode == 0
    assert (root / PREFIX / "share" / "edgeprune" / "old.txt").is_file()
    old.unlink()
    assert install(package, "--root", root).returncode == 0
    assert not (root / PREFIX / "share" / "edgeprune" / "old.txt").exists()
    mine = write(root / PREFIX / "bundles" / "mine", "a bundle")
    refused = install(package, "--root", root)
    assert refused.returncode == 1
    assert "bundles/mine was not installed and would be lost" in refused.stderr
    assert "stays" in install(package, "--root", root, "--uninstall").stdout
    assert files(root / PREFIX) == {"bundles/mine": b"a bundle"}
    assert mine.read_text() == "a bundle"


@pytest.mark.parametrize(
    ("l4t", "tensorrt", "said", "taken"),
    [
        (("39", "2.0"), "10.16.2", "plugin: the compiled one, for TensorRT 10", True),
        (("39", "2.2"), "11.4.1", "no plugin: the plugin has to be compiled on the Jetson", False),
        (("36", "4.3"), "10.3.0", "no plugin: the plugin has to be compiled on the Jetson", False),
        (("36", "4.3"), "", "no plugin: TensorRT (libnvinfer) was not found", False),
        (("36", "4.3"), "8.6.2", "no plugin: TensorRT 8.6.2 is older than 10.3", False),
    ],
)
def test_the_compiled_plugin_is_taken_where_it_fits(package, tmp_path, l4t, tensorrt, said, taken):
    root = jetson(tmp_path / "root", l4t=l4t, tensorrt=tensorrt)
    wanted = install(package, "--root", root, "--plugin", "on", "--check")
    assert wanted.returncode == (0 if taken else 1)
    done = install(package, "--root", root)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert (root / PREFIX / "lib" / "libedgeprune_tensorrt.so").exists() == taken
    assert install(package, "--root", root, "--plugin", "off").returncode == 0
    assert not (root / PREFIX / "lib" / "libedgeprune_tensorrt.so").exists()


def test_another_chip_gets_no_plugin(package, tmp_path):
    root = jetson(tmp_path / "root", l4t=("39", "2.0"), tensorrt="10.16.2")
    chip = write(root / "proc" / "device-tree" / "compatible", b"nvidia,p3971\0nvidia,tegra264\0")
    assert "no plugin: this board is no Orin" in install(package, "--root", root, "--check").stdout
    chip.write_bytes(b"nvidia,p3767\0nvidia,tegra234\0")
    assert "plugin: the compiled one" in install(package, "--root", root, "--check").stdout


def test_an_installation_that_fails_leaves_the_earlier_one(package, tmp_path):
    root = jetson(tmp_path / "root")
    assert install(package, "--root", root).returncode == 0
    before = files(root)
    # Its checksum is right and it cannot be copied: what a full disk does, too.
    (package / "lib" / "libedgeprune.so").unlink()
    (package / "lib" / "libedgeprune.so").mkdir()
    shutil.rmtree(package / "include")
    lines = (package / "SHA256SUMS").read_text().splitlines(keepends=True)
    write(package / "SHA256SUMS", "".join(line for line in lines if "include" not in line))
    failed = install(package, "--root", root)
    assert failed.returncode != 0
    assert files(root) == before
    assert list((root / PREFIX).parent.iterdir()) == [root / PREFIX]


@pytest.mark.parametrize(
    "arguments",
    [["--root", "nowhere"], ["--prefix", "relative"], ["--plugin", "maybe"], ["--bla"], ["--prefix"]],
)
def test_a_wrong_option_is_one_line(package, arguments):
    refused = install(package, *arguments)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stdout == ""


def test_uninstalling_where_nothing_is_installed_is_refused(package, tmp_path):
    refused = install(package, "--root", jetson(tmp_path / "root"), "--uninstall")
    assert refused.returncode == 1
    assert "has no installation of edgeprune" in refused.stderr
