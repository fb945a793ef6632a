"""The example bundle: 200 questions have the same kept indices and the same greedy answers in C++ as in Python."""

import json
import os
import subprocess
from pathlib import Path

from edgeprune.runtimes.cpp.build import find_onnxruntime
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session

SHAPES = Path(__file__).resolve().parents[3] / "examples" / "shapes"
NUM_QUESTIONS = 200
MAX_NEW_TOKENS = 8


def questions() -> list[dict]:
    """Every question of the example about its own picture, then about the others."""
    pictures = json.loads((SHAPES / "pictures" / "questions.json").read_text(encoding="utf-8"))
    texts = [[entry["question"] for entry in picture["questions"]] for picture in pictures]
    pairs = [
        (pictures[(index + shift) % len(pictures)]["picture"], text)
        for shift in range(len(pictures))
        for index, own in enumerate(texts)
        for text in own
    ]
    return [
        {"images": [str(SHAPES / "pictures" / picture)], "prompt": text, "max_new_tokens": MAX_NEW_TOKENS}
        for picture, text in pairs[:NUM_QUESTIONS]
    ]


def test_200_questions_have_pythons_answers_and_kept_indices(cpp, example_bundle):
    asked = questions()
    assert len(asked) == NUM_QUESTIONS
    found = cpp.ask(example_bundle, asked)
    with open_session(example_bundle, threads=1) as session:
        for one, ours in zip(asked, found, strict=True):
            theirs = session.answer(
                one["images"], one["prompt"], SamplingOptions(max_new_tokens=MAX_NEW_TOKENS)
            ).to_json()
            assert ours["token_ids"] == theirs["token_ids"], one
            assert ours["text"] == theirs["text"], one
            assert ours["sites"] == theirs["sites"], one
            assert ours["sites"][-1]["kept"] >= 1


def test_answers_go_on_behind_the_end_token_where_that_is_asked(cpp, example_bundle):
    asked = [one | {"max_new_tokens": 5, "ignore_eos": True} for one in questions()[:4]]
    found = cpp.ask(example_bundle, asked)
    assert all(len(ours["token_ids"]) == 5 and ours["finish_reason"] == "length" for ours in found)
    with open_session(example_bundle, threads=1) as session:
        options = SamplingOptions(max_new_tokens=5, ignore_eos=True)
        for one, ours in zip(asked, found, strict=True):
            assert ours["token_ids"] == list(session.answer(one["images"], one["prompt"], options).token_ids)


def test_onnx_runtime_reports_nothing(cpp, example_bundle, tmp_path):
    # Its telemetry begins with a file in the user's cache.
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    environment |= {"EDGEPRUNE_ONNXRUNTIME": str(find_onnxruntime())}
    picture = SHAPES / "pictures" / "scene4.png"
    command = [cpp.built.runner, example_bundle, "--image", picture, "--prompt", "how many shapes are there?"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert list(tmp_path.rglob("*")) == []
