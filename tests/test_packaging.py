"""The package as others get it: links, wheel, version, and what happens where an extra is missing."""

import ast
import email
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgeprune

REPOSITORY = Path(__file__).resolve().parent.parent
LINKED = ("export", "calib", "runtimes", "plugins")
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "safetensors")

# Python's own finder, blind to some modules: imports of them fail as if they were not installed.
BLIND = """
import importlib.machinery, sys
missing = {missing!r}
find_spec = importlib.machinery.PathFinder.find_spec
def find(name, path=None, target=None):
    return None if name.partition(".")[0] in missing else find_spec(name, path, target)
importlib.machinery.PathFinder.find_spec = find
from edgeprune.cli import main
main({arguments!r}, prog_name="edgeprune")
"""


def python_files(folder: Path) -> list[Path]:
    """Sources of a folder, without environments, caches and the second sight through the links."""
    hidden = {REPOSITORY / "edgeprune" / name for name in LINKED}
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path in hidden or path.name in ("out", "build", "dist"):
            continue
        if path.is_dir():
            found += python_files(path)
        elif path.suffix == ".py":
            found.append(path)
    return found


def run_without(missing: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a new process in which some modules are not installed."""
    code = BLIND.format(missing=set(missing), arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", LINKED)
def test_a_link_leads_to_the_top_level_folder(name):
    link = REPOSITORY / "edgeprune" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (link / "__init__.py").is_file()


def test_nothing_imports_the_top_level_folders():
    files = python_files(REPOSITORY)
    assert REPOSITORY / "export" / "exporter.py" in files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong = [name for name in names if name.partition(".")[0] in LINKED]
            assert not wrong, f"{path}:{node.lineno} imports {wrong[0]}: write edgeprune.{wrong[0]}"


@pytest.mark.parametrize("module", ["edgeprune", "edgeprune.cli"])
def test_the_base_imports_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_the_version_is_written_once():
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in pyproject
    assert not re.search(r"^version\s*=", pyproject, re.MULTILINE)
    assert importlib.metadata.version("edgeprune") == edgeprune.__version__
    assert f"## [{edgeprune.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, built without fetching anything."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation"]
    ran = subprocess.run(
        [*command, "--quiet", "-w", str(folder)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (built,) = folder.iterdir()
    return built


def test_the_wheel_is_pure(wheel):
    assert wheel.name == f"edgeprune-{edgeprune.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_linked_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = python_files(REPOSITORY / "edgeprune")
    expected = {path.relative_to(REPOSITORY).as_posix() for path in sources}
    for name in LINKED:
        linked = [path for path in python_files(REPOSITORY / name) if "tests" not in path.parts]
        assert linked
        expected |= {f"edgeprune/{path.relative_to(REPOSITORY).as_posix()}" for path in linked}
    assert expected <= names
    rest = {name for name in names - expected if ".dist-info/" not in name}
    assert not {name for name in rest if not name.startswith("edgeprune/") or name.endswith(".py")}
    assert not {name for name in names if "test" in name}


def test_the_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith("/METADATA")))
        )
    assert metadata["Version"] == edgeprune.__version__
    assert set(metadata.get_all("Provides-Extra", [])) >= {"cpu", "gpu", "export", "dev"}
    assert any(name.endswith("/LICENSE") for name in names)
    # Both flavours of ONNX Runtime install one module: the base may require neither.
    base = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    assert not [entry for entry in base if entry.startswith(HEAVY)]


def assert_names_the_extra(ran: subprocess.CompletedProcess[str], module: str, extra: str) -> None:
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith(f"edgeprune: {module} is needed ")
    assert line.endswith(f"pip install 'edgeprune[{extra}]'")
    assert ran.returncode == 1
    assert ran.stdout == ""


def test_export_without_torch_names_the_extra(atp_folder, tmp_path):
    ran = run_without(("torch",), "export", str(atp_folder), "-o", str(tmp_path / "bundle"))
    assert_names_the_extra(ran, "torch", "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("provider", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_run_without_onnxruntime_names_the_extra(atp_bundle, provider, extra):
    ran = run_without(("onnxruntime",), "run", str(atp_bundle), "--prompt", "What?", "--provider", provider)
    assert_names_the_extra(ran, "onnxruntime", extra)


def test_verify_without_onnx_names_the_extra(atp_bundle):
    assert_names_the_extra(run_without(("onnx",), "verify", str(atp_bundle)), "onnx", "export")


def test_run_needs_the_base_and_onnxruntime_only(atp_bundle):
    others = tuple(module for module in HEAVY if module != "onnxruntime")
    ran = run_without(others, "run", str(atp_bundle), "--prompt", "What?", "--max-new-tokens", "2", "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["token_ids"]) <= 2


def test_profile_needs_the_base_and_onnxruntime_only(atp_bundle, tmp_path):
    others = tuple(module for module in HEAVY if module != "onnxruntime")
    few = ["--runs", "1", "--warmup", "0", "--max-new-tokens", "1", "--threads", "1"]
    page = tmp_path / "page.html"
    ran = run_without(others, "profile", str(atp_bundle), *few, "--html", str(page), "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["bundles"][0]["sites"]
    assert page.stat().st_size > 10_000


def test_inspect_and_doctor_need_the_base_only(atp_bundle):
    assert run_without(HEAVY, "inspect", str(atp_bundle)).returncode == 0
    ran = run_without(HEAVY, "doctor", "--json")
    assert ran.returncode == 0, ran.stderr
    pieces = {piece["name"]: piece for piece in json.loads(ran.stdout)["pieces"]}
    assert pieces["torch"]["version"] is None
    assert pieces["torch"]["remedy"] == "pip install 'edgeprune[export]'"
