"""docs/profiling.md names every field of the report, and its code runs."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from edgeprune.runtimes.profiling.report import GROUPS, SCOPES, ProfileReport

# One worker measures the profile that they share.
pytestmark = pytest.mark.xdist_group("profiling")

REPOSITORY = Path(__file__).resolve().parents[3]
TEXT = (REPOSITORY / "docs" / "profiling.md").read_text(encoding="utf-8")


def records(kind: object) -> set[type]:
    """The dataclasses inside of a type."""
    found = {part for inner in typing.get_args(kind) for part in records(inner)}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        found |= {kind, *(part for field in dataclasses.fields(kind) for part in records(hints[field.name]))}
    return found


def test_the_reference_of_the_report_is_complete():
    found = records(ProfileReport)
    assert len(found) > 15
    for record in found:
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in TEXT, f"docs/profiling.md lacks {record.__name__}.{field.name}"


def test_the_words_of_the_report_are_in_the_reference():
    for word in (*GROUPS, *SCOPES):
        assert f'"{word}"' in TEXT


def test_the_python_code(atp_bundle, atp_unpruned_bundle, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shapes-atp").symlink_to(atp_bundle)
    (tmp_path / "out" / "shapes-unpruned").symlink_to(atp_unpruned_bundle)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "profiling.md", "exec"), {"__name__": __name__})
    assert len(capsys.readouterr().out.split()) == 2
