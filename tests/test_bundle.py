import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_manifest import write_files

from edgeprune import bundle as bundle_module
from edgeprune.bundle import Bundle, sha256_of, writing
from edgeprune.errors import BundleError


def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def beside(path: Path) -> set[str]:
    """What lies in the folder of ``path``."""
    return {entry.name for entry in path.parent.iterdir()}


def test_open(tmp_path):
    manifest = write_files(tmp_path / "b")
    opened = Bundle.open(tmp_path / "b", check_all=True)
    assert opened.manifest == manifest
    assert opened.file(manifest.tokenizer).read_text() == "content of tokenizer.json"


def test_sha256_of_several_files_is_that_of_their_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    # printf abc | sha256sum
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "a", tmp_path / "b") == expected


@pytest.mark.parametrize("name", ["missing", "file"])
def test_what_is_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / name)


def test_folder_without_manifest(tmp_path):
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "guide_tokenizer.json", "site0.onnx", "shared.data"])
def test_missing_file(tmp_path, name):
    write_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing: copy the bundle again"):
        Bundle.open(tmp_path)


def test_folder_in_place_of_a_file(tmp_path):
    write_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(BundleError, match=r"tokenizer.json is missing"):
        Bundle.open(tmp_path)


def test_small_file_is_checked_by_hash(tmp_path):
    write_files(tmp_path)
    content = (tmp_path / "shared.data").read_bytes()
    (tmp_path / "shared.data").write_bytes(b"X" + content[1:])
    with pytest.raises(BundleError, match=r"shared.data is not the file that was exported"):
        Bundle.open(tmp_path)


def test_large_file_is_checked_by_size_and_hashed_on_demand(tmp_path, monkeypatch):
    write_files(tmp_path)
    file = tmp_path / "guide_tokenizer.json"  # the largest of the small files
    monkeypatch.setattr(bundle_module, "HASHED_AT_OPEN_BYTES", file.stat().st_size - 1)
    content = file.read_bytes()
    file.write_bytes(b"X" + content[1:])
    Bundle.open(tmp_path)
    with pytest.raises(BundleError, match=r"guide_tokenizer.json is not the file"):
        Bundle.open(tmp_path, check_all=True)
    file.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"guide_tokenizer.json is not the file"):
        Bundle.open(tmp_path)


def test_written_bundle_is_in_place_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "b"
    with writing(target) as partial:
        assert partial.parent == target.parent
        assert not target.exists()
        manifest = write_files(partial)
    assert Bundle.open(target).manifest == manifest
    assert beside(target) == {"b"}


def test_older_bundle_is_replaced(tmp_path):
    target = tmp_path / "b"
    write_files(target)
    (target / "left over").write_text("")
    with writing(target) as partial:
        assert (target / "left over").exists()
        write_files(partial)
    assert not (target / "left over").exists()
    Bundle.open(target)
    assert beside(target) == {"b"}


def test_empty_folder_is_replaced(tmp_path):
    target = tmp_path / "b"
    target.mkdir()
    with writing(target) as partial:
        write_files(partial)
    Bundle.open(target)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("older", [True, False])
def test_failure_leaves_what_was_there(tmp_path, error, older):
    target = tmp_path / "b"
    if older:
        write_files(target)

    def fail() -> None:
        with writing(target) as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert beside(target) == ({"b"} if older else set())
    if older:
        Bundle.open(target)


def test_failing_swap_brings_the_older_bundle_back(tmp_path):
    target = tmp_path / "b"
    write_files(target)

    def swap_nothing() -> None:
        with writing(target) as partial:
            partial.rmdir()

    with pytest.raises(BundleError, match="cannot write"):
        swap_nothing()
    Bundle.open(target)
    assert beside(target) == {"b"}


def refuse(target: Path, message: str) -> None:
    def write() -> None:
        with writing(target) as partial:
            write_files(partial)

    with pytest.raises(BundleError, match=message) as caught:
        write()
    assert "\n" not in str(caught.value)


