"""What the documents say holds: commands and code run, links lead somewhere, reference tables are complete."""

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import edgeprune
from edgeprune import calibration_entry, manifest, quantization_entry, tensor_names
from edgeprune.cli import main
from edgeprune.operators import schema
from edgeprune.prune import registry

# One worker runs them all, in order: they share the bundles that they make.
pytestmark = pytest.mark.xdist_group("readme")

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHECKPOINT = REPOSITORY / "examples" / "shapes" / "checkpoint"
DOCS = tuple(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/shapes/README.md", *DOCS)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(text: str) -> list[str]:
    """What the text tells a reader to type, continued lines joined, each once."""
    typed = [line for block in blocks(text, "sh") for line in joined(block)]
    typed += [
        line[2:] for block in blocks(text, "console") for line in joined(block) if line.startswith("$ ")
    ]
    return list(dict.fromkeys(line for line in typed if line and not line.startswith("#")))


def joined(text: str) -> list[str]:
    """Lines, with those that end in a backslash continued."""
    return [re.sub(r"\s+", " ", line).strip() for line in re.sub(r"\\\n", " ", text).splitlines()]


def between(text: str, name: str) -> str:
    """What stands between two markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    assert text.count(begin) == text.count(end) == 1, f"README.md lacks the markers of {name}"
    return text.partition(begin)[2].partition(end)[0].strip()


def make_dry_run(target: str) -> list[str]:
    """What ``make target`` would run."""
    environment = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"
    }
    ran = subprocess.run(
        ["make", "-n", target], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return joined(ran.stdout)


class Workspace:
    """A folder that looks like the repository to the commands; each command runs once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        (path / "examples").symlink_to(REPOSITORY / "examples")

    def run(self, command: str) -> Result:
        """Run one ``edgeprune …`` line."""
        command = command.removeprefix(".venv/bin/")
        program, *arguments = shlex.split(command)
        assert program == "edgeprune"
        if command not in self.results:
            with chdir(self.path):
                self.results[command] = CliRunner().invoke(main, arguments)
        return self.results[command]


@contextlib.contextmanager
def chdir(path: Path) -> Iterator[None]:
    """``contextlib.chdir``, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The state after ``make demo``."""
    if not CHECKPOINT.is_dir():
        pytest.fail(f"{CHECKPOINT} is missing: the demo and the README need it")
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    for line in make_dry_run("demo"):
        if "/edgeprune " in line:
            result = workspace.run(line)
            assert result.exit_code == 0, result.output
    return workspace


@pytest.mark.parametrize("command", [line for line in commands(README) if line.startswith("make ")])
def test_a_make_target(command):
    assert make_dry_run(command.removeprefix("make "))


@pytest.mark.parametrize("command", [line for line in commands(README) if not line.startswith("make ")])
def test_a_command(workspace, command):
    result = workspace.run(command)
    assert result.exit_code == 0, result.output
    assert result.stdout


@pytest.mark.parametrize("code", blocks(README, "python"), ids=lambda code: code.strip().splitlines()[0])
def test_python_code(workspace, code, capsys):
    with chdir(workspace.path):
        exec(compile(code, "README.md", "exec"), {"__name__": __name__})
    assert capsys.readouterr().out.strip()


def test_the_demo_does_what_the_readme_shows(workspace):
    (shown,) = blocks(between(README, "demo"), "console")
    lines = [line for line in joined(shown) if line and not line.startswith("$ ")]
    demo = [line for line in make_dry_run("demo") if "/edgeprune " in line]
    results = [workspace.run(line) for line in demo]
    printed = [line for result in results for line in joined(result.output)]
    printed += [*demo, *(line.removeprefix("echo ").strip('"') for line in make_dry_run("demo"))]
    # Times, and the last digits of what a processor computes, differ between machines; words do not.
    numbers = re.compile(r"\d+(\.\d+)?(e-\d+)?")
    assert {numbers.sub("#", line) for line in lines} <= {numbers.sub("#", line) for line in printed}
    answer = results[1].stdout.strip()
    assert answer
    assert answer in lines
    assert (workspace.path / "out" / "shapes-atp.png").is_file()


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200
    between(README, "results")


def test_every_command_is_in_the_readme():
    for name in main.commands:
        assert f"edgeprune {name}" in README


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = REPOSITORY / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{document} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{document} links to {target}"


def test_the_reference_of_the_manifest_is_complete():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    records = [
        value
        for module in (manifest, calibration_entry, quantization_entry)
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]
    assert len(records) > 8
    for record in records:
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in text, f"docs/architecture.md lacks {record.__name__}.{field.name}"


def test_the_reference_of_tensors_and_operators_is_complete():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    tensors = [value for name, value in vars(tensor_names).items() if name.isupper()]
    assert len(tensors) > 15
    for name in tensors:
        assert f"`{name}`" in text, f"docs/architecture.md lacks the tensor {name}"
    for name in (schema.ATTENTION_SCORE, schema.TOKEN_SELECT, schema.TOKEN_GATHER):
        assert f"**{name}**" in text
    for mode in (*schema.ATTENTION_SCORE_MODES, *schema.TOKEN_SELECT_MODES):
        assert f"`{mode}`" in text


@pytest.mark.parametrize("name", sorted(registry.METHODS))
def test_the_reference_of_a_method_is_complete(name):
    text = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (section,) = [part for part in section if part.startswith(f"{name}:")]
    method = registry.METHODS[name]
    for field in dataclasses.fields(method):
        assert f"`{field.name}`" in section, f"docs/methods.md lacks {name}'s {field.name}"
    for preset in method.presets:
        assert f"`{preset}`" in section, f"docs/methods.md lacks {name}'s preset {preset}"
    assert f"`{name}`" in README


def test_the_method_of_the_contributing_guide(llava_folder, tmp_path):
    (code,) = blocks((REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
    file, bundle = tmp_path / "last_row.py", tmp_path / "bundle"
    file.write_text(code)
    own = ["--method", f"{file}:LastRow"]
    commands = (
        ["export", str(llava_folder), "-o", str(bundle), *own, "--set", "keep=9"],
        ["verify", str(bundle), "--checkpoint", str(llava_folder), *own],
    )
    for command in commands:
        try:
            result = CliRunner().invoke(main, command)
        finally:
            registry.METHODS.pop("last-row", None)
        assert result.exit_code == 0, result.output
    with edgeprune.open_session(bundle) as session:
        picture = REPOSITORY / "examples" / "shapes" / "pictures" / "scene1.png"
        answer = session.answer([picture], "What?", edgeprune.SamplingOptions(max_new_tokens=2))
    (site,) = answer.sites
    assert (site.place, site.tokens_in, site.kept) == ("before layer 2", 36, 9)
