import numpy as np
import pytest
import torch
from geometries import LLAVA_7B
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_references import highest, ivtp_decoder_scores, mean_attention, rollout, value_norms
from tiny_checkpoints import random_prompt

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut
from edgeprune.models.vision_pruning import TowerAttention
from edgeprune.prune.ivtp import (
    Ivtp,
    IvtpVisionPruner,
    ascending_top_k,
    equal_steps,
    layer_groups,
    roll_out_class_row,
)
from edgeprune.prune.method import ModelGeometry
from edgeprune.prune.registry import method_from_parameters
from edgeprune.pruned_model import GuideInputs

TINY_GEOMETRY = ModelGeometry(
    num_layers=4, hidden_size=32, num_heads=4, head_dim=8, grid=(6, 6), vision_layers=3, has_class_token=True
)
# Wider than a unit normal, so that attention is far from uniform.
SPREAD = 1.5


def normal(rng, *shape):
    return (SPREAD * rng.standard_normal(shape)).astype(np.float32).astype(float)


def floats(array):
    return torch.tensor(array).float()


@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
def test_row_equals_the_full_rollout_in_the_tower(group_size):
    rng = np.random.default_rng(group_size)
    queries, keys = (normal(rng, group_size, 2, 3, 11, 4) for _ in range(2))
    row = roll_out_class_row(
        floats(queries[-1][:, :, :1]),
        torch.tensor([0]),
        [floats(query) for query in queries[:-1]],
        [floats(key) for key in keys],
        causal=False,
    )
    for picture in range(2):
        matrices = [
            mean_attention(query[picture], key[picture], causal=False)
            for query, key in zip(queries, keys, strict=True)
        ]
        expected = rollout(matrices)[0]
        assert row[picture].numpy() == pytest.approx(expected, abs=1e-6)
        assert expected.sum() == pytest.approx(1)
        if group_size > 1:
            with_identity = rollout([np.eye(11), *matrices])[0]
            assert abs(with_identity - expected).max() > 0.01, "the first layer's + I would not show"


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_row_equals_the_full_rollout_in_the_decoder(group_size, num_kv_heads):
    rng = np.random.default_rng(10 * group_size + num_kv_heads)
    queries, keys = normal(rng, group_size, 1, 4, 9, 4), normal(rng, group_size, 1, num_kv_heads, 9, 4)
    row = roll_out_class_row(
        floats(queries[-1][:, :, -1:]),
        torch.tensor([8]),
        [floats(query) for query in queries[:-1]],
        [floats(key) for key in keys],
        causal=True,
    )
    matrices = [
        mean_attention(query[0], key[0], causal=True) for query, key in zip(queries, keys, strict=True)
    ]
    assert row[0].numpy() == pytest.approx(rollout(matrices)[-1], abs=1e-6)


def test_schedule_of_llava_1_5():
    method = Ivtp()
    pruner = method.vision_pruner(LLAVA_7B)
    assert pruner.keep_by_layer == {
        **dict(zip(range(2, 21, 3), range(519, 176, -57), strict=True)),
        # 23 layers run: the eighth group has two.
        22: 120,
    }
    assert [pruner.keep_after_attention(layer) for layer in (0, 2, 22)] == [None, 519, 120]
    sites = method.decoder_sites(LLAVA_7B)
    assert [(site.cut, site.keep_per_image) for site in sites] == [
        (Cut(2, before_mlp=True), 106),
        (Cut(5, before_mlp=True), 92),
        (Cut(8, before_mlp=True), 78),
        (Cut(11, before_mlp=True), 64),
    ]
    assert method.tokens_per_tile(LLAVA_7B) == 120
    assert method.probe(LLAVA_7B).layers == tuple(range(12))
    assert sites[1].reads == (
        *("query.3", "query.4"),
        *("present.3.key", "present.4.key", "present.5.key"),
        *("probe_query.3", "probe_query.4", "probe_query.5"),
        *("probe_key.3", "probe_key.4", "probe_key.5"),
        "present.5.value",
    )