def test_foreign_folder_is_untouched(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    (target / "cat.png").write_text("meow")
    refuse(target, "exists and is no bundle")
    assert (target / "cat.png").read_text() == "meow"
    assert beside(target) == {"photos"}


def test_foreign_file_is_untouched(tmp_path):
    (tmp_path / "notes").write_text("text")
    refuse(tmp_path / "notes", "exists and is no bundle")
    refuse(tmp_path / "notes" / "b", "cannot write")
    assert (tmp_path / "notes").read_text() == "text"
    assert beside(tmp_path / "notes") == {"notes"}


def test_name_that_the_file_system_refuses(tmp_path):
    refuse(tmp_path / ("b" * 300), r"cannot write .*name too long")
    refuse(tmp_path / ("b" * 250), r"cannot write .*name too long")
    assert not list(tmp_path.iterdir())


def test_link_stays_and_its_bundle_is_replaced(tmp_path):
    write_files(tmp_path / "real" / "b")
    (tmp_path / "real" / "b" / "left over").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "b")
    with writing(tmp_path / "link") as partial:
        write_files(partial)
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "real" / "b" / "left over").exists()
    Bundle.open(tmp_path / "link")
    assert beside(tmp_path / "link") == {"link", "real"}
    assert beside(tmp_path / "real" / "b") == {"b"}


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with writing("b") as partial:
        write_files(partial)
    with writing("b/../c") as partial:
        write_files(partial)
    assert {entry.name for entry in tmp_path.iterdir()} == {"b", "c"}


@pytest.mark.parametrize("name", ["b", "b[1]", "b*"])
def test_partial_folder_of_a_dead_process_is_removed(tmp_path, name):
    target = tmp_path / name
    abandoned = tmp_path / f".{name}.partial-{dead_pid()}"
    abandoned.mkdir()
    (abandoned / "half").write_text("x")
    with writing(target) as partial:
        assert not abandoned.exists()
        write_files(partial)
    assert beside(target) == {name}


def test_partial_folder_of_another_target_or_of_a_living_process_stays(tmp_path):
    others = [tmp_path / f".c.partial-{dead_pid()}", tmp_path / f".b.partial-{os.getppid()}"]
    for other in others:
        other.mkdir()
    with writing(tmp_path / "b") as partial:
        write_files(partial)
    assert all(other.is_dir() for other in others)


def test_folders_of_an_earlier_process_with_our_id_do_not_stop_us(tmp_path):
    """In a container every run may have the same process id."""
    target = tmp_path / "b"
    partial, old = (tmp_path / f".b.{kind}-{os.getpid()}" for kind in ("partial", "old"))
    write_files(old)
    partial.mkdir()
    (partial / "half").write_text("x")
    with writing(target) as new:
        assert not (new / "half").exists()
        Bundle.open(target)
        write_files(new)
    assert beside(target) == {"b"}


def test_bundle_that_stepped_aside_before_a_crash_is_restored(tmp_path):
    target = tmp_path / "b"
    write_files(tmp_path / f".b.old-{dead_pid()}")

    def fail() -> None:
        with writing(target):
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    Bundle.open(target)
    assert beside(target) == {"b"}


def test_bundle_that_stepped_aside_is_removed_where_a_newer_one_is_in_place(tmp_path):
    target = tmp_path / "b"
    write_files(target)
    (target / "newer").write_text("")
    write_files(tmp_path / f".b.old-{dead_pid()}")
    with writing(target):
        assert (target / "newer").exists()
        assert not list(tmp_path.glob(".b.old-*"))


def test_two_threads_do_not_write_the_same_bundle(tmp_path):
    target = tmp_path / "b"
    refused: list[str] = []

    def write_second() -> None:
        try:
            with writing(target):
                pass
        except BundleError as error:
            refused.append(str(error))

    with writing(target) as partial:
        thread = threading.Thread(target=write_second)
        thread.start()
        thread.join()
        write_files(partial)
    assert len(refused) == 1
    assert "being written" in refused[0]
    Bundle.open(target)
