"""A pruner of the program's own sees and keeps in C++ what it does in Python; what is no choice is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from pruners import CHOICES, REFUSED, Recording

from edgeprune import tensor_names as names
from edgeprune.errors import BackendError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session

PRUNING = 8  # EDGEPRUNE_ERROR_PRUNING


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> list[dict]:
    """Questions about no, one and several pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, picture in enumerate(check_pictures(3, size=(60, 40))):
        paths.append(str(folder / f"{index}.png"))
        picture.save(paths[-1])
    chosen = ([paths[0]], [], paths[1:], paths, [paths[2], paths[2]])
    prompts = ("What is it?", "How many squares are in the picture?", "Größe 猫")
    return [
        {"images": images, "prompt": prompt, "max_new_tokens": 6} for images in chosen for prompt in prompts
    ]


def seen_of(sites) -> list[dict]:
    """What a pruner saw, as the C++ program prints it."""
    return [
        {
            "name": site.name,
            "place": site.place,
            "layer": site.layer,
            "scores": site.scores.tolist(),
            "slots": site.slots.tolist(),
            "places": site.places.tolist(),
            "own_choice": site.own_choice.tolist(),
        }
        for site in sites
    ]


@pytest.mark.parametrize("name", CHOICES)
def test_answers_and_what_the_pruner_saw_are_pythons(cpp, host_bundle, requests, name):
    found = cpp.ask(host_bundle, requests, 1, 1, name)
    pruner = Recording(CHOICES[name])
    kept = set()
    with open_session(host_bundle, threads=1, pruner=pruner) as session:
        for one, ours in zip(requests, found, strict=True):
            theirs = session.answer(one["images"], one["prompt"], SamplingOptions(6))
            expected = theirs.to_json()
            assert list(ours["timings_ms"]) == list(expected["timings_ms"]), one
            for field in ("text", "token_ids", "sites", "finish_reason"):
                assert ours[field] == expected[field], (field, one)
            assert ours["seen"] == seen_of(pruner.take()), one
            kept.add(tuple(site.kept for site in theirs.sites))
    assert len(kept) > 3
    assert len(json.dumps(found)) > 10_000, "hardly anything was compared"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_choice_is_refused_in_pythons_words(cpp, host_bundle, requests, name):
    first, second = cpp.ask(host_bundle, requests[:1] + requests[3:4], 1, 1, name)
    assert first == {"error": REFUSED[name][1].format(place="before layer 1"), "status": PRUNING}
    assert second["seen"] == []  # a text alone asks no pruner, and is answered
    assert second["token_ids"]


def test_what_a_pruner_throws_the_answer_throws(cpp, host_bundle, requests):
    thrown, answered, again = cpp.ask(host_bundle, [requests[0], requests[3], requests[0]], 1, 1, "raises")
    assert thrown == again == {"thrown": "no time is left"}
    assert answered["token_ids"]


def test_threads_share_a_pruner(cpp, host_bundle, requests):
    found = [{**one, "timings_ms": None} for one in cpp.ask(host_bundle, requests, 3, 2, "third")]
    alone = [{**one, "timings_ms": None} for one in cpp.ask(host_bundle, requests, 1, 1, "third")]
    assert found == alone


def test_a_bundle_without_scores_takes_no_pruner(cpp, atp_bundle):
    ran = cpp.run(cpp.built.folder / "tests" / "ask_many", atp_bundle, 1, 1, "own")
    assert ran.returncode == 1
    expected = (
        "no site of this bundle takes a pruner: export it with --method host, or open it without a pruner"
    )
    assert json.loads(ran.stdout) == {"error": expected, "status": PRUNING}


def test_a_site_that_merges_behind_it_takes_no_pruner(cpp, host_bundle, tmp_path):
    folder = Path(shutil.copytree(host_bundle, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["sites"][1]["merged_per_image"] = 2
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    ran = cpp.run(cpp.built.folder / "tests" / "ask_many", folder, 1, 1, "own")
    assert json.loads(ran.stdout)["error"].startswith("site1 merges tokens and counts on those that")


def test_a_program_in_c_registers_a_pruner(cpp, host_bundle):
    ran = cpp.run(cpp.built.folder / "tests" / "pruner", host_bundle)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_scores_of_other_rows_are_refused(cpp, host_bundle, requests, tmp_path):
    folder = Path(shutil.copytree(host_bundle, tmp_path / "bundle"))
    model = onnx.load(folder / "site0.onnx")
    for node in model.graph.node:
        node.output[:] = ["own" if name == names.SCORES else name for name in node.output]
        node.input[:] = ["own" if name == names.SCORES else name for name in node.input]
    three = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "three")
    model.graph.initializer.append(three)
    model.graph.node.append(onnx.helper.make_node("Identity", ["three"], [names.SCORES]))
    (scores,) = [output for output in model.graph.output if output.name == names.SCORES]
    scores.CopyFrom(onnx.helper.make_tensor_value_info(names.SCORES, onnx.TensorProto.FLOAT, [3]))
    onnx.save(model, folder / "site0.onnx")
    content = (folder / "site0.onnx").read_bytes()
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["graphs"]["site0"]["file"] |= {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    expected = "the graph 'site0' scores other rows than there are: export the bundle again"
    (found,) = cpp.ask(folder, requests[:1], 1, 1, "own")
    assert found["error"] == expected
    with (
        open_session(folder, threads=1, pruner=CHOICES["own"]) as session,
        pytest.raises(BackendError) as caught,
    ):
        session.answer(requests[0]["images"], "What is it?")
    assert str(caught.value) == expected
