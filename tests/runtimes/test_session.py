"""Sessions give the tokens and the kept indices of the torch reference."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import CORPUS, edit_json, random_prompt

from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import BackendError, BundleError, EdgepruneError, PictureError, PromptError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.answer import Answer
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch
from edgeprune.runtimes.guide import GuideEncoder, GuideInputs
from edgeprune.runtimes.preprocessing import read_picture
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session, open_session

KINDS = (
    "atp",
    "cdpruner",
    "combined",
    "dart",
    "dyrate",
    "host",
    "ivtp",
    "random",
    "sparsevlm",
    "tower",
    "unpruned",
)
PICTURES = check_pictures(6, size=(60, 40))
QUESTION = "What colour is the circle?"
WORDS = [*" ".join(CORPUS).split(), "Größe", "猫", "🙂", "1234", "…", "x" * 40]


@dataclass(frozen=True)
class Pair:
    """A session and the reference it must agree with."""

    session: Session
    model: PrunedModel
    guide: GuideEncoder | None

    def reference(self, pictures, prompt, max_new_tokens):
        """Greedy ids and site results of the reference with the session's inputs."""
        manifest = self.session.bundle.manifest
        prepared = self.prepare(pictures)
        tower = None if prepared is None else self.model.encode_pictures(prepared)
        tokens = () if tower is None else tower.rows.tokens_per_image
        encoded = self.session.prompts.encode_chat(prompt, tokens)
        guide = None
        if self.guide is not None and pictures:
            guide = self.guide.encode(encoded.tail_text, encoded.tail_offsets)
        return self.model.generate(
            encoded.token_ids,
            prepared,
            guide,
            max_new_tokens=max_new_tokens,
            eos_token_ids=manifest.prompt["eos_token_ids"],
        )

    def prepare(self, pictures):
        """The pictures as the model takes them; None for none."""
        grid = self.session.bundle.manifest.geometry.grid
        read = [read_picture(picture) for picture in pictures]
        return self.session.preprocessing.prepare(read, grid) if read else None

    def chain(self) -> GraphChain:
        bundle, backend = self.session.bundle, self.session.backend
        graphs = {name: backend.load(bundle, name) for name in bundle.manifest.graphs}
        return GraphChain(bundle.manifest, backend, graphs)


def open_pair(bundle: Path, folder: Path, clip: Path | None, dtype: torch.dtype = torch.float32) -> Pair:
    session = open_session(bundle, threads=1)
    probe = session.bundle.manifest.probe
    guide = None
    if probe is not None and probe.guide_tokenizer is not None:
        guide = GuideEncoder(session.bundle.file(probe.guide_tokenizer), probe.guide_context_length)
    return Pair(session, load_checkpoint(folder, clip=clip, dtype=dtype), guide)


@pytest.fixture(scope="module", params=KINDS)
def pair(request) -> Iterator[Pair]:
    folder = "tied_folder" if request.param == "unpruned" else f"{request.param}_folder"
    clip = request.getfixturevalue("clip_folder") if request.param == "ivtp" else None
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    opened = open_pair(bundle, request.getfixturevalue(folder), clip)
    with opened.session:
        yield opened


@pytest.fixture(scope="module")
def session(atp_bundle) -> Iterator[Session]:
    with open_session(atp_bundle, threads=1) as opened:
        yield opened


def compare(pair: Pair, pictures, prompt: str, max_new_tokens: int) -> Answer:
    """Token ids, counts and indices are equal, exactly."""
    answer = pair.session.answer(pictures, prompt, SamplingOptions(max_new_tokens))
    token_ids, sites = pair.reference(pictures, prompt, max_new_tokens)
    ours = [(site.name, site.tokens_in, site.kept, site.indices) for site in answer.sites]
    theirs = [(site.name, site.tokens_in, site.kept, site.slots) for site in sites]
    assert ours == theirs, (prompt, len(pictures))
    assert list(answer.token_ids) == token_ids, (prompt, len(pictures))
    return answer


@pytest.mark.parametrize("num_images", [1, 2, 0])
def test_answer_is_that_of_the_reference(pair, num_images):
    answer = compare(pair, PICTURES[:num_images], QUESTION, 12)
    manifest = pair.session.bundle.manifest
    assert len(answer.sites) == (len(manifest.sites) if num_images else 0)
    tokens_in = manifest.geometry.tokens_per_image * num_images
    for report, site in zip(answer.sites, manifest.sites, strict=False):
        assert (report.name, report.place) == (site.graph, site.place)
        assert report.tokens_in == tokens_in
        assert 0 < report.kept == len(report.indices) <= tokens_in
        assert list(report.indices) == sorted(set(report.indices))
        assert report.indices[-1] < manifest.geometry.num_patches * num_images
        if site.keep_per_image is not None:
            assert report.kept == site.keep_per_image * num_images
        tokens_in = report.kept
    for earlier, later in zip(answer.sites[:-1], answer.sites[1:], strict=True):
        assert set(later.indices) <= set(earlier.indices)
    assert answer.finish_reason in ("length", "end")
    assert answer.decode_steps == len(answer.token_ids) - (answer.finish_reason == "length")


