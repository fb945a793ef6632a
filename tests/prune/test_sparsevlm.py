"""SparseVLM against its definition in NumPy: raters, scores, clusters, the places of merged tokens."""

import numpy as np
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import attention_logits, causal_softmax, softmax
from site_inputs import random_site_inputs
from tiny_checkpoints import random_prompt

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.fastv import FastV
from edgeprune.prune.registry import method_from_parameters
from edgeprune.prune.sparsevlm import SparseVlm, cluster_and_merge, rank_budget, rater_weights, recycling


def clusters_by_hand(tokens, count):
    """Centres, and the members of each, of DPC-kNN; and the smallest margin of any decision."""
    size = len(tokens)
    distance = np.array([[np.linalg.norm(a - b) for b in tokens] for a in tokens]) / np.sqrt(tokens.shape[1])
    density = np.array([np.exp(-(np.sort(row)[:count] ** 2).mean()) for row in distance])
    reach = np.zeros(size)
    for i in range(size):
        above = [distance[i, j] for j in range(size) if (density[j], -j) > (density[i], -i)]
        reach[i] = min(above) if above else distance.max()
    product = reach * density
    ranked = sorted(range(size), key=lambda i: (-product[i], i))
    margin = product[ranked[count - 1]] - product[ranked[count]] if count < size else 1.0
    centres = ranked[:count]
    members = {centre: [centre] for centre in centres}
    for i in range(size):
        if i not in centres:
            nearest = sorted(distance[i, centre] for centre in centres)
            margin = min(margin, nearest[1] - nearest[0]) if count > 1 else margin
            members[min(centres, key=lambda centre: distance[i, centre])].append(i)
    return centres, members, margin


@pytest.mark.parametrize("count", [1, 3, 6])
def test_clusters(count):
    compared = 0
    for seed in range(30):
        tokens = np.random.default_rng(seed).standard_normal((14, 5)) * 2
        centres, members, margin = clusters_by_hand(tokens, count)
        if 0 < margin < 1e-5:
            continue
        compared += 1
        merged, found = cluster_and_merge(torch.tensor(tokens).float(), torch.arange(count))
        assert found.tolist() == centres
        means = np.array([tokens[members[centre]].mean(axis=0) for centre in centres])
        np.testing.assert_allclose(merged.numpy(), means, atol=1e-5)
    assert compared > 20


def test_raters():
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((11, 6))
    visual = np.array([0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0], dtype=bool)
    text = embeds[7:]
    share = softmax(embeds[visual] @ text.T).mean(axis=0)
    rater = share > share.mean()
    weights = rater_weights(*(torch.tensor(value).float() for value in (embeds, visual, text)))
    np.testing.assert_allclose(weights.numpy(), rater / rater.sum(), atol=1e-7)
    assert 0 < rater.sum() < 4
    # All alike: nobody is above the average, so everybody rates.
    alike = rater_weights(torch.ones(5, 2), torch.ones(5, dtype=torch.bool), torch.ones(3, 2))
    assert alike.tolist() == pytest.approx([1 / 3] * 3)


def test_site_equals_the_definition(llava_folder):
    model = load_checkpoint(llava_folder, methods=[SparseVlm(layers=(1,), keep=(11,))])
    stage = model.selects[0]
    recycled, merged = recycling(36 - 11)
    compared = 0
    for seed in range(48):
        inputs = random_site_inputs(stage, seed)
        slots = inputs[names.VISUAL_SLOTS].numpy()
        query, key, hidden, embeds = (
            inputs[name][0].double().numpy()
            for name in (
                names.query(1),
                names.present_key(1),
                names.out(names.HIDDEN_STATES),
                names.INPUTS_EMBEDS,
            )
        )
        num_images, num_text = int(inputs[names.NUM_KEEP]) // 11, len(inputs[names.TEXT_ROWS])
        share = softmax(embeds[inputs[names.PROMPT_SLOTS].numpy() >= 0] @ embeds[-num_text:].T).mean(axis=0)
        rater = share > share.mean() if (share > share.mean()).any() else np.ones(num_text, dtype=bool)
        attention = causal_softmax(attention_logits(query, key))[:, -num_text:].mean(axis=0)
        scores = attention[rater].mean(axis=0)
        visual = np.flatnonzero(slots >= 0)
        ranked = sorted(visual, key=lambda row: (-scores[row], row))
        gaps = -np.diff([scores[row] for row in ranked])
        kept = sorted(ranked[: 11 * num_images])
        pool = [row for row in ranked if row not in kept][: recycled * num_images]
        centres, members, margin = clusters_by_hand(hidden[pool], merged * num_images)
        if min([margin, *gaps[gaps > 0]]) < 1e-6:
            continue
        compared += 1
        with torch.no_grad():
            outputs = stage(inputs)
        rows = outputs[names.KEEP_INDICES][: int(outputs[names.KEEP_COUNT])].tolist()
        first_text = len(slots) - num_text
        before = [row for row in range(first_text) if row in kept or slots[row] < 0]
        new = list(range(len(slots), len(slots) + merged * num_images))
        assert rows == [*before, *new, *range(first_text, len(slots))], seed
        means = np.array([hidden[[pool[i] for i in members[centre]]].mean(axis=0) for centre in centres])
        extended = outputs[names.extended(names.HIDDEN_STATES)][0].numpy()
        np.testing.assert_allclose(extended[new], means, atol=1e-4)
        np.testing.assert_array_equal(
            extended[: len(slots)], inputs[names.out(names.HIDDEN_STATES)][0].numpy()
        )
        assert outputs[names.extended(names.VISUAL_SLOTS)][new].tolist() == [
            slots[pool[centre]] for centre in centres
        ]
    assert compared > 24


