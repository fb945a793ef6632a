import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_references import atp_reference, attention_logits, causal_softmax, sigmoid, spatial_table
from site_inputs import layout_of

from edgeprune import tensor_names as names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut
from edgeprune.prune.atp import Atp, AtpSelector, grid_places, normalise_scores, spatial_scores
from edgeprune.prune.method import ModelGeometry
from edgeprune.prune.registry import method_from_parameters

CLOSE = 1e-5
"""Rows whose score lies nearer to its threshold may fall on either side of it in float32."""


# --- inputs ------------------------------------------------------------------------------------------------


def geometry(grid, heads=4, head_dim=8):
    return ModelGeometry(
        num_layers=32,
        hidden_size=heads * head_dim,
        num_heads=heads,
        head_dim=head_dim,
        grid=grid,
        vision_layers=4,
        has_class_token=True,
    )


def random_heads(rng, num_patches, width, theta_r=0.1, theta_s=0.6, spread=1.0):
    """Threshold heads whose thresholds move with the scores."""
    return {
        "proj.weight": rng.standard_normal((width, 2 * num_patches)) / np.sqrt(2 * num_patches),
        "proj.bias": 0.1 * rng.standard_normal(width),
        "head_r.weight": spread * rng.standard_normal((1, width)),
        "head_r.bias": np.array([np.log(theta_r / (1 - theta_r))]),
        "head_s.weight": spread * rng.standard_normal((1, width)),
        "head_s.bias": np.array([np.log(theta_s / (1 - theta_s))]),
    }


def sequence_slots(rng, num_patches, num_images, num_text, keep_share):
    """Slots [S] of a prompt with pictures of which an earlier site has left some tokens."""
    slots = [-1] * 3
    for image in range(num_images):
        alive = np.flatnonzero(rng.random(num_patches) < keep_share)
        slots += [int(slot) + image * num_patches for slot in alive] + [-1]
    if max(slots) < 0:
        slots.append(int(rng.integers(num_patches)))
    return np.array(slots + [-1] * num_text, dtype=np.int64)


def floats(array):
    return torch.tensor(array).float()


def selector(method, grid, heads_of_site, num_heads=4, head_dim=8):
    model = geometry(grid, num_heads, head_dim)
    weights = {f"site0.{name}": torch.tensor(value).float() for name, value in heads_of_site.items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        name: shape for name, shape in method.weight_shapes(model).items() if name.startswith("site0.")
    }
    return method.selector(0, model, weights, None)


def run_selector(module: AtpSelector, query, key, slots, num_text, num_images):
    """Kept rows [S] bool."""
    layer, length = module.layer - 1, len(slots)
    keep_indices, keep_count = module(
        {
            names.query(layer): torch.tensor(query[None]).float(),
            names.present_key(layer): torch.tensor(key[None]).float(),
            names.VISUAL_SLOTS: torch.tensor(slots),
            names.TEXT_ROWS: torch.arange(length - num_text, length),
            names.GRID_IDS: torch.arange(num_images),
            names.VISUAL_PLACES: torch.from_numpy(layout_of([module.grid] * num_images).table),
        }
    )
    order = keep_indices.numpy()
    assert sorted(order) == list(range(length))
    assert list(order[:keep_count]) == sorted(order[:keep_count])
    kept = np.zeros(length, dtype=bool)
    kept[order[:keep_count]] = True
    return kept


# --- tests -------------------------------------------------------------------------------------------------