def test_pruning_depends_on_the_picture(session):
    kept = {tuple(site.indices for site in session.answer([p], QUESTION, ONE).sites) for p in PICTURES}
    assert len(kept) > 1, "the comparison of kept indices would be empty"


ONE = SamplingOptions(max_new_tokens=1)


def random_question(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, 25)))


@pytest.mark.parametrize("pair", ["atp"], indirect=True)
def test_two_hundred_questions(pair):
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(200):
        # Smooth and noisy pictures of any size.
        chosen = [
            rng.integers(0, 256, (*rng.integers(8, 50, 2), 3)).astype(np.uint8)
            if rng.random() < 0.5
            else PICTURES[rng.integers(len(PICTURES))]
            for _ in range(rng.integers(0, 3))
        ]
        answer = compare(pair, chosen, random_question(rng), 3)
        counts.append(tuple(site.kept for site in answer.sites))
    assert len(set(counts)) > 20, "always the same counts: the comparison would be empty"


@pytest.mark.parametrize("pair", ["ivtp"], indirect=True)
def test_guided_questions(pair):
    rng = np.random.default_rng(1)
    indices = set()
    for index in range(40):
        # The longest exceeds CLIP's 77 tokens.
        prompt = random_question(rng) if index else " ".join(["circle"] * 90)
        answer = compare(pair, [PICTURES[index % 6]] * (1 + index % 2), prompt, 3)
        indices.add(tuple(site.indices for site in answer.sites))
    assert len(indices) > 12


def random_guide(guide: GuideEncoder | None, num_text: int, seed: int) -> GuideInputs | None:
    """An instruction whose characters the text rows share at random."""
    if guide is None:
        return None
    rng = np.random.default_rng(seed)
    text = " ".join(rng.choice(WORDS, 6))
    spans = np.sort(rng.integers(0, len(text) + 1, (num_text, 2)), axis=1)
    return guide.encode(text, spans.astype(np.int64))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_images=st.integers(0, 3),
    prefix=st.integers(1, 12),
    between=st.integers(0, 4),
    suffix=st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
def test_logits_are_those_of_the_reference(pair, chain, num_images, prefix, between, suffix, seed):
    tokens = pair.session.bundle.manifest.geometry.tokens_per_image
    ids, pixels = random_prompt(
        num_images=num_images,
        tokens_per_image=tokens,
        prefix=prefix,
        between=between,
        suffix=suffix,
        seed=seed,
    )
    guide = random_guide(pair.guide, suffix, seed) if num_images else None
    expected = pair.model.prefill(ids, pixels, guide)
    watch = Stopwatch()
    tower = None if pixels is None else chain.encode_pictures(pixels, watch)
    logits, sequence = chain.prefill(ids, tower, guide, 4, watch)
    reports = chain.site_reports(sequence)
    assert [report.indices for report in reports] == [site.slots for site in expected.sites]
    assert expected.logits.std() > 0.1, "the comparison would be empty"
    assert np.abs(logits - expected.logits.numpy()).max() <= 1e-4
    assert sequence.position == len(ids)
    for step in range(3):
        token = 10 + (seed + 17 * step) % 300
        reference = pair.model.decode(
            token, expected.next_position + step, expected.caches, eviction=expected.eviction
        )
        ours = chain.decode(token, sequence, watch)
        assert np.abs(ours - reference.numpy()).max() <= 1e-4
    for cache in sequence.caches:
        assert all(cache.length == expected.caches[layer][0].shape[2] for layer in cache.layers)
        assert not cache.layers or cache.capacity >= cache.length


@pytest.fixture(scope="module")
def chain(pair) -> GraphChain:
    return pair.chain()