def test_counts_are_those_of_the_authors_counter():
    sites = method_from_parameters("sparsevlm", {"preset": "192"}).decoder_sites(LLAVA_7B)
    assert [(site.cut.layer, site.keep_per_image) for site in sites] == [(3, 309), (7, 204), (16, 113)]
    for preset, average in (("192", 192.0), ("128", 128.6), ("64", 64.8)):
        a, b, c = (
            site.keep_per_image
            for site in method_from_parameters("sparsevlm", {"preset": preset}).decoder_sites(LLAVA_7B)
        )
        # Their counter records the tokens after each layer's pruning: 2, 4, 9 and 17 layers.
        assert (2 * 576 + 4 * a + 9 * b + 17 * c) / 32 == pytest.approx(average, abs=0.05)


@pytest.mark.parametrize("positions", ["original", "upstream"])
def test_positions(llava_folder, positions):
    method = SparseVlm(layers=(0, 2), keep=(20, 9), positions=positions)
    model = load_checkpoint(llava_folder, methods=[method])
    ids, pixels = random_prompt(num_images=1)
    prefill = model.prefill(ids, pixels)
    lengths = [prefill.caches[layer][0].shape[2] for layer in range(4)]
    text = len(ids) - 36
    assert lengths == [36 + text, 21 + text, 21 + text, 10 + text]
    record = []
    model.decode(5, prefill.next_position, prefill.caches, record)
    found = [int(i[names.POSITION_IDS]) for stage, i, _ in record if stage.name.startswith("segment")]
    assert found == [len(ids)] * 3 if positions == "original" else [len(ids), 21 + text, 10 + text]


def test_rank_budget():
    rng = np.random.default_rng(0)
    attention = torch.tensor(rng.random((4, 50))).float()
    assert rank_budget(attention, 576) == 54  # 13.5 a rater
    attention[3] = attention[0] + attention[1]
    assert rank_budget(attention, 576) == 40
    assert rank_budget(attention, 30) == 29


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layers": [2]}, "1 'layers' and 3 'keep': give one count for each layer"),
        ({"keep": [3, 2, 0]}, "'keep' is [3, 2, 0], allowed: 1 or more each"),
        ({"positions": "none"}, "'positions' is 'none', allowed: original, upstream"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError) as caught:
        method_from_parameters("sparsevlm", parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([SparseVlm(layers=(0,), keep=(36,))], "36 of 36 would drop nothing; give smaller counts"),
        (
            [SparseVlm(layers=(0, 1, 3), keep=(9, 6, 3))],
            "behind layer 3 is out of range: this decoder allows layers 0 … 2",
        ),
        ([SparseVlm(layers=(1, 0), keep=(9, 6))], "layers [1, 0] are out of order"),
        (
            [FastV(layer=1, keep=12), SparseVlm(layers=(2,), keep=(10,))],
            "needs 18 visual tokens of a picture",
        ),
    ],
)
def test_models_that_do_not_fit(llava_folder, methods, message):
    with pytest.raises(PruningError) as caught:
        load_checkpoint(llava_folder, methods=methods)
    assert message in str(caught.value)
