"""FastV, VTW and AdaptPrune against their definitions in NumPy, and their parameters."""

import numpy as np
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import adaptprune_kept, highest, last_row_scores
from site_inputs import kept_rows, layout_of, random_site_inputs, site_of

from edgeprune import tensor_names as names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut
from edgeprune.prune.adaptprune import AdaptPrune, centre_weights, nearness_table
from edgeprune.prune.atp import grid_places
from edgeprune.prune.fastv import FastV
from edgeprune.prune.registry import method_from_parameters
from edgeprune.prune.vtw import Vtw

GRID = (6, 6)


def attention_of(inputs, layer):
    query, key = (inputs[name][0].double().numpy() for name in (names.query(layer), names.present_key(layer)))
    return last_row_scores(query, key)


def test_fastv_equals_the_definition(llava_folder):
    stage = site_of(llava_folder, FastV(layer=2, keep=7))
    compared = 0
    for seed in range(120):
        inputs = random_site_inputs(stage, seed)
        scores = attention_of(inputs, 1)
        visual = np.flatnonzero(inputs[names.VISUAL_SLOTS].numpy() >= 0)
        count = int(inputs[names.NUM_KEEP])
        expected = [int(visual[index]) for index in highest(scores[visual], count)]
        ranked = np.sort(scores[visual])[::-1]
        gap = ranked[count - 1] - ranked[count] if count < len(visual) else 1.0
        if 0 < gap < 1e-7:
            continue  # which of the two is higher is a matter of rounding
        compared += 1
        assert kept_rows(stage, inputs) == expected, seed
    assert compared > 100


def test_vtw_keeps_no_visual_token(llava_folder):
    stage = site_of(llava_folder, Vtw(layer=2))
    assert all(kept_rows(stage, random_site_inputs(stage, seed)) == [] for seed in range(12))


@pytest.mark.parametrize("key_source", ["upstream", "normed"])
def test_adaptprune_equals_the_definition(llava_folder, key_source):
    method = AdaptPrune(layer=2, keep=9, similarity_sigma=0.3, key_source=key_source)
    stage = site_of(llava_folder, method)
    weight = stage.selector.attention.k_proj.weight.detach().double().numpy()
    compared = 0
    for seed in range(90):
        inputs = random_site_inputs(stage, seed)
        hidden = inputs[names.out(names.HIDDEN_STATES)][0].double().numpy()
        if key_source == "normed":
            gain = stage.selector.norm.weight.detach().double().numpy()
            hidden = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-6) * gain
        slots = inputs[names.VISUAL_SLOTS].numpy()
        count = int(inputs[names.NUM_KEEP])
        expected, gap = adaptprune_kept(
            attention_of(inputs, 1), hidden @ weight.T, slots, GRID, count, method
        )
        if gap < 1e-5:
            continue
        compared += 1
        assert kept_rows(stage, inputs) == expected, seed
    assert compared > 40


def test_adaptprune_never_keeps_a_token_twice(llava_folder):
    """Upstream's loop has no exclusion: with all scores at zero it takes the first token again and again."""
    stage = site_of(llava_folder, AdaptPrune(layer=2, keep=12))
    inputs = random_site_inputs(stage, 0)
    visual = inputs[names.VISUAL_SLOTS] >= 0
    # All attention goes to the last text row: what is left for pictures underflows to zero.
    inputs[names.present_key(1)][:, :, visual] = 0
    inputs[names.present_key(1)][:, :, -1] = 1e3
    inputs[names.query(1)][:, :, -1] = 1
    assert not attention_of(inputs, 1)[visual.numpy()].any()
    assert len(kept_rows(stage, inputs)) == int(inputs[names.NUM_KEEP])


def test_adaptprune_does_not_suppress_across_pictures(llava_folder):
    stage = site_of(llava_folder, AdaptPrune(layer=2, keep=1))
    inputs = random_site_inputs(stage, 1)
    hidden = inputs[names.out(names.HIDDEN_STATES)]
    slots = torch.cat((torch.tensor([-1]), torch.arange(72), torch.tensor([-1])))
    inputs |= {
        names.VISUAL_SLOTS: slots,
        names.NUM_KEEP: torch.tensor(2),
        names.VISUAL_PLACES: torch.from_numpy(layout_of([GRID, GRID]).table),
        # All alike, all attended to alike: the second choice lies outside the first one's reach.
        names.out(names.HIDDEN_STATES): hidden[:, :1].expand(1, 74, -1).contiguous(),
        names.query(1): torch.zeros(1, 4, 74, 8),
        names.present_key(1): torch.zeros(1, 2, 74, 8),
    }
    first, second = sorted(slots[kept_rows(stage, inputs)].tolist())
    assert second == first + 36, "the same place in the other picture, not suppressed"


def test_adaptprune_tables():
    centre = centre_weights(grid_places((24, 24))).view(24, 24)
    assert centre.max() == 1
    assert torch.equal(centre, centre.flip(0, 1))
    # Upstream's mask: coordinates -12 … 12 in 24 steps, sigma 12.
    corner = np.exp(-(12**2 + 12**2) / (2 * 12**2)) / np.exp(-2 * (12 / 23) ** 2 / (2 * 12**2))
    assert centre[0, 0].item() == pytest.approx(corner, rel=1e-6)
    table = nearness_table(5.0, 1.5)
    assert len(table) == 27
    assert table[[0, 25, 26]].tolist() == pytest.approx([1, np.exp(-25 / 4.5), 0], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "kept", "layer"),
    [
        ("fastv", {"preset": "paper"}, 288, 2),
        ("fastv", {"preset": "demo"}, 144, 3),
        ("fastv", {"keep": 100}, 100, 2),
        ("adaptprune", {"preset": "paper"}, 57, 3),
        ("adaptprune", {"preset": "upstream"}, 57, 2),
        ("vtw", {"preset": "paper"}, 0, 15),
        ("vtw", {"preset": "dyrate-table"}, 0, 16),
    ],
)
def test_presets(name, parameters, kept, layer):
    (site,) = method_from_parameters(name, parameters).decoder_sites(LLAVA_7B)
    assert (site.keep_per_image, site.cut) == (kept, Cut(layer))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("fastv", {"keep_ratio": 0.0}, "'keep_ratio' is 0.0, allowed: above 0, up to 1"),
        ("fastv", {"keep_ratio": 1.5}, "'keep_ratio' is 1.5, allowed: above 0, up to 1"),
        ("adaptprune", {"keep": -1}, "'keep' is -1, allowed: 1 or more"),
        ("adaptprune", {"similarity_sigma": 0.0}, "'similarity_sigma' is 0.0, allowed: above 0"),
        ("adaptprune", {"key_source": "rope"}, "'key_source' is 'rope', allowed: upstream, normed"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(PruningError, match=f"{name}: ") as caught:
        method_from_parameters(name, parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", [FastV(layer=32), AdaptPrune(layer=0), Vtw(layer=40)])
def test_layers_are_checked(method):
    with pytest.raises(PruningError, match="this decoder allows layers 1 … 31"):
        method.check(LLAVA_7B)


@pytest.mark.parametrize("method", [FastV(keep=577), AdaptPrune(keep=577)])
def test_more_tokens_than_there_are(method):
    with pytest.raises(PruningError, match="'keep' is 577, but a picture has 576 visual tokens"):
        method.check(LLAVA_7B)