def test_half_precision(atp_float16_bundle, atp_folder):
    """Rounding may move a score over its threshold; where it does not, the logits agree."""
    pair = open_pair(atp_float16_bundle, atp_folder, None, torch.float16)
    chain, agreed = pair.chain(), 0
    for seed in range(12):
        ids, pixels = random_prompt(num_images=seed % 3, seed=seed)
        expected = pair.model.prefill(ids, pixels)
        tower = None if pixels is None else chain.encode_pictures(pixels, Stopwatch())
        logits, sequence = chain.prefill(ids, tower, None, 2, Stopwatch())
        assert logits.dtype == np.float16
        sites = [report.indices for report in chain.site_reports(sequence)]
        if sites != [site.slots for site in expected.sites]:
            continue
        agreed += 1
        scale = max(1, float(expected.logits.abs().max()))
        assert np.abs(logits - expected.logits.numpy()).max() <= 2e-2 * scale
        decoded = chain.decode(20, sequence, Stopwatch())
        reference = pair.model.decode(
            20, expected.next_position, expected.caches, eviction=expected.eviction
        ).numpy()
        assert np.abs(decoded - reference).max() <= 2e-2 * scale
    assert agreed >= 9
    answer = pair.session.answer(PICTURES[:1], QUESTION, SamplingOptions(4))
    assert 0 < answer.sites[0].kept <= 36


# What an answer holds


def test_pieces_are_the_text(session):
    options = SamplingOptions(max_new_tokens=30, temperature=1.5, seed=3)
    answer = session.answer(PICTURES[:1], QUESTION, options)
    pieces = list(session.generate(PICTURES[:1], QUESTION, options))
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == answer.text
    # The tokenizer's own decoding of all ids is the text, special tokens left out.
    assert answer.text == session.prompts.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
    stream, streamed = session.stream(PICTURES[:1], QUESTION, options), []
    try:
        while True:
            streamed.append(next(stream))
    except StopIteration as stop:
        returned = stop.value
    assert streamed == pieces
    assert (returned.text, returned.token_ids) == (answer.text, answer.token_ids)


def test_seed_makes_an_answer_reproducible(session):
    def ids(seed):
        options = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=seed)
        return session.answer(PICTURES[:1], QUESTION, options).token_ids

    assert ids(7) == ids(7)
    assert len({ids(seed) for seed in range(4)}) > 1


def test_max_new_tokens(session):
    longest = session.answer([], QUESTION, SamplingOptions(max_new_tokens=9))
    assert (longest.finish_reason, len(longest.token_ids)) == ("length", 9), (
        "the model must not stop by itself"
    )
    for limit in (1, 2, 5):
        answer = session.answer([], QUESTION, SamplingOptions(max_new_tokens=limit))
        assert answer.token_ids == longest.token_ids[:limit]
        assert (answer.finish_reason, answer.decode_steps) == ("length", limit - 1)


def test_stop_text_ends_the_answer(session):
    options = SamplingOptions(max_new_tokens=30, temperature=1.5, seed=3)
    whole = session.answer([], QUESTION, options)
    at = len(whole.text) // 2
    stop = whole.text[at : at + 3]
    answer = session.answer([], QUESTION, SamplingOptions(30, 1.5, seed=3, stop=("never in it", stop)))
    assert answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < len(whole.token_ids)
    stopped = SamplingOptions(30, 1.5, seed=3, stop=(stop,))
    assert "".join(session.generate([], QUESTION, stopped)) == answer.text


def test_end_token_ends_the_answer(atp_bundle, tmp_path):
    """Any token may be the end token: make the third greedy one it."""
    with open_session(atp_bundle, threads=1) as session:
        whole = session.answer(PICTURES[:1], QUESTION, SamplingOptions(8)).token_ids
    end = whole[2]
    expected = whole[: whole.index(end)]
    shutil.copytree(atp_bundle, tmp_path / "b")
    path = tmp_path / "b" / MANIFEST_FILE
    edit_json(path, prompt={**json.loads(path.read_text())["prompt"], "eos_token_ids": [1, end]})
    with open_session(tmp_path / "b", threads=1) as session:
        answer = session.answer(PICTURES[:1], QUESTION, SamplingOptions(8))
    assert (answer.token_ids, answer.finish_reason) == (expected, "end")
    assert answer.decode_steps == len(expected)


def test_an_answer_of_a_given_length_goes_on_behind_its_end(atp_bundle, session, tmp_path):
    whole = session.answer(PICTURES[:1], QUESTION, SamplingOptions(8)).token_ids
    shutil.copytree(atp_bundle, tmp_path / "b")
    path = tmp_path / "b" / MANIFEST_FILE
    edit_json(path, prompt={**json.loads(path.read_text())["prompt"], "eos_token_ids": [whole[2]]})
    with open_session(tmp_path / "b", threads=1) as early:
        assert len(early.answer(PICTURES[:1], QUESTION, SamplingOptions(8)).token_ids) < 8
        answer = early.answer(PICTURES[:1], QUESTION, SamplingOptions(8, ignore_eos=True))
    assert (answer.token_ids, answer.finish_reason) == (whole, "length")


