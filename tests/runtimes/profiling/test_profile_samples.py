"""What a profile asks about."""

import json

import pytest
from PIL import Image

from edgeprune.errors import DataError, PictureError, ProfileError
from edgeprune.runtimes.profiling.samples import DEFAULT_PROMPT, choose


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def test_without_pictures_some_are_drawn():
    found = choose(None, (), None, 5)
    assert found.kind == "drawn"
    assert len(found.samples) == 4
    assert {sample.prompt for sample in found.samples} == {DEFAULT_PROMPT}


def test_one_question_about_several_pictures(pictures):
    (sample,) = choose(None, (pictures / "a.png", pictures / "b.png"), "Which?", 5).samples
    assert (len(sample.pictures), sample.prompt) == (2, "Which?")


def test_a_folder_of_pictures_is_asked_one_question(pictures):
    found = choose(pictures, (), None, 2)
    assert (found.kind, len(found.samples), found.left_out) == ("given", 2, 1)
    assert {sample.prompt for sample in found.samples} == {DEFAULT_PROMPT}


def test_lines_that_cannot_be_used_are_counted(pictures):
    lines = [json.dumps({"image": "a.png", "prompt": "What?"}), "{", json.dumps({"image": "b.png"})]
    (pictures / "data.jsonl").write_text("\n".join(lines))
    found = choose(pictures / "data.jsonl", (), None, 5)
    assert [sample.prompt for sample in found.samples] == ["What?"]
    assert (found.left_out, found.unusable) == (0, 2)


def test_a_picture_that_cannot_be_read_is_said_before_anything_is_measured(pictures):
    (pictures / "b.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"b\.png"):
        choose(pictures, (), None, 3)


def test_what_is_refused(pictures):
    with pytest.raises(ProfileError, match="choose one"):
        choose(pictures, (pictures / "a.png",), None, 1)
    with pytest.raises(ProfileError, match="add --image"):
        choose(None, (), "What?", 1)
    with pytest.raises(DataError, match="does not exist"):
        choose(pictures / "nowhere", (), None, 1)