def test_selector_equals_the_definition():
    tally = {"rows": 0, "too close to call": 0}

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
        group=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
        num_images=st.integers(1, 3),
        num_text=st.integers(1, 5),
        keep_share=st.sampled_from([1.0, 0.6, 0.1]),
        norms=st.tuples(*[st.sampled_from(["none", "sigmoid", "minmax"])] * 2),
        spread=st.sampled_from([0.0, 1.0, 2.0]),
    )
    def check(seed, grid, group, num_images, num_text, keep_share, norms, spread):
        rng = np.random.default_rng(seed)
        num_patches = grid[0] * grid[1]
        method = Atp(layers=(2,), hidden_width=5, self_norm=norms[0], cross_norm=norms[1])
        heads = random_heads(rng, num_patches, 5, theta_r=rng.uniform(0.02, 0.6), spread=spread)
        slots = sequence_slots(rng, num_patches, num_images, num_text, keep_share)
        # What the module gets is float32; the reference sees the same numbers.
        heads = {name: value.astype(np.float32).astype(float) for name, value in heads.items()}
        query, key = (
            rng.standard_normal((heads_, len(slots), 8)).astype(np.float32).astype(float) for heads_ in group
        )
        module = selector(method, grid, heads, group[0])
        kept = run_selector(module, query, key, slots, num_text, num_images)
        expected, margin = atp_reference(method, grid, query, key, slots, num_text, num_images, heads)
        close = margin < CLOSE
        assert (kept == expected)[~close].all()
        tally["rows"] += len(slots)
        tally["too close to call"] += int(close.sum())

    check()
    assert tally["rows"] > 1000
    assert tally["too close to call"] < 0.005 * tally["rows"]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_scores_equal_explicit_attention_matrices(num_kv_heads):
    rng = np.random.default_rng(1)
    grid, num_text = (5, 7), 4
    slots = np.array([-1, -1, *range(35), -1, *range(35, 70), *[-1] * num_text])
    length = len(slots)
    query, key = rng.standard_normal((4, length, 8)), rng.standard_normal((num_kv_heads, length, 8))
    module = AtpSelector(Atp(layers=(1,), hidden_width=2), 1, geometry(grid))
    scores = module.scores(
        torch.tensor(query[None]).float(),
        torch.tensor(key[None]).float(),
        torch.tensor(slots),
        torch.arange(length - num_text, length),
        torch.arange(2),
        torch.from_numpy(layout_of([grid, grid]).table),
    )
    logits = attention_logits(query, key)
    probabilities = causal_softmax(logits)
    for image in range(2):
        rows = np.flatnonzero((slots >= 0) & (slots // 35 == image))
        # Columns are keys: what v_n receives from all visual queries of its picture, later and earlier ones.
        explicit = logits[:, rows[:, None], rows[None, :]].mean(axis=(0, 1))
        assert scores.self_score[rows].numpy() == pytest.approx(explicit, abs=1e-5)
        by_rows = logits[:, rows[:, None], rows[None, :]].mean(axis=(0, 2))
        assert abs(explicit - by_rows).max() > 0.1, "the test would not tell rows from columns"
        received = np.array(
            [np.mean([probabilities[:, t, n] for t in range(length - 4, length)]) for n in rows]
        )
        assert scores.cross_score[rows].numpy() == pytest.approx(received, abs=1e-6)
    text = slots < 0
    assert not scores.self_score[text].any()
    assert not scores.cross_score[text].any()
    assert not scores.spatial_score[text].any()
    assert torch.equal(scores.redundant_score, (scores.self_score + scores.cross_score) / 2)


@pytest.mark.parametrize(
    ("side", "table"),
    [
        # R = 144/576, 36/576, 9/576
        (24, {8: 1 - 3 / 64, 4: 1 - 3 / 16, 2: 0.25}),
        # ceil(12/8) = 2: R = 36/144, 9/144, 4/144
        (12, {8: 1 - 12 / 144, 4: 1 - 27 / 144, 2: 0.25}),
    ],
)
def test_spatial_scores_of_square_grids(side, table):
    scores = spatial_scores(grid_places((side, side)), (2, 4, 8), 3.0).view(side, side)
    for row in range(side):
        for column in range(side):
            expected = next((s for stride, s in table.items() if row % stride == column % stride == 0), 0.0)
            assert scores[row, column] == pytest.approx(expected)


def test_spatial_scores_of_a_ragged_grid():
    # 5×7, strides 2, 4, 8: R = 12/35, 4/35, 1/35; 1 - 36/35 is below zero and counts as not sampled.
    a, b = 1 - 3 / 35, 1 - 12 / 35
    expected = [[a, 0, 0, 0, b, 0, 0], [0] * 7, [0] * 7, [0] * 7, [b, 0, 0, 0, b, 0, 0]]
    assert spatial_scores(grid_places((5, 7)), (2, 4, 8), 3.0).view(5, 7).numpy() == pytest.approx(
        np.array(expected)
    )


@settings(max_examples=50, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    strides=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    scale=st.floats(0.1, 4),
)
def test_spatial_scores_equal_the_definition(grid, strides, scale):
    scores = spatial_scores(grid_places(grid), tuple(strides), scale).numpy()
    assert scores == pytest.approx(spatial_table(grid, strides, scale), abs=1e-6)


def test_normalisation_is_per_picture():
    scores = torch.tensor([9.0, -2.0, 0.0, 2.0, 5.0, 5.0, 7.0])
    members = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    assert normalise_scores(scores, members, "none").tolist() == [0, -2, 0, 2, 5, 5, 0]
    # Equal scores, and a picture without tokens, have no spread to divide by.
    assert normalise_scores(scores, members, "minmax").tolist() == [0, 0, 0.5, 1, 0, 0, 0]
    assert normalise_scores(scores, torch.zeros(1, 7, dtype=torch.bool), "minmax").tolist() == [0] * 7
    squashed = normalise_scores(scores, members, "sigmoid").numpy()
    assert squashed == pytest.approx([0, *sigmoid(np.array([-2, 0, 2, 5, 5])), 0], abs=1e-6)


def test_pruned_tokens_enter_the_heads_as_zeros():
    rng = np.random.default_rng(2)
    heads = random_heads(rng, 12, 5)
    module = selector(Atp(layers=(1,), hidden_width=5), (3, 4), heads)
    slots = np.array([-1, 0, 3, 11, 13, 14, -1])
    places = torch.from_numpy(layout_of([(3, 4), (3, 4)]).table)
    scores = module.scores(
        torch.randn(1, 4, 7, 8),
        torch.randn(1, 2, 7, 8),
        torch.tensor(slots),
        torch.tensor([6]),
        torch.arange(2),
        places,
    )
    theta_r, theta_s = module.thresholds(scores, torch.tensor(slots), torch.arange(2), places)
    for image in range(2):
        by_grid = np.zeros(24)
        for row, slot in enumerate(slots):
            if slot >= 0 and slot // 12 == image:
                by_grid[slot % 12] = scores.self_score[row]
                by_grid[12 + slot % 12] = scores.cross_score[row]
        z = heads["proj.weight"] @ by_grid + heads["proj.bias"]
        rows = np.flatnonzero((slots >= 0) & (slots // 12 == image))
        for theta, head in ((theta_r, "head_r"), (theta_s, "head_s")):
            expected = sigmoid(heads[f"{head}.weight"] @ z + heads[f"{head}.bias"])
            assert theta[rows].detach().numpy() == pytest.approx(np.repeat(expected, len(rows)), abs=1e-6)


def test_a_picture_does_not_depend_on_the_one_after_it_but_for_the_text():
    # S_self and S_spatial of a picture are its own; two pictures get two thresholds.
    rng = np.random.default_rng(3)
    module = selector(Atp(layers=(1,), hidden_width=5), (4, 4), random_heads(rng, 16, 5, spread=3))
    slots = torch.tensor([-1, *range(16), *range(16, 32), -1, -1])
    query, key = torch.randn(1, 4, 35, 8), torch.randn(1, 2, 35, 8)
    places = torch.from_numpy(layout_of([(4, 4), (4, 4)]).table)
    both = module.scores(query, key, slots, torch.tensor([33, 34]), torch.arange(2), places)
    alone = module.scores(
        query[:, :, :17], key[:, :, :17], slots[:17], torch.tensor([0]), torch.arange(1), places[:16]
    )
    assert torch.allclose(both.self_score[:17], alone.self_score, atol=1e-6)
    assert torch.equal(both.spatial_score[:17], alone.spatial_score)
    theta_r, theta_s = module.thresholds(both, slots, torch.arange(2), places)
    for theta in (theta_r, theta_s):
        assert theta[1:17].unique().numel() == theta[17:33].unique().numel() == 1
        assert theta[1] != theta[17]


@pytest.mark.parametrize("num_images", [1, 2])
def test_one_token_survives_thresholds_that_drop_all(num_images):
    rng = np.random.default_rng(4)
    heads = random_heads(rng, 16, 3, theta_r=1 - 1e-9, theta_s=1 - 1e-9, spread=0.0)
    module = selector(Atp(layers=(1,), hidden_width=3), (4, 4), heads)
    slots = np.array([-1, *range(16 * num_images), -1])
    query, key = 0.1 * rng.standard_normal((4, len(slots), 8)), 0.1 * rng.standard_normal((2, len(slots), 8))
    kept = run_selector(module, query, key, slots, 1, num_images)
    scores = module.scores(
        torch.tensor(query[None]).float(),
        torch.tensor(key[None]).float(),
        torch.tensor(slots),
        torch.tensor([len(slots) - 1]),
        torch.arange(num_images),
        torch.from_numpy(layout_of([(4, 4)] * num_images).table),
    )
    best = int(scores.redundant_score[1:-1].argmax()) + 1
    assert np.flatnonzero(kept).tolist() == [0, best, len(slots) - 1]


def test_thresholds_are_strict():
    # A zero head gives θ = 0.5 exactly, and stride 2 with λ = 2 scores 1 - 2/4 at the first patch.
    heads = {name: 0 * value for name, value in random_heads(np.random.default_rng(5), 4, 2).items()}
    module = selector(Atp(layers=(1,), hidden_width=2, strides=(2,), sample_scale=2.0), (2, 2), heads)
    slots = np.array([0, 1, 2, 3, -1])
    query, key = np.ones((4, 5, 8)), np.zeros((2, 5, 8))
    key[:, 2] = 0.01
    scores = module.scores(
        floats(query[None]),
        floats(key[None]),
        torch.tensor(slots),
        torch.tensor([4]),
        torch.arange(1),
        grid_places((2, 2)),
    )
    assert scores.spatial_score.tolist() == [0.5, 0, 0, 0, 0]
    assert scores.redundant_score.max() < 0.5
    # Nothing passes, so the third patch survives by its S_red.
    assert run_selector(module, query, key, slots, 1, 1).tolist() == [False, False, True, False, True]
    module.heads.head_s.bias.data.fill_(-1e-6)
    assert run_selector(module, query, key, slots, 1, 1).tolist() == [True, False, False, False, True]


def test_sites_and_weights():
    method = Atp(layers=(4, 14, 24))
    sites = method.decoder_sites(geometry((24, 24)))
    assert [site.cut for site in sites] == [Cut(4), Cut(14), Cut(24)]
    assert sites[1].reads == ("query.13", "present.13.key")
    assert all(site.keep_per_image is None for site in sites)
    shapes = method.weight_shapes(geometry((24, 24)))
    # 295,682 weights per site on LLaVA-1.5's grid, and one more bias: the heads are two.
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 3 * 295_682
    assert shapes["site2.proj.weight"] == (256, 1152)


@pytest.mark.parametrize(("preset", "layers"), [("paper-144", (4, 14, 24)), ("paper-88", (1, 13, 25))])
def test_presets(preset, layers):
    method = method_from_parameters("atp", {"preset": preset})
    assert method == Atp(layers=layers, sample_scale=3.0, strides=(2, 4, 8), hidden_width=256)
    method.check(geometry((24, 24)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layers": ()}, "'layers' is empty"),
        ({"strides": ()}, "'strides' is []"),
        ({"strides": (2, 0)}, "'strides' is [2, 0]: give at least one stride of 1 or more"),
        ({"hidden_width": 0}, "'hidden_width' must be at least 1"),
        ({"sample_scale": 0.0}, "'sample_scale' positive"),
        ({"sample_scale": float("nan")}, "'sample_scale' positive"),
        ({"self_norm": "softmax"}, "'self_norm' is 'softmax', allowed: none, sigmoid, minmax"),
        ({"cross_norm": ""}, "'cross_norm' is '', allowed: none, sigmoid, minmax"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError) as error:
        Atp(**parameters)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0,), "before layer 0 is out of range: this decoder allows layers 1 … 31"),
        ((4, 32), "before layer 32 is out of range"),
        ((14, 4), "layers [14, 4] are out of order"),
        ((4, 4), "layers [4, 4] are out of order: list them increasing, each once"),
    ],
)
def test_layers_are_checked_against_the_model(layers, message):
    with pytest.raises(PruningError) as error:
        Atp(layers=layers).check(geometry((24, 24)))
    assert message in str(error.value)
