"""Turns, warm-up and counts, with real sessions."""

import dataclasses

import pytest

from edgeprune.runtimes.answer import Answer
from edgeprune.runtimes.profiling.assembly import cached_rows
from edgeprune.runtimes.profiling.measuring import measure, prompt_counts
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session
from edgeprune.visual_layout import VisualGrid, VisualLayout


class Listening:
    """A session that writes down who is asked what."""

    def __init__(self, name, session, asked):
        self.name, self.session, self.asked = name, session, asked
        self.bundle, self.backend = session.bundle, session.backend

    def answer(self, pictures, prompt, options, *, watch):
        self.asked.append((self.name, prompt))
        return self.session.answer(pictures, prompt, options, watch=watch)


@pytest.fixture(scope="module")
def session(atp_bundle):
    with open_session(atp_bundle, threads=1) as session:
        yield session


def test_bundles_take_turns_and_the_order_is_turned_around(session, samples):
    asked = []
    both = [Listening(name, session, asked) for name in ("a", "b")]
    prompts = [dataclasses.replace(sample, prompt=sample.name) for sample in samples.samples]
    rounds = []
    runs = measure(both, prompts, runs=3, warmup=2, max_new_tokens=1, at_round=rounds.append)
    first, second = (prompt.name for prompt in prompts)
    assert asked == [
        ("a", first), ("b", first), ("b", second), ("a", second),  # warm-up
        ("a", first), ("b", first), ("b", second), ("a", second), ("a", first), ("b", first),
    ]  # fmt: skip
    assert rounds == [0, 1, 2, 3, 4]
    assert [[(run.round, run.sample) for run in own] for own in runs] == [[(0, 0), (1, 1), (2, 0)]] * 2


def test_a_run_knows_its_stages_and_steps(session, samples):
    ((run,),) = measure([session], samples.samples, runs=1, warmup=0, max_new_tokens=4)
    stages = run.stage_ms()
    segments, sites = (
        [name for name in stages if name.startswith(prefix)] for prefix in ("prefill.", "select.")
    )
    assert segments == [f"prefill.segment{index}" for index in range(4)]
    assert sites == [f"select.site{index}" for index in range(3)]
    assert run.nested_stages() == {"wait.site0", "wait.site1", "wait.site2"}
    # The answer does not end at the model's end token.
    assert len(run.decode_ms) == 3
    assert list(run.decode_stage_ms()) == ["logits_to_host"]
    assert len(run.decode_stage_ms()["logits_to_host"]) == 3
    assert run.stages == run.spans
    top = sum(ms for name, ms in stages.items() if name not in run.nested_stages())
    assert top <= run.first_token_ms
    assert run.total_ms == pytest.approx(run.first_token_ms + sum(run.decode_ms))


def test_an_asynchronous_backend_is_waited_for_in_an_answer_of_its_own(session, samples, monkeypatch):
    waits = []
    monkeypatch.setattr(type(session.backend), "asynchronous", True)
    monkeypatch.setattr(type(session.backend), "synchronize", lambda _: waits.append(len(asked)))
    asked = []
    listening = Listening("a", session, asked)
    ((run,),) = measure([listening], samples.samples, runs=1, warmup=0, max_new_tokens=2)
    assert len(asked) == 2
    assert set(waits) == {2}
    assert len(waits) == len(run.stages)
    assert [span.name for span in run.stages] == [span.name for span in run.spans]
    assert run.stages != run.spans


def test_the_rows_of_a_prompt(session, samples):
    sample = samples.samples[0]
    answer = session.answer(sample.pictures, sample.prompt, SamplingOptions(max_new_tokens=1))
    counts = prompt_counts(session.bundle.manifest, answer)
    assert (counts.tiles, counts.entering) == ((36,), 36)
    assert counts.kept == tuple(site.kept for site in answer.sites)
    assert counts.text == answer.prompt_tokens - 36


def test_the_tiles_of_pictures_of_any_size(session):
    """Tiles of a fixed size are counted; where pictures keep their size, each is one tile of its own."""
    sizes = ((2, 3), (4, 6), (6, 6))
    grids = [VisualGrid(image, *size, (0, 0, 1, 1)) for image, size in zip((0, 1, 1), sizes, strict=True)]
    visual = VisualLayout.of_whole_grids(grids)
    answer = Answer("", (), "length", 70, (), {}, 0, visual, tuple(range(66)))
    manifest = session.bundle.manifest
    for kind, grid, expected in (("tiles", (2, 3), (6,) * 11), ("patches", (4, 4), (6, 60))):
        changed = dataclasses.replace(
            manifest,
            preprocessing={"kind": kind},
            geometry=dataclasses.replace(manifest.geometry, grid=grid),
        )
        counts = prompt_counts(changed, answer)
        assert (counts.tiles, counts.entering, counts.text) == (expected, 66, 4)


def test_rows_of_text_alone(session):
    answer = session.answer([], "What?", SamplingOptions(max_new_tokens=1))
    counts = prompt_counts(session.bundle.manifest, answer)
    assert (counts.tiles, counts.entering, counts.kept) == ((), 0, ())
    assert counts.text == answer.prompt_tokens


def test_what_left_a_cache_while_generating_is_not_counted(dyrate_bundle, samples):
    with open_session(dyrate_bundle, threads=1) as session:
        ((run,),) = measure([session], samples.samples, runs=1, warmup=0, max_new_tokens=8)
        manifest = session.bundle.manifest
    (site,) = run.answer.sites
    assert site.evictions, "this checkpoint drops tokens while it answers"
    generated, left = site.evictions[-1]
    rows = cached_rows(manifest, run, generated)
    first, last = manifest.segments
    text = run.counts.text
    assert {rows[layer] for layer in first.layers} == {run.counts.entering + text + generated}
    assert {rows[layer] for layer in last.layers} == {left + text + generated}
