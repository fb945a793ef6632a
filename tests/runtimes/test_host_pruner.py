"""A pruner of the program's own: what it sees is the torch reference's, what it keeps is what is kept."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pruners import CHOICES, REFUSED, OutOfTimeError, Recording, raises
from tensorrt_double import GpuDouble, add_engines
from tiny_llava_next import TinyLlavaNext, build_llava_next, with_base
from torch import nn

from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.cli import main
from edgeprune.errors import EdgepruneError, PruningError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.export.exporter import export
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.operators.token_select import select_top_k
from edgeprune.prune.fastv import FastV
from edgeprune.prune.host import Host
from edgeprune.runtimes.host_pruner import SiteScores, check_takes_pruner
from edgeprune.runtimes.preprocessing import read_picture
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session

PICTURES = check_pictures(3, size=(60, 40))
QUESTION = "What colour is the circle?"
SIX = SamplingOptions(6)


def site_scores(scores, **changes) -> SiteScores:
    count = len(scores)
    fields = {
        "name": "site0",
        "place": "before layer 1",
        "layer": 1,
        "scores": np.array(scores, np.float32),
        "slots": np.arange(count),
        "places": np.zeros((count, 6), np.int64),
        "own_choice": np.arange(count),
        "elapsed_ms": 1.0,
    }
    return SiteScores(**{**fields, **changes})


class Forced(nn.Module):
    """A selector of the torch reference that keeps what a function of scores and slots says."""

    def __init__(self, selector, choose):
        super().__init__()
        self.selector, self.choose, self.scores = selector, choose, None

    def forward(self, inputs):
        *_, named = self.selector(inputs)
        slots = inputs[names.VISUAL_SLOTS].numpy()
        visual = np.flatnonzero(slots >= 0)
        self.scores = named[names.SCORES].numpy()[visual]
        keep = slots < 0
        keep[visual[self.choose(self.scores, slots[visual])]] = True
        order = np.concatenate((np.flatnonzero(keep), np.flatnonzero(~keep)))
        return torch.from_numpy(order), torch.tensor(int(keep.sum())), named


def forced_reference(folder, session, pictures, choose):
    """Ids and sites of the reference in which a function chooses, and the scores that it saw."""
    model = load_checkpoint(folder, dtype=torch.float32)
    for select in model.selects:
        select.selector = Forced(select.selector, choose)
    manifest = session.bundle.manifest
    prepared = session.preprocessing.prepare([read_picture(p) for p in pictures], manifest.geometry.grid)
    tokens = model.encode_pictures(prepared).rows.tokens_per_image
    ids = session.prompts.encode_chat(QUESTION, tokens).token_ids
    found, sites = model.generate(
        ids, prepared, max_new_tokens=6, eos_token_ids=manifest.prompt["eos_token_ids"]
    )
    return found, sites, [select.selector.scores for select in model.selects]


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_a_pruner_sees_the_references_scores_and_its_choice_is_kept(host_folder, host_bundle, num_images):
    def choose(scores, slots):
        # Neither the highest nor a fixed number.
        arbitrary = np.flatnonzero((slots + np.arange(len(slots))) % 3 > 0)
        return sorted({int(scores.argmax()), *arbitrary.tolist()})

    pruner = Recording(lambda site: choose(site.scores, site.slots))
    with open_session(host_bundle, threads=1, pruner=pruner) as session:
        answer = session.answer(PICTURES[:num_images], QUESTION, SIX)
        ids, sites, scores = forced_reference(host_folder, session, PICTURES[:num_images], choose)
    assert list(answer.token_ids) == ids
    assert [(s.tokens_in, s.kept, s.indices) for s in answer.sites] == [
        (s.tokens_in, s.kept, s.slots) for s in sites
    ]
    assert len(pruner.seen) == len(scores) == 2
    for seen, expected, report, site in zip(
        pruner.seen, scores, answer.sites, session.bundle.manifest.sites, strict=True
    ):
        assert (seen.name, seen.place, seen.layer) == (site.graph, site.place, site.layer)
        assert seen.scores.dtype == np.float32
        assert np.abs(seen.scores - expected).max() <= 2e-6
        assert len(seen.scores) == len(seen.slots) == len(seen.places) == report.tokens_in
        # One grid of 6×6 tokens for each picture.
        picture, place = seen.slots // 36, seen.slots % 36
        six = np.full_like(place, 6)
        assert np.array_equal(seen.places, np.stack((picture, picture, place // 6, place % 6, six, six), 1))
    assert pruner.seen[0].slots.tolist() == list(range(36 * num_images))
    assert tuple(pruner.seen[1].slots) == answer.sites[0].indices
    assert answer.sites[1].kept < answer.sites[0].kept < 36 * num_images


def test_keeping_what_fastv_keeps_gives_fastvs_answer(llava_folder, host_bundle, tmp_path):
    fastv = export(llava_folder, tmp_path / "fastv", methods=[FastV(layer=1, keep=7)]).path

    def seven_of_each_picture(site: SiteScores):
        if site.layer == 3:
            return range(len(site.scores))
        count = 7 * (1 + int(site.places[:, 0].max()))
        return sorted(range(len(site.scores)), key=lambda index: (-site.scores[index], index))[:count]

    with (
        open_session(fastv, threads=1) as theirs,
        open_session(host_bundle, threads=1, pruner=seven_of_each_picture) as ours,
    ):
        for count in (1, 2, 3, 0):
            expected = theirs.answer(PICTURES[:count], QUESTION, SIX)
            found = ours.answer(PICTURES[:count], QUESTION, SIX)
            assert found.token_ids == expected.token_ids
            assert found.sites[:1] == expected.sites
            assert [site.indices for site in found.sites[1:]] == [site.indices for site in expected.sites]


def test_the_own_choice_is_that_of_a_session_without_a_pruner(host_bundle):
    pruner = Recording(CHOICES["own"])
    with (
        open_session(host_bundle, threads=1) as plain,
        open_session(host_bundle, threads=1, pruner=pruner) as ours,
    ):
        for count in (1, 2, 0):
            expected = plain.answer(PICTURES[:count], QUESTION, SIX)
            found = ours.answer(PICTURES[:count], QUESTION, SIX)
            assert (found.token_ids, found.sites) == (expected.token_ids, expected.sites)
            for seen, site in zip(pruner.take(), expected.sites, strict=True):
                assert tuple(sorted(seen.slots[seen.own_choice])) == site.indices
                # The bundle's own choice is the highest scores.
                assert np.array_equal(seen.highest(len(seen.own_choice)), seen.own_choice)
                assert 0 < len(seen.own_choice) < len(seen.scores)


def test_all_tokens_may_stay_and_one_may(host_bundle):
    for pruner, kept in ((CHOICES["all"], [72, 72]), (lambda site: [len(site.scores) - 1], [1, 1])):
        with open_session(host_bundle, threads=1, pruner=pruner) as session:
            answer = session.answer(PICTURES[:2], QUESTION, SIX)
        assert [site.kept for site in answer.sites] == kept
        assert len(answer.token_ids) > 0


def test_a_text_alone_asks_no_pruner(host_bundle):
    with open_session(host_bundle, threads=1, pruner=raises) as session:
        assert session.answer([], QUESTION, SIX).token_ids


@pytest.mark.parametrize("name", REFUSED)
def test_choices_that_there_cannot_be_are_refused(host_bundle, name):
    choice, message = REFUSED[name]
    with open_session(host_bundle, threads=1, pruner=choice) as session:
        with pytest.raises(PruningError) as caught:
            session.answer(PICTURES[:1], QUESTION, SIX)
        # Nothing is lost: a prompt that asks no pruner is answered.
        assert session.answer([], QUESTION, SIX).token_ids
    assert str(caught.value) == message.format(place="before layer 1")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (7, "7"),
        ("all", "'all'"),
        ([[0, 1], [2]], "[[0, 1], [2]]"),
        ([0.0, 1.0], "[0.0, 1.0]"),
        (np.ones(36, bool), "bool values of shape [36]"),
        (np.zeros((2, 3), np.int64), "int64 values of shape [2, 3]"),
    ],
    ids=str,
)
def test_what_is_no_list_of_indices_is_named(host_bundle, value, shown):
    with (
        open_session(host_bundle, threads=1, pruner=lambda _: value) as session,
        pytest.raises(PruningError) as caught,
    ):
        session.answer(PICTURES[:1], QUESTION, SIX)
    assert str(caught.value) == (
        f"the pruner returns {shown} at site0 (before layer 1): return a list or an array of the indices that stay"
    )


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, list, tuple], ids=lambda kind: kind.__name__)
def test_indices_may_come_in_any_integer_type_and_order(host_bundle, kind):
    def pruner(site):
        indices = np.arange(len(site.scores))[::-2]
        return kind(indices.tolist()) if kind in (list, tuple) else indices.astype(kind)

    with open_session(host_bundle, threads=1, pruner=pruner) as session:
        answer = session.answer(PICTURES[:1], QUESTION, SIX)
    assert answer.sites[0].indices == tuple(range(1, 36, 2))
    assert answer.sites[1].indices == tuple(range(3, 36, 4))


def test_what_a_pruner_raises_the_answer_raises(host_bundle):
    with open_session(host_bundle, threads=1, pruner=raises) as session:
        with pytest.raises(OutOfTimeError, match="no time is left"):
            session.answer(PICTURES[:1], QUESTION, SIX)
        with pytest.raises(OutOfTimeError, match="no time is left"):
            next(session.generate(PICTURES[:1], QUESTION, SIX))


def test_a_bundle_without_scores_takes_no_pruner(atp_bundle, host_bundle):
    expected = (
        "no site of this bundle takes a pruner: export it with --method host, or open it without a pruner"
    )
    with pytest.raises(PruningError) as caught:
        open_session(atp_bundle, pruner=CHOICES["own"])
    assert str(caught.value) == expected
    manifest = Bundle.open(host_bundle).manifest
    with pytest.raises(PruningError, match=expected):
        check_takes_pruner(replace(manifest, sites=(), segments=manifest.segments[:1]))


def test_a_site_that_merges_behind_it_takes_no_pruner(host_bundle):
    manifest = Bundle.open(host_bundle).manifest
    check_takes_pruner(manifest)
    first, second = manifest.sites
    merging = replace(manifest, sites=(first, replace(second, merged_per_image=2)))
    with pytest.raises(PruningError, match="site1 merges tokens and counts on those that the bundle itself"):
        check_takes_pruner(merging)
    # What merges before it has done so.
    check_takes_pruner(replace(manifest, sites=(replace(first, merged_per_image=2), second)))


def test_later_sites_of_other_methods_take_what_the_pruner_left(llava_folder, tmp_path):
    methods = [Host(layers=(1,)), FastV(layer=2, keep=9)]
    bundle = export(llava_folder, tmp_path / "both", methods=methods).path
    for kept in (30, 3):
        with open_session(bundle, threads=1, pruner=lambda site, kept=kept: site.highest(kept)) as session:
            sites = session.answer(PICTURES[:1], QUESTION, SIX).sites
        assert [(site.tokens_in, site.kept) for site in sites] == [(36, kept), (kept, min(kept, 9))]


def test_grids_of_several_tiles_have_their_places(tmp_path):
    build_llava_next(tmp_path / "next", with_base(TinyLlavaNext(), layers=3, vision_layers=3, seed=20))
    bundle = export(tmp_path / "next", tmp_path / "bundle", methods=[Host(layers=(2,))]).path
    pruner = Recording(CHOICES["odd columns"])
    with open_session(bundle, threads=1, pruner=pruner) as session:
        answer = session.answer([PICTURES[0], PICTURES[1].rotate(90, expand=True)], QUESTION, SIX)
    (seen,) = pruner.seen
    grids = answer.visual.grids
    assert len(grids) > 2, "no picture of several grids"
    for slot, (picture, grid, row, column, rows, columns) in zip(seen.slots, seen.places, strict=True):
        assert (grid, row, column) == tuple(answer.visual.places[slot])
        assert (picture, rows, columns) == (grids[grid].image, grids[grid].rows, grids[grid].columns)
    assert set(seen.places[:, 0]) == {0, 1}
    expected = tuple(sorted(seen.slots[CHOICES["odd columns"](seen)].tolist()))
    assert answer.sites[0].indices == expected


def test_threads_share_a_pruner(host_bundle):
    pruner = Recording(lambda site: site.highest(len(site.scores) // 2))
    asked = [(PICTURES[:1], "What?"), (PICTURES[1:], QUESTION), (PICTURES[2:], "How many squares?")]
    found, seen, errors = {}, {}, []
    with open_session(host_bundle, threads=1, pruner=pruner) as session:
        expected = [session.answer(*one, SIX) for one in asked]

        def ask(index):
            try:
                found[index] = [session.answer(*asked[index], SIX) for _ in range(3)]
                seen[index] = [site.slots.size for site in pruner.seen]
            except EdgepruneError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for index, one in enumerate(expected):
        assert all((a.token_ids, a.sites) == (one.token_ids, one.sites) for a in found[index])
        assert seen[index] == [site.tokens_in for site in one.sites] * 3


def test_time_passes_for_a_pruner(host_bundle):
    times = []

    def pruner(site):
        times.append(site.elapsed_ms)
        return site.own_choice

    with open_session(host_bundle, threads=1, pruner=pruner) as session:
        timings = session.answer(PICTURES[:1], QUESTION, SIX).timings_ms
    first, second = times
    # What the answer has taken so far holds the vision tower, and does not hold what comes later.
    assert timings["vision"] < first < second < timings["time_to_first_token"]
    assert {"pruner.site0", "pruner.site1", "wait.site0", "wait.site1"} <= set(timings)


@pytest.mark.parametrize(
    "scores",
    [
        [0.5, 0.1, 0.5, np.nan, -np.inf, np.inf, 0.0, -0.0],
        [np.nan, np.nan],
        [1.0],
        np.random.default_rng(0).integers(0, 4, 50).astype(np.float32),
    ],
    ids=["mixed", "nan", "one", "ties"],
)
def test_the_highest_are_found_as_in_the_graphs(scores):
    site = site_scores(scores)
    for count in range(-1, len(scores) + 2):
        clamped = min(max(1, count), len(scores))
        order, kept = select_top_k(
            torch.from_numpy(site.scores)[None], clamped, torch.ones(len(scores)).bool()
        )
        assert site.highest(count).tolist() == order[: int(kept)].tolist()


def test_engines_take_a_pruner(host_bundle, tmp_path, monkeypatch):
    folder = shutil.copytree(host_bundle, tmp_path / "bundle")
    add_engines(folder, "split")
    GpuDouble().install(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for choice in ("own", "all", "odd columns"):
        answers = []
        for options in ({"backend": "tensorrt"}, {"threads": 1}):
            with open_session(folder, pruner=CHOICES[choice], **options) as session:
                answers.append(session.answer(PICTURES[:2], QUESTION, SIX))
        assert (answers[0].token_ids, answers[0].sites) == (answers[1].token_ids, answers[1].sites)


def test_every_command_takes_such_a_bundle_without_a_pruner(host_folder, host_bundle, tmp_path):
    bundle = str(shutil.copytree(host_bundle, tmp_path / "bundle"))
    picture = tmp_path / "picture.png"
    PICTURES[0].save(picture)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": str(picture), "prompt": QUESTION}) + "\n")
    asked = ("--image", str(picture), "--prompt", QUESTION)
    for command in (
        ("verify", bundle, "--checkpoint", str(host_folder)),
        ("inspect", bundle),
        ("calibrate", bundle, "--data", str(data), "--max-new-tokens", "2"),
        ("run", bundle, *asked, "--max-new-tokens", "2"),
        ("profile", bundle, *asked, "--max-new-tokens", "2", "--runs", "1", "--warmup", "0"),
    ):
        result = CliRunner().invoke(main, list(command))
        assert result.exit_code == 0, (command, result.output)
    manifest = json.loads((tmp_path / "bundle" / MANIFEST_FILE).read_text())
    assert [site["keep_per_image"] for site in manifest["sites"]] == [21, 12]
    assert manifest["calibration"]["keep_per_image"]["site0"]["values"] == [21]
