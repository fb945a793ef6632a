"""Sessions of the C++ library answer as Python's: texts, ids, kept indices, evictions, errors."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tiny_checkpoints import CORPUS, add_dyrate, write_pruning
from tiny_llava_next import TinyLlavaNext, build_llava_next, with_base
from tiny_qwen import QWEN2, QWEN3, TinyQwen, build_qwen

from edgeprune.errors import EdgepruneError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.export.exporter import export
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session, open_session

SIZES = [(60, 40), (40, 61), (36, 36), (90, 24)]
WORDS = [*" ".join(CORPUS).split(), "Größe", "猫", "🙂", "1234", "…", "x" * 40]
NUM_REQUESTS = 30

# Of the fixtures of conftest.py: probe rows with a guide, merged tokens and rows numbered anew, two methods, tokens
# dropped while the answer is generated, scores that no pruner looks at, a tower that drops, half precision with a
# threshold, nothing.
FIXTURES = ("ivtp", "sparsevlm", "combined", "dyrate", "host", "cdpruner", "tower", "atp_float16", "unpruned")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    drawn = [check_pictures(1, size=size)[0] for size in SIZES]
    paths = [folder / f"{index}.png" for index in range(len(drawn))]
    for picture, path in zip(drawn, paths, strict=True):
        picture.save(path)
    return list(map(str, paths))


@pytest.fixture(scope="module")
def qwen_bundle(tmp_path_factory) -> Path:
    """Pictures of any size, windows, positions on three axes; a share of each picture twice, then a growing rate."""
    folder = build_qwen(
        tmp_path_factory.mktemp("qwen") / "qwen", TinyQwen("qwen2_5_vl", vision_layers=2, seed=9)
    )
    add_dyrate(folder, layer=3, heads=QWEN2.heads)
    adaptprune = {"method": "adaptprune", "parameters": {"layer": 1, "keep_ratio": 0.7}}
    dyrate = {"method": "dyrate", "parameters": {"layer": 3, "num_rates": 8}}
    write_pruning(folder, [adaptprune, dyrate])
    return export(folder, folder.parent / "bundle").path


@pytest.fixture(scope="module")
def qwen3_bundle(tmp_path_factory) -> Path:
    """DeepStack's features, gathered at a site among the additions, not behind it; then a growing rate."""
    folder = build_qwen(tmp_path_factory.mktemp("qwen3") / "qwen", QWEN3)
    add_dyrate(folder, layer=3, heads=QWEN3.heads)
    adaptprune = {"method": "adaptprune", "parameters": {"layer": 1, "keep_ratio": 0.7}}
    dyrate = {"method": "dyrate", "parameters": {"layer": 3, "num_rates": 8}}
    write_pruning(folder, [adaptprune, dyrate])
    return export(folder, folder.parent / "bundle").path


@pytest.fixture(scope="module")
def llava_next_bundle(tmp_path_factory) -> Path:
    """Tiles joined in a grid with newlines; a tower that leaves tokens out, then two sites."""
    folder = tmp_path_factory.mktemp("next") / "next"
    build_llava_next(folder, with_base(TinyLlavaNext(), layers=3, vision_layers=3, seed=20))
    random_tokens = {"method": "random", "parameters": {"keep": 12, "seed": 1}}
    fastv = {"method": "fastv", "parameters": {"layer": 2, "keep_ratio": 0.4}}
    write_pruning(folder, [random_tokens, fastv])
    return export(folder, folder.parent / "bundle").path


@pytest.fixture(scope="module")
def internvl_bundle(tmp_path_factory) -> Path:
    """Tiles with an overview, and a site that keeps a share of each picture."""
    from tiny_internvl import TinyInternvl, build_internvl

    folder = tmp_path_factory.mktemp("internvl") / "internvl"
    build_internvl(folder, TinyInternvl())
    fastv = {"method": "fastv", "parameters": {"layer": 1, "keep_ratio": 0.5}}
    write_pruning(folder, [fastv])
    return export(folder, folder.parent / "bundle").path


@pytest.fixture(scope="module")
def prumerge_bundle(llava_folder, tmp_path_factory) -> Path:
    """PruMerge, whose number of tokens depends on what the picture shows."""
    folder = Path(shutil.copytree(llava_folder, tmp_path_factory.mktemp("prumerge") / "prumerge"))
    write_pruning(folder, [{"method": "prumerge", "parameters": {"neighbours": 4}}])
    return export(folder, folder.parent / "bundle").path


def requests_about(pictures: list[str], seed: int, number: int) -> list[dict]:
    """Questions about no, one and several pictures; greedy, drawn with a seed, with stop texts, beyond the end."""
    rng = random.Random(seed)
    found = []
    for index in range(number):
        request = {
            "images": rng.choices(pictures, k=rng.choice((0, 1, 1, 2, 3))),
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 10))),
            "max_new_tokens": rng.choice((1, 6, 12)),
        }
        if index % 4 == 3:
            top_p = rng.choice((1.0, 0.9))
            request |= {"temperature": 1.3, "top_k": rng.choice((0, 20)), "top_p": top_p, "seed": index**7}
        if index % 5 == 4:
            request["stop"] = ["e", "th"]
        if index % 6 == 5:
            request["ignore_eos"] = True
        found.append(request)
    return found


def pythons_answer(session: Session, request: dict) -> dict:
    """What Python's session answers, or its error."""
    options = {name: value for name, value in request.items() if name not in ("images", "prompt")}
    options["stop"] = tuple(options.get("stop", ()))
    try:
        answer = session.answer(request["images"], request["prompt"], SamplingOptions(**options))
    except EdgepruneError as error:
        return {"error": str(error)}
    return {**answer.to_json(), "streamed": answer.text}


