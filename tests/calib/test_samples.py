"""Calibration data is read line by line; what cannot be used is named and passed over."""

import json
from pathlib import Path

import pytest
from PIL import Image

from edgeprune.calib.samples import BadSample, Sample, choose_samples, read_samples
from edgeprune.errors import DataError


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def the_only(path: Path) -> Sample | BadSample:
    (sample,) = read_samples(path)
    return sample


def test_paths_are_relative_to_the_file(tmp_path):
    path = written(
        tmp_path / "data.jsonl",
        {"image": "a.png", "prompt": "What?", "answer": "A cat"},
        {"image": ["b/1.png", str(tmp_path / "c.png")], "prompt": "Same?", "id": 7},
    )
    assert list(read_samples(path)) == [
        Sample(1, "line 1", (tmp_path / "a.png",), "What?", "A cat"),
        Sample(2, "line 2", (tmp_path / "b/1.png", tmp_path / "c.png"), "Same?", None),
    ]


def test_the_conversations_of_llava(tmp_path):
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And this?"},
    ]
    path = written(tmp_path / "data.jsonl", {"id": "1", "image": "a.png", "conversations": turns})
    assert the_only(path) == Sample(1, "line 1", (tmp_path / "a.png",), "What is this?", "A cat.")


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path):
    path = written(
        tmp_path / "data.jsonl", "\ufeff" + json.dumps({"image": "a.png", "prompt": "ä?"}), "", "  "
    )
    assert the_only(path) == Sample(1, "line 1", (tmp_path / "a.png",), "ä?")


def test_a_file_without_prompts_takes_the_given_one(tmp_path):
    path = written(tmp_path / "data.jsonl", {"image": "a.png"}, {"image": "b.png", "prompt": "Own?"})
    assert [sample.prompt for sample in read_samples(path, "Given?")] == ["Given?", "Own?"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "a.png", "prompt": "Wh', "no JSON"),
        ('{"image": "a.png", "prompt": "What?"} x', "no JSON"),
        ('["a.png", "What?"]', "a list instead of an object"),
        ("17", "a number instead of an object"),
        ('{"prompt": "What?"}', "no picture"),
        ('{"image": [], "prompt": "What?"}', "no picture"),
        ('{"image": null, "prompt": "What?"}', "no picture"),
        ('{"image": 3, "prompt": "What?"}', '"image" holds a number'),
        ('{"image": ["a.png", ""], "prompt": "What?"}', '"image" holds an empty text'),
        ('{"image": "https://x.org/a.png", "prompt": "What?"}', "download the picture"),
        ('{"audio": "a.wav", "prompt": "What?"}', 'a sample with "audio" and no picture'),
        ('{"video": "a.mp4", "prompt": "What?"}', 'a sample with "video" and no picture'),
        ('{"image": "a.png"}', "no question"),
        ('{"image": "a.png", "prompt": " "}', "no question"),
        ('{"image": "a.png", "prompt": 5}', "no question"),
        ('{"image": "a.png", "prompt": "What?", "answer": 5}', '"answer" is a number'),
        ('{"image": "a.png", "conversations": [3]}', '"conversations" is no list'),
        ('{"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}', "no question"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_reading_goes_on(tmp_path, line, reason):
    good = {"image": "a.png", "prompt": "What?"}
    before, bad, after = read_samples(written(tmp_path / "data.jsonl", good, line, good))
    assert (before.number, bad.number, after.number) == (1, 2, 3)
    assert isinstance(bad, BadSample)
    assert bad.name == "line 2"
    assert reason in bad.reason
    assert "\n" not in bad.reason


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    Image.new("RGB", (64, 64)).save(path, format="PNG")
    with pytest.raises(DataError, match=r"line 1: no UTF-8 text"):
        choose_samples(read_samples(path))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b.jpg", "a.PNG", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "inner.png").mkdir()
    assert list(read_samples(tmp_path, "What?")) == [
        Sample(1, "a.PNG", (tmp_path / "a.PNG",), "What?"),
        Sample(2, "b.jpg", (tmp_path / "b.jpg",), "What?"),
    ]


def test_a_folder_needs_a_prompt_and_pictures(tmp_path):
    with pytest.raises(DataError, match="--prompt"):
        read_samples(tmp_path)
    with pytest.raises(DataError, match="holds no pictures"):
        read_samples(tmp_path, "What?")
    with pytest.raises(DataError, match="the prompt is empty"):
        read_samples(tmp_path, " ")


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_samples(tmp_path / "data.jsonl")


def test_an_empty_file(tmp_path):
    path = written(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="holds no samples"):
        choose_samples(read_samples(path))


def test_samples_of_another_modality_alone(tmp_path):
    path = written(tmp_path / "data.jsonl", *({"audio": f"{i}.wav", "prompt": "Who?"} for i in range(3)))
    with pytest.raises(DataError, match=r'none of 3 samples can be used; line 1: a sample with "audio"'):
        choose_samples(read_samples(path))


def numbered(count: int) -> list[Sample]:
    return [Sample(number, f"line {number}", (Path("a.png"),), "What?") for number in range(1, count + 1)]


def test_all_samples_are_taken_if_no_number_is_given():
    bad = BadSample(7, "line 7", "no JSON")
    assert choose_samples([*numbered(5), bad]) == (numbered(5), [bad])


def test_more_samples_with_the_same_seed_are_the_same_and_more():
    few, _ = choose_samples(numbered(100), 10, seed=3)
    more, _ = choose_samples(numbered(100), 30, seed=3)
    other, _ = choose_samples(numbered(100), 10, seed=4)
    assert (len(few), len(more)) == (10, 30)
    assert set(few) < set(more)
    assert few == sorted(few, key=lambda sample: sample.number)
    assert few != other


def test_the_draw_is_uniform():
    drawn = [s.number for seed in range(400) for s in choose_samples(numbered(8), 2, seed)[0]]
    counts = [drawn.count(number) for number in range(1, 9)]
    # 100 of each are expected, with a standard deviation of 8.7.
    assert min(counts) > 65
    assert max(counts) < 135


def test_fewer_samples_than_asked_for_are_all():
    assert choose_samples(numbered(3), 10)[0] == numbered(3)
    with pytest.raises(DataError, match="at least 1"):
        choose_samples(numbered(3), 0)