def test_layer_groups():
    assert [list(group) for group in layer_groups(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(group) for group in layer_groups(2, 3)] == [[0, 1]]


@given(start=st.integers(1, 2000), drop=st.integers(0, 2000), steps=st.integers(1, 40))
def test_steps_are_equal(start, drop, steps):
    end = max(start - drop, 0)
    counts = equal_steps(start, end, steps)
    assert counts[-1] == end
    drops = -np.diff([start, *counts])
    assert drops.min() >= 0
    assert drops.max() - drops.min() <= 1
    if (start - end) % steps == 0:
        assert drops.max() == drops.min()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_keep=st.integers(0, 12), levels=st.integers(1, 12))
def test_top_k_prefers_the_lower_index(seed, num_keep, levels):
    scores = np.random.default_rng(seed).integers(0, levels, (3, 12)).astype(np.float32)
    expected = [highest(row, num_keep) for row in scores]
    assert ascending_top_k(torch.from_numpy(scores), num_keep).tolist() == expected


def test_tower_keeps_the_patches_with_the_highest_scores():
    pruner, decided_by_values = IvtpVisionPruner(20, 3, TINY_GEOMETRY), 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        layers = [[normal(rng, 2, 2, 13, 4) for _ in range(3)] for _ in range(3)]
        keep = pruner.select([TowerAttention(torch.empty(0), *map(floats, layer)) for layer in layers], 5)
        for picture in range(2):
            matrices = [
                mean_attention(query[picture], key[picture], causal=False) for query, key, _ in layers
            ]
            attention = rollout(matrices)[0]
            score = attention * value_norms(layers[-1][2][picture])
            assert keep[picture].tolist() == highest(score[1:], 5)
            decided_by_values += highest(attention[1:], 5) != highest(score[1:], 5)
    assert decided_by_values > 3


@pytest.mark.parametrize("seed", range(5))
def test_decoder_site_keeps_the_tokens_with_the_highest_scores(seed):
    rng = np.random.default_rng(seed)
    # Two pictures with text between them, of which an earlier site has left some tokens, and three text rows.
    slots = np.array([-1, -1, 0, 4, 5, 9, -1, -1, 36, 40, 41, 70, 71, -1, -1, -1])
    length, num_context = len(slots), 13
    method = Ivtp(20, 10, decoder_layers=4, group_size=2)
    site = method.selector(1, TINY_GEOMETRY, {}, None)
    inputs = {
        names.VISUAL_SLOTS: torch.from_numpy(slots),
        names.CONTEXT_ROWS: torch.arange(num_context),
        names.NUM_KEEP: torch.tensor(6),
    }
    context, probes = [], []
    for layer in (2, 3):
        query, key = normal(rng, 4, length, 8), normal(rng, 2, length, 8)
        probe_query, probe_key = normal(rng, 4, 1, 8), normal(rng, 2, 1, 8)
        inputs |= {
            names.query(layer): floats(query[None]),
            names.present_key(layer): floats(key[None]),
            names.probe_query(layer): floats(probe_query[None]),
            names.probe_key(layer): floats(probe_key[None]),
        }
        context.append((query[:, :num_context], key[:, :num_context]))
        probes.append((probe_query, probe_key))
    value = normal(rng, 2, length, 8)
    inputs[names.present_value(3)] = floats(value[None])
    assert set(method.decoder_sites(TINY_GEOMETRY)[1].reads) <= set(inputs)
    expected = ivtp_decoder_scores(context, probes, value[:, :num_context])
    assert site.scores(inputs).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    order, count = site(inputs)
    visual = np.flatnonzero(slots >= 0)
    chosen = visual[highest(expected[visual], 6)]
    assert order[:count].tolist() == sorted([*np.flatnonzero(slots < 0), *chosen])
    assert sorted(order.tolist()) == list(range(length))


# --- the guide ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(llava_folder, clip_folder):
    return load_checkpoint(
        llava_folder, methods=[Ivtp(20, 10, decoder_layers=3, relevance_threshold=0.1)], clip=clip_folder
    )


