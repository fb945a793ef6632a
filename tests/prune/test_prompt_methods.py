"""CDPruner and DART, which prune the embedded prompt, against their definitions in NumPy, and their parameters."""

import numpy as np
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import cdpruner_kept, dart_kept
from site_inputs import kept_rows, layout_of, random_site_inputs, site_of

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut
from edgeprune.numbering import ORIGINAL, RENUMBERED
from edgeprune.prune.cdpruner import CdPruner, conditional_kernel
from edgeprune.prune.dart import Dart
from edgeprune.prune.registry import method_from_parameters

HIDDEN = names.out(names.HIDDEN_STATES)
GRIDS = ((6, 6), (3, 8), (1, 5))


def is_short(slots, grid, keep):
    """Whether a picture has lost more tokens than its budget leaves: others take its place, see below."""
    pictures = slots.max() // (grid[0] * grid[1]) + 1
    present = slots[slots >= 0] // (grid[0] * grid[1])
    return len(present) > keep and np.bincount(present, minlength=pictures).min() < min(
        keep, grid[0] * grid[1]
    )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "method",
    [
        CdPruner(keep=9),
        CdPruner(keep=4, relevance_weight=0.0),
        CdPruner(keep=5, relevance_weight=1.0, negative_relevance=True),
        CdPruner(keep=9, weighting="exponential"),
        CdPruner(keep=10, weighting="exponential", halves=False, relevance_weight=0.3),
    ],
)
def test_cdpruner_equals_the_definition(llava_folder, method, grid):
    stage, compared = site_of(llava_folder, method), 0
    for seed in range(48):
        inputs = random_site_inputs(stage, seed, grid=grid)
        embeds, slots = inputs[HIDDEN][0].double().numpy(), inputs[names.VISUAL_SLOTS].numpy()
        if is_short(slots, grid, method.keep):
            continue
        expected, clear = cdpruner_kept(embeds, slots, grid[0] * grid[1], method.keep, method)
        if clear < 1e-4:
            continue
        compared += 1
        assert kept_rows(stage, inputs) == expected, seed
    assert compared > 20


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "method",
    [
        Dart(keep=11),
        Dart(keep=4),
        Dart(keep=3, image_pivots=5),
        Dart(keep=14, image_pivots=0, text_pivots=3),
        Dart(keep=14, image_pivots=2, text_pivots=0),
        Dart(layer=2, keep=11),
    ],
)
def test_dart_equals_the_definition(llava_folder, method, grid):
    stage, compared = site_of(llava_folder, method), 0
    for seed in range(48):
        inputs = random_site_inputs(stage, seed, grid=grid)
        features, slots = inputs[HIDDEN][0].double().numpy(), inputs[names.VISUAL_SLOTS].numpy()
        norms, first_text = abs(features).sum(axis=1), 0
        if method.layer:
            key = inputs[names.present_key(1)][0].double().numpy()
            norms, first_text = abs(key).sum(axis=(0, 2)), int(inputs[names.TEXT_ROWS][0])
            gain = stage.selector.norm.weight.detach().double().numpy()
            features = features / np.sqrt((features**2).mean(axis=1, keepdims=True) + 1e-6) * gain
        if is_short(slots, grid, method.keep):
            continue
        expected, clear = dart_kept(
            norms, features, slots, grid[0] * grid[1], method.keep, first_text, method
        )
        if clear < 3e-5:
            continue
        compared += 1
        assert kept_rows(stage, inputs) == expected, seed
    assert compared > 20


@pytest.mark.parametrize("method", [Dart(keep=20), CdPruner(keep=20), CdPruner(keep=20, halves=False)])
def test_budgets_are_met_where_a_picture_is_short_of_tokens(llava_folder, method):
    stage, short = site_of(llava_folder, method), 0
    for seed in range(1, 120, 6):
        inputs = random_site_inputs(stage, seed)
        visual = int((inputs[names.VISUAL_SLOTS] >= 0).sum())
        num_keep = int(inputs[names.NUM_KEEP])
        assert len(kept_rows(stage, inputs)) == min(visual, num_keep)
        short += num_keep < visual
    assert short > 2


@pytest.mark.parametrize("method", [CdPruner(keep=9), CdPruner(keep=9, halves=False), Dart(keep=9)])
def test_pictures_are_pruned_apart(llava_folder, method):
    """Two pictures keep what each would keep with the same text and no other picture."""
    stage = site_of(llava_folder, method)
    rng = np.random.default_rng(0)
    embeds = torch.from_numpy(rng.standard_normal((1, 4 + 72, 48))).float()
    slots = torch.tensor([-1, -1, *range(72), -1, -1])

    def kept(rows, pictures):
        inputs = {
            HIDDEN: embeds[:, rows],
            names.VISUAL_SLOTS: torch.where(slots[rows] >= 0, slots[rows] - 36 * (pictures == [1]), -1),
            names.GRID_IDS: torch.arange(len(pictures)),
            names.GRID_KEEP: torch.full((len(pictures),), 9),
            names.VISUAL_PLACES: torch.from_numpy(layout_of([(6, 6)] * len(pictures)).table),
            names.NUM_KEEP: torch.tensor(9 * len(pictures)),
        }
        return {int(rows[row]) for row in kept_rows(stage, inputs)}

    rows = torch.arange(76)
    first, second = rows[(slots < 36)], rows[(slots < 0) | (slots >= 36)]
    together = kept(rows, [0, 1])
    assert together == kept(first, [0]) | kept(second, [1])
    assert len(together) == 18