def test_timings_and_json(session):
    answer = session.answer(PICTURES[:1], QUESTION, SamplingOptions(3))
    stages = {"preprocess", "tokenize", "vision", "projector", "embed", "logits_to_host", "decode"}
    stages |= {f"prefill.segment{index}" for index in range(4)}
    stages |= {f"{step}.site{index}" for step in ("select", "wait", "gather") for index in range(3)}
    assert set(answer.timings_ms) == stages | {"time_to_first_token", "total"}
    assert all(value >= 0 for value in answer.timings_ms.values())
    first, total = answer.timings_ms["time_to_first_token"], answer.timings_ms["total"]
    assert first + answer.timings_ms["decode"] == pytest.approx(total)
    assert sum(value for name, value in answer.timings_ms.items() if name.startswith("prefill")) <= first
    assert answer.decode_tokens_per_second == pytest.approx(2000 / answer.timings_ms["decode"])
    data = answer.to_json()
    assert data["token_ids"] == list(answer.token_ids)
    assert data["prompt_tokens"] == answer.prompt_tokens > 36
    assert [site["kept"] for site in data["sites"]] == [site.kept for site in answer.sites]


def test_time_of_the_caller_is_not_counted(session):
    steps = session.stream(PICTURES[:1], QUESTION, SamplingOptions(6))
    started, waited = time.perf_counter(), 0.0
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            answer = finished.value
            break
        time.sleep(0.05)
        waited += 0.05
    elapsed = time.perf_counter() - started
    assert waited > 0
    assert answer.timings_ms["total"] <= 1000 * (elapsed - waited)


def test_text_has_no_sites_and_no_decode_rate_for_one_token(session):
    answer = session.answer([], QUESTION, ONE)
    assert (answer.sites, answer.decode_steps, answer.decode_tokens_per_second) == ((), 0, 0.0)
    assert "vision" not in answer.timings_ms


def test_dyrate_drops_tokens_while_it_generates(dyrate_bundle, dyrate_folder):
    opened = open_pair(dyrate_bundle, dyrate_folder, None)
    with opened.session:
        answer = compare(opened, PICTURES[:2], QUESTION, 40)
        (site,) = answer.sites
        assert site.kept == 72 - 72 // 8
        assert len(site.evictions) >= 2
        generated, left = (np.array(column) for column in zip(*site.evictions, strict=True))
        assert (np.diff(generated) > 0).all()
        assert (np.diff([site.kept, *left]) < 0).all()
        assert {"rate", "evict"} <= set(answer.timings_ms)

        # Memory falls with the tokens, in the caches behind the site only.
        chain, watch = opened.chain(), Stopwatch()
        encoded = opened.session.prompts.encode_chat(QUESTION, [36, 36])
        tower = chain.encode_pictures(opened.prepare(PICTURES[:2]), watch)
        _, sequence = chain.prefill(encoded.token_ids, tower, None, 41, watch)
        before = [cache.nbytes for cache in sequence.caches]
        for token in answer.token_ids:
            chain.decode(token, sequence, watch)
        after = [cache.nbytes for cache in sequence.caches]
        assert (after[0], sequence.caches[0].length) == (before[0], encoded.token_ids.size + 40)
        assert after[1] < before[1]
        dropped = 72 - int(left[-1])
        assert sequence.caches[1].length == encoded.token_ids.size + 40 - dropped


def test_placeholders_say_where_the_pictures_are(session):
    inside = session.answer(PICTURES[:1], "Look: <image> What is it?", ONE)
    before = session.answer(PICTURES[:1], "What is it?", ONE)
    assert inside.prompt_tokens > before.prompt_tokens
    assert inside.sites[0].tokens_in == before.sites[0].tokens_in == 36


def test_overlay(session):
    answer = session.answer(PICTURES[:2], QUESTION, ONE)
    first, second = (session.overlay(PICTURES[index], answer, index) for index in range(2))
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()


# Errors and threads


@pytest.mark.parametrize(
    ("images", "prompt", "options", "error", "message"),
    [
        (1, "<image> and <image>: which?", ONE, PromptError, "2 placeholders '<image>' for 1 pictures"),
        (0, "<image> What?", ONE, PromptError, "1 placeholders '<image>' for 0 pictures"),
        (1, "  ", ONE, PromptError, "the prompt is empty"),
        (1, QUESTION, SamplingOptions(512), PromptError, "exceed the context of 512"),
        (0, "word " * 600, ONE, PromptError, "exceed the context of 512"),
        (14, QUESTION, ONE, PromptError, "504 of them visual"),
    ],
)
def test_prompts_that_cannot_be_answered(session, images, prompt, options, error, message):
    with pytest.raises(error, match=message) as caught:
        session.answer((PICTURES * 3)[:images], prompt, options)
    assert "\n" not in str(caught.value)