def guide_inputs(rng, num_text, num_images, length):
    """Two chunks of CLIP tokens, each text row covered by none, one or several of them."""
    token_map = np.zeros((num_text, 2 * 77), dtype=np.float32)
    for row in range(num_text):
        covered = rng.choice(154, size=row % 4, replace=False)
        token_map[row, covered] = 1 / max(len(covered), 1)
    return {
        names.GUIDE_INPUT_IDS: torch.from_numpy(rng.integers(0, 500, (2, 77))),
        names.GUIDE_TOKEN_MAP: torch.from_numpy(token_map),
        names.IMAGE_EMBEDS: floats(rng.standard_normal((num_images, 12))),
        names.CLASS_FEATURES: floats(rng.standard_normal((num_images, 32))),
        names.TEXT_ROWS: torch.arange(length - num_text, length),
        names.VISUAL_SLOTS: torch.full((length,), -1),
    }


@torch.no_grad()
def numpy_relevance(guide, inputs):
    """Eq. 7, token by token, the picture that fits best."""
    text = (
        guide.text_projection(guide.text_tower(inputs[names.GUIDE_INPUT_IDS]))
        .double()
        .numpy()
        .reshape(154, 12)
    )
    token_map = inputs[names.GUIDE_TOKEN_MAP].numpy()
    relevance = np.full(len(token_map), -np.inf)
    for row, weights in enumerate(token_map):
        for picture in inputs[names.IMAGE_EMBEDS].double().numpy():
            cosines = [
                text[token] @ picture / np.linalg.norm(text[token]) / np.linalg.norm(picture)
                for token in np.flatnonzero(weights)
            ]
            if cosines:
                relevance[row] = max(relevance[row], np.mean(cosines))
    return relevance


@pytest.mark.parametrize("num_images", [1, 3])
def test_guide_averages_the_relevant_text_rows(guided, num_images):
    guide = guided.clip.guide
    inputs = guide_inputs(np.random.default_rng(num_images), num_text=16, num_images=num_images, length=25)
    expected = numpy_relevance(guide, inputs)
    covered = np.isfinite(expected)
    with torch.no_grad():
        relevance = guide.relevance(
            inputs[names.GUIDE_INPUT_IDS], inputs[names.GUIDE_TOKEN_MAP], inputs[names.IMAGE_EMBEDS]
        ).numpy()
        outputs = guide(inputs)
    assert relevance[covered] == pytest.approx(expected[covered], abs=1e-5)
    selected = expected >= 0.1
    assert 0 < selected.sum() < covered.sum() < 16
    weights = np.zeros(25)
    weights[9:][selected] = 1 / selected.sum()
    assert outputs[names.PROBE_WEIGHTS].numpy() == pytest.approx(weights[None], abs=1e-6)
    assert outputs[names.PROBE_OFFSET].tolist() == [[0.0] * 32]


@pytest.mark.parametrize(("threshold", "covered"), [(1.1, True), (-2.0, False)], ids=["high", "uncovered"])
def test_guide_falls_back_to_the_class_token(guided, threshold, covered, monkeypatch):
    guide = guided.clip.guide
    monkeypatch.setattr(guide, "threshold", threshold)
    inputs = guide_inputs(np.random.default_rng(7), num_text=5, num_images=2, length=9)
    if not covered:
        # A row that no CLIP token covers has no relevance, whatever the threshold.
        inputs[names.GUIDE_TOKEN_MAP].zero_()
    with torch.no_grad():
        outputs = guide(inputs)
    assert not outputs[names.PROBE_WEIGHTS].any()
    assert torch.allclose(outputs[names.PROBE_OFFSET][0], inputs[names.CLASS_FEATURES].mean(dim=0))


def test_relevance_threshold_is_inclusive(guided, monkeypatch):
    guide = guided.clip.guide
    inputs = guide_inputs(np.random.default_rng(8), num_text=2, num_images=1, length=4)
    with torch.no_grad():
        relevance = guide.relevance(
            inputs[names.GUIDE_INPUT_IDS], inputs[names.GUIDE_TOKEN_MAP], inputs[names.IMAGE_EMBEDS]
        )
        monkeypatch.setattr(guide, "threshold", float(relevance[1]))
        assert guide(inputs)[names.PROBE_WEIGHTS].tolist() == [[0, 0, 0, 1]]


# --- in the model ------------------------------------------------------------------------------------------


