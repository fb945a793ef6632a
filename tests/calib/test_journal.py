"""Records survive whatever ends a calibration, and are found again by what they were made from."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_manifest import write_files

from edgeprune.bundle import Bundle
from edgeprune.calib.journal import Journal
from edgeprune.calib.record import Record
from edgeprune.errors import DataError

SETTINGS = {"max_new_tokens": 8, "provider": "cpu"}


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """A bundle in a folder of its own."""
    return Bundle(tmp_path / "parent" / "b", write_files(tmp_path / "parent" / "b"))


def record(number: int) -> Record:
    return Record(f"{number:064}", (30, 20), ((number,),), 10, 1, 5)


def fill(bundle: Bundle, *numbers: int) -> Path:
    with Journal(bundle, SETTINGS) as journal:
        for number in numbers:
            journal.add(record(number))
        return journal.path


def found(bundle: Bundle, **settings: int) -> set[str]:
    with Journal(bundle, SETTINGS | settings) as journal:
        return {value.sample_sha256.lstrip("0") for value in journal.records.values()}


def test_records_are_read_again(bundle):
    fill(bundle, 1, 2)
    fill(bundle, 3)
    with Journal(bundle, SETTINGS) as journal:
        assert list(journal.records.values()) == [record(1), record(2), record(3)]


def test_a_record_is_in_the_file_before_the_next_sample_runs(bundle):
    with Journal(bundle, SETTINGS) as journal:
        journal.add(record(1))
        assert journal.path.read_text().endswith("\n")
        shutil.copy(journal.path, journal.path.with_suffix(".copy"))
    assert journal.path.with_suffix(".copy").read_text() == journal.path.read_text()


@pytest.mark.parametrize("torn", ['{"sample_sha256": "12', "{", '{"sample_sha256": "1"}'])
def test_a_torn_last_line_is_no_record_and_spoils_no_other(bundle, torn):
    path = fill(bundle, 1)
    with path.open("a") as file:
        file.write(torn)
    fill(bundle, 2)
    assert found(bundle) == {"1", "2"}
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["\0\0\0", "[]", '{"sample_sha256": "1"}', "\udcff"])
def test_a_damaged_line_is_passed_over(bundle, line):
    path = fill(bundle, 1)
    with path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    fill(bundle, 2)
    assert found(bundle) == {"1", "2"}


def test_other_settings_or_another_export_have_other_records(bundle):
    fill(bundle, 1)
    assert found(bundle, max_new_tokens=9) == set()
    other = replace(bundle.manifest, source=replace(bundle.manifest.source, sha256="1" * 64))
    assert found(replace(bundle, manifest=other)) == set()
    assert found(replace(bundle, manifest=replace(bundle.manifest, engines={}))) == {"1"}


def test_restart_forgets(bundle):
    fill(bundle, 1)
    with Journal(bundle, SETTINGS, restart=True) as journal:
        assert journal.records == {}
    assert found(bundle) == set()


def test_an_empty_journal_leaves_no_file(bundle):
    assert not fill(bundle).exists()


def test_a_link_to_a_bundle_shares_its_journal(bundle, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle.path)
    fill(bundle, 1)
    assert found(replace(bundle, path=link)) == {"1"}


def test_journals_of_a_bundle_are_deleted_together(bundle):
    fill(bundle, 1)
    other = bundle.path.parent / ".bb.calibration-0.jsonl"
    other.write_text("")
    with Journal(bundle, SETTINGS | {"max_new_tokens": 9}) as journal:
        journal.add(record(1))
    Journal.delete_all(bundle.path)
    assert sorted(path.name for path in bundle.path.parent.iterdir()) == [other.name, "b"]


def test_a_folder_that_cannot_be_written(bundle):
    path = fill(bundle, 1)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot write .*: free disk space"):
        Journal(bundle, SETTINGS)