@pytest.mark.parametrize(
    "method", [CdPruner(keep=11), CdPruner(keep=7, weighting="exponential"), Dart(keep=7)]
)
def test_equal_tokens_are_kept_by_index(llava_folder, method):
    stage = site_of(llava_folder, method)
    inputs = random_site_inputs(stage, 0)
    visual = np.flatnonzero(inputs[names.VISUAL_SLOTS].numpy() >= 0)
    inputs[HIDDEN][0, visual] = inputs[HIDDEN][0, visual[0]].clone()
    slots = inputs[names.VISUAL_SLOTS].numpy()
    expected = []
    for picture in range(len(inputs[names.GRID_IDS])):
        rows = visual[slots[visual] // 36 == picture]
        first = method.keep // 2 if isinstance(method, CdPruner) else method.keep
        expected += [*rows[:first], *rows[18 : 18 + method.keep - first]]
    assert kept_rows(stage, inputs) == expected


def test_cdpruner_of_a_picture_of_zeros_keeps_its_number(llava_folder):
    stage = site_of(llava_folder, CdPruner(keep=12))
    inputs = random_site_inputs(stage, 0)
    inputs[HIDDEN][:] = 0
    assert len(kept_rows(stage, inputs)) == int(inputs[names.NUM_KEEP])


def test_cdpruner_weighs_difference_against_relevance():
    """Two tokens are like the text and each other, one is unlike both."""
    embeds = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.12], [-1.0, 1.0]])
    visual = torch.tensor([False, True, True, True])

    def diagonal(weight, weighting="blended", negative=False):
        kernel = conditional_kernel(
            embeds,
            visual,
            torch.zeros(4, dtype=torch.int64),
            relevance_weight=weight,
            weighting=weighting,
            negative_relevance=negative,
        )
        return kernel.diagonal()[1:].tolist()

    assert diagonal(0.0) == pytest.approx([1, 1, 1], abs=1e-5)
    assert diagonal(1.0) == pytest.approx([1, 1, 0], abs=2e-2)
    assert diagonal(0.5) == pytest.approx([1, 1, 0.5], abs=2e-2)
    assert diagonal(0.5, negative=True) == pytest.approx([0.5, 0.5, 1], abs=2e-2)
    # α = ½ at w = ½: exp(2α(r - 1)) is 1 at r = 1 and e⁻¹ at r = 0.
    assert diagonal(0.5, "exponential") == pytest.approx([1, 1, np.exp(-1)], abs=2e-2)


@pytest.mark.parametrize(
    ("name", "parameters", "kept", "layer", "positions"),
    [
        ("cdpruner", {"preset": "openvino"}, 173, 0, RENUMBERED),
        ("cdpruner", {"preset": "openvino-clip"}, 173, 0, RENUMBERED),
        # OpenVINO GenAI keeps round(576 · 0.25 = 144), round(576 · 0.63 = 362.88), round(576 · 0.7 = 403.2).
        ("cdpruner", {"keep_ratio": 0.25}, 144, 0, ORIGINAL),
        ("cdpruner", {"keep_ratio": 0.63}, 363, 0, ORIGINAL),
        ("cdpruner", {"keep_ratio": 0.0001}, 1, 0, ORIGINAL),
        ("cdpruner", {"keep": 100}, 100, 0, ORIGINAL),
        ("dart", {"preset": "edge-llm"}, 432, 0, ORIGINAL),
        ("dart", {"preset": "paper"}, 128, 2, ORIGINAL),
        ("dart", {"keep": 100}, 100, 0, ORIGINAL),
    ],
)
def test_presets(name, parameters, kept, layer, positions):
    (site,) = method_from_parameters(name, parameters).decoder_sites(LLAVA_7B)
    assert (site.keep_per_image, site.cut, site.positions) == (kept, Cut(layer), positions)


def test_openvinos_presets_differ_in_the_sign():
    openvino, clip = (
        method_from_parameters("cdpruner", {"preset": p}) for p in ("openvino", "openvino-clip")
    )
    assert (openvino.negative_relevance, clip.negative_relevance) == (False, True)
    assert (openvino.relevance_weight, openvino.weighting, openvino.halves) == (0.5, "blended", True)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cdpruner", {"keep_ratio": 0.0}, "'keep_ratio' is 0.0, allowed: above 0, up to 1"),
        ("cdpruner", {"relevance_weight": 1.5}, "'relevance_weight' is 1.5, allowed: 0 to 1"),
        ("cdpruner", {"weighting": "exp"}, "'weighting' is 'exp', allowed: blended, exponential"),
        ("cdpruner", {"positions": "new"}, "'positions' is 'new', allowed: original, upstream"),
        ("dart", {"keep": -1}, "'keep' is -1, allowed: 1 or more"),
        ("dart", {"image_pivots": -1}, "'image_pivots' is -1, allowed: 0 or more"),
        ("dart", {"image_pivots": 0, "text_pivots": 0}, "are both 0: give at least one pivot"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(PruningError, match=f"{name}: ") as caught:
        method_from_parameters(name, parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize("layer", [-1, 32])
def test_layers_are_checked(layer):
    with pytest.raises(PruningError, match=f"dart: 'layer' is {layer}, allowed: 0 … 31"):
        Dart(layer=layer).check(LLAVA_7B)


@pytest.mark.parametrize("method", [CdPruner(keep=577), Dart(keep=577)])
def test_more_tokens_than_there_are(method):
    with pytest.raises(PruningError, match="'keep' is 577, but a picture has 576 visual tokens"):
        method.check(LLAVA_7B)


def test_two_methods_on_the_embedded_prompt_are_refused(llava_folder):
    with pytest.raises(PruningError, match="sites out of order: before layer 0 follows before layer 0"):
        load_checkpoint(llava_folder, methods=[CdPruner(keep=20), Dart(keep=10)])