def guide_for(ids, seed=0):
    """A guide whose CLIP tokens each cover one text row."""
    num_text = len(ids) - 1 - int(np.flatnonzero(ids == 3)[-1])
    token_map = np.zeros((num_text, 77), dtype=np.float32)
    token_map[np.arange(num_text), np.arange(num_text)] = 1
    return GuideInputs(np.random.default_rng(seed).integers(0, 500, (1, 77)), token_map)


@pytest.mark.parametrize("text_selection", ["all", "clip"])
@pytest.mark.parametrize(("decoder_layers", "group_size"), [(4, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("num_images", [1, 2])
def test_probe_leaves_no_trace(
    llava_folder, clip_folder, text_selection, decoder_layers, group_size, num_images
):
    method = Ivtp(36, 36, decoder_layers, group_size, text_selection)
    pruned = load_checkpoint(
        llava_folder, methods=[method], clip=clip_folder if text_selection == "clip" else None
    )
    unpruned = load_checkpoint(llava_folder, methods=[])
    ids, pixels = random_prompt(num_images=num_images)
    guide = guide_for(ids) if text_selection == "clip" else None
    got, expected = pruned.prefill(ids, pixels, guide, record=True), unpruned.prefill(ids, pixels)
    ran = [stage.name for stage, _, _ in got.record]
    assert ran.count("gather") == len(layer_groups(decoder_layers, group_size))
    assert ("guide" in ran) == (text_selection == "clip")
    assert [site.kept for site in got.sites] == [36 * num_images] * ran.count("gather")
    for step in range(3):
        assert (got.logits - expected.logits).abs().max() <= 1e-5
        for layer in range(4):
            for ours, theirs in zip(got.caches[layer], expected.caches[layer], strict=True):
                assert ours.shape == theirs.shape
                assert (ours - theirs).abs().max() <= 1e-5
        for model, state in ((pruned, got), (unpruned, expected)):
            state.logits = model.decode(50 + step, state.next_position + step, state.caches)


def test_prompt_without_pictures_is_not_pruned(llava_folder, guided):
    ids, _ = random_prompt(num_images=0)
    got, expected = guided.prefill(ids), load_checkpoint(llava_folder).prefill(ids)
    assert got.sites == []
    assert (got.logits - expected.logits).abs().max() <= 1e-5


def test_the_instruction_decides(guided):
    # The guide's choice of rows changes the pseudo-CLS token, and with it the tokens that survive.
    ids, pixels = random_prompt(tokens_per_image=20)
    kept = {guided.prefill(ids, pixels, guide_for(ids, seed)).sites[-1].slots for seed in range(4)}
    assert len(kept) > 1
    assert all(len(slots) == 10 for slots in kept)


# --- parameters --------------------------------------------------------------------------------------------


def test_presets():
    assert method_from_parameters("ivtp", {"preset": "paper-64"}) == Ivtp(120, 64, 12, 3, "clip", 0.2)
    assert method_from_parameters("ivtp", {"preset": "no-text-tower"}).text_selection == "all"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tokens_after_decoder": 0}, "'tokens_after_decoder' is 0, expected 1 … 120 (tokens_after_vision)"),
        ({"tokens_after_decoder": 121}, "'tokens_after_decoder' is 121"),
        ({"group_size": 0}, "'group_size' and 'decoder_layers' must be at least 1"),
        ({"decoder_layers": 0}, "'group_size' and 'decoder_layers' must be at least 1"),
        ({"text_selection": "bert"}, "'text_selection' is 'bert', allowed: clip, all"),
        ({"relevance_threshold": float("nan")}, "'relevance_threshold' is nan"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError) as error:
        Ivtp(**parameters)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "changes", "message"),
    [
        ({}, {"has_class_token": False}, "no class token or no layers; use a decoder method"),
        (
            {"tokens_after_vision": 577},
            {},
            "'tokens_after_vision' is 577, but a picture has 576 visual tokens",
        ),
        ({"decoder_layers": 33}, {}, "'decoder_layers' is 33, but the decoder has 32 layers"),
        ({}, {"vision_layers": 0}, "no class token or no layers"),
    ],
)
def test_parameters_are_checked_against_the_model(parameters, changes, message):
    with pytest.raises(PruningError) as error:
        Ivtp(**parameters).check(ModelGeometry(**{**vars(LLAVA_7B), **changes}))
    assert message in str(error.value)