def test_context_may_be_filled_to_the_last_token(session):
    length = session.answer([], QUESTION, ONE).prompt_tokens
    answer = session.answer([], QUESTION, SamplingOptions(512 - length))
    assert answer.prompt_tokens + len(answer.token_ids) <= 512
    assert answer.finish_reason in ("length", "end")
    with pytest.raises(PromptError, match="exceed the context of 512 by 1"):
        session.answer([], QUESTION, SamplingOptions(513 - length))


def test_unusable_picture(session, tmp_path):
    with pytest.raises(PictureError):
        session.answer([tmp_path / "missing.png"], QUESTION, ONE)
    with pytest.raises(PictureError):
        session.answer([b"no picture"], QUESTION, ONE)


def test_closed_session(atp_bundle):
    with open_session(atp_bundle, threads=1) as session:
        running = session.generate([], QUESTION, SamplingOptions(3))
        next(running)
    for use in (
        lambda: session.answer([], QUESTION, ONE),
        lambda: next(session.generate([], QUESTION, ONE)),
        lambda: next(session.stream([], QUESTION, ONE)),
    ):
        with pytest.raises(EdgepruneError, match="the session is closed"):
            use()
    # An answer that has begun may end.
    assert isinstance(list(running), list)
    session.close()


def test_threads_share_a_session(session):
    questions = [([PICTURES[index % 6]] * (index % 3), f"What is number {index}?") for index in range(8)]
    options = SamplingOptions(max_new_tokens=6)

    def ask(question):
        answer = session.answer(*question, options)
        return answer.token_ids, [site.indices for site in answer.sites]

    expected = [ask(question) for question in questions]
    results: dict[int, list[object]] = {}
    barrier = threading.Barrier(2)

    def work(thread: int) -> None:
        barrier.wait()
        order = questions if thread else questions[::-1]
        results[thread] = [ask(question) for question in order]

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: expected, 0: expected[::-1]}


def test_two_answers_at_a_time_in_one_thread(session):
    """Streams that are read in turn have caches of their own."""
    options = SamplingOptions(max_new_tokens=8)
    alone = [list(session.generate([picture], QUESTION, options)) for picture in PICTURES[:2]]
    streams = [session.generate([picture], QUESTION, options) for picture in PICTURES[:2]]
    turns: list[list[str]] = [[], []]
    for _ in range(max(map(len, alone))):
        for turn, stream in zip(turns, streams, strict=True):
            turn += [piece for piece in [next(stream, None)] if piece is not None]
    assert turns == alone


def test_open_session_errors(atp_bundle, tmp_path):
    with pytest.raises(BackendError, match="backend 'abacus' is unknown"):
        open_session(atp_bundle, backend="abacus")
    with pytest.raises(BackendError, match="provider 'tpu' is unknown"):
        open_session(atp_bundle, provider="tpu")
    with pytest.raises(BundleError, match="is not a folder"):
        open_session(tmp_path / "missing")
    shutil.copytree(atp_bundle, tmp_path / "b")
    edit_json(tmp_path / "b" / MANIFEST_FILE, preprocessing={})
    with pytest.raises(EdgepruneError):
        open_session(tmp_path / "b")
    with (tmp_path / "b" / "vision.onnx.data").open("r+b") as file:
        file.write(b"damaged!")
    with pytest.raises(BundleError, match=r"vision\.onnx\.data is not the file that was exported"):
        open_session(tmp_path / "b")


def test_graph_that_the_backend_cannot_open(atp_bundle, tmp_path):
    """A bundle whose hashes fit but whose graph is none."""
    from edgeprune.bundle import file_entry
    from edgeprune.json_data import to_json

    shutil.copytree(atp_bundle, tmp_path / "b")
    (tmp_path / "b" / "gather.onnx").write_bytes(b"not a graph")
    graphs = to_json(Bundle.open(atp_bundle).manifest.graphs)
    graphs["gather"]["file"] = to_json(file_entry(tmp_path / "b", tmp_path / "b" / "gather.onnx"))
    edit_json(tmp_path / "b" / MANIFEST_FILE, graphs=graphs)
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot open gather\.onnx"):
        open_session(tmp_path / "b")