def assert_same(request: dict, found: dict, expected: dict) -> None:
    if "error" in expected:
        assert found.get("error") == expected["error"], request
        return
    assert list(found["timings_ms"]) == list(expected["timings_ms"]), request
    for name in ("text", "streamed", "token_ids", "finish_reason", "prompt_tokens", "decode_steps", "sites"):
        assert found[name] == expected[name], (name, request)


@pytest.mark.parametrize(
    "name", [*FIXTURES, "prumerge", "qwen", "qwen3", "llava_next", "internvl"], ids=lambda name: name
)
def test_answers_are_pythons(cpp, name, pictures, request):
    bundle = request.getfixturevalue(f"{name}_bundle")
    asked = requests_about(pictures, len(name), NUM_REQUESTS)
    found = cpp.ask(bundle, asked)
    with open_session(bundle, threads=1) as session:
        expected = [pythons_answer(session, one) for one in asked]
    assert sum("error" not in one for one in expected) > NUM_REQUESTS // 2
    for one, ours, theirs in zip(asked, found, expected, strict=True):
        assert_same(one, ours, theirs)
    if name == "dyrate":
        assert any(site["evictions"] for one in expected for site in one.get("sites", []))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  <image> "}, "the prompt is empty"),
        ({"prompt": "<image> and <image>?"}, "the prompt has 2 placeholders"),
        ({"prompt": "which? <image>"}, None),
        ({"max_new_tokens": 10**6}, "exceed the context"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"images": ["missing.png"]}, "missing.png does not exist: check the path"),
    ],
    ids=str,
)
def test_errors_are_pythons_sentences(cpp, atp_bundle, pictures, changes, kind):
    asked = {"images": pictures[:1], "prompt": "What is it?", "max_new_tokens": 2, **changes}
    (found,) = cpp.ask(atp_bundle, [asked])
    try:
        with open_session(atp_bundle, threads=1) as session:
            expected = pythons_answer(session, asked)
    except EdgepruneError as error:
        expected = {"error": str(error)}
    if kind is None:
        assert_same(asked, found, expected)
    elif "top" in kind or "temperature" in kind:
        assert kind in found["error"]  # the number itself is written in another way
    else:
        assert kind in found["error"]
        assert found["error"] == expected["error"]


def test_a_video_is_refused_in_pythons_words(cpp, qwen3_bundle, pictures):
    asked = {"images": pictures[:1], "prompt": "<|video_pad|> what is it?", "max_new_tokens": 2}
    (found,) = cpp.ask(qwen3_bundle, [asked])
    with open_session(qwen3_bundle, threads=1) as session:
        assert found["error"] == pythons_answer(session, asked)["error"]
    assert "the placeholder of a video" in found["error"]


def test_an_answer_is_cancelled_between_two_pieces(cpp, unpruned_bundle, pictures):
    asked = {"images": pictures[:1], "prompt": "What is it?", "max_new_tokens": 12}
    whole, cut = cpp.ask(unpruned_bundle, [asked, asked | {"cancel_after": 2}])
    assert cut["finish_reason"] == "cancelled"
    assert cut["streamed"] == cut["text"]
    assert whole["text"].startswith(cut["text"])
    assert len(cut["token_ids"]) < len(whole["token_ids"])


def test_threads_share_a_session(cpp, dyrate_bundle, pictures):
    asked = requests_about(pictures, 5, 12)
    found = [{**one, "timings_ms": None} for one in cpp.ask(dyrate_bundle, asked, 2, 2)]
    alone = [{**one, "timings_ms": None} for one in cpp.ask(dyrate_bundle, asked)]
    assert found == alone


def test_the_program_prints_what_edgeprune_run_prints(cpp, atp_bundle, pictures):
    from click.testing import CliRunner

    from edgeprune.cli import main

    words = ["--image", pictures[0], "--prompt", "What is it?", "--max-new-tokens", "5", "--threads", "1"]
    theirs = CliRunner().invoke(main, ["run", str(atp_bundle), *words])
    ours = cpp.edgeprune_run(atp_bundle, *words)
    assert ours.returncode == theirs.exit_code == 0
    assert ours.stdout == theirs.stdout
    assert [line.split(";")[0] for line in ours.stderr.splitlines()] == [
        line.split(";")[0] for line in theirs.stderr.splitlines()
    ]
    streamed = cpp.edgeprune_run(atp_bundle, *words, "--stream")
    assert streamed.stdout.strip() == theirs.stdout.strip()
    printed = json.loads(cpp.edgeprune_run(atp_bundle, *words, "--json").stdout)
    expected = json.loads(CliRunner().invoke(main, ["run", str(atp_bundle), *words, "--json"]).stdout)
    assert {**printed, "timings_ms": 0} == {**expected, "timings_ms": 0}
    assert printed["timings_ms"].keys() == expected["timings_ms"].keys()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("bundle",),
        ("bundle", "--prompt"),
        ("bundle", "--prompt", "?", "--top-k", "x"),
        ("a", "b", "--prompt", "?"),
    ],
    ids=str,
)
def test_the_program_refuses_wrong_arguments(cpp, words):
    ran = cpp.edgeprune_run(*words)
    assert ran.returncode == 2
    assert "Usage: edgeprune-run" in ran.stderr


def test_a_missing_runtime_is_named(cpp, atp_bundle, tmp_path):
    ran = cpp.edgeprune_run(atp_bundle, "--prompt", "?", "--runtime-library", tmp_path / "none.so")
    assert ran.returncode == 1
    assert ran.stderr.startswith("edgeprune: ONNX Runtime was not found")
