"""What prunes between vision tower and projector, against definitions in NumPy that share no code with it."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import softmax
from tiny_checkpoints import TinyLlava, build_llava

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.export.trace import trace_stage
from edgeprune.prune.method import ModelGeometry
from edgeprune.prune.prumerge import PruMerge, highest, stands_out
from edgeprune.prune.prumerge_plus import PruMergePlus, sampled_beside
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.prune.registry import method_from_parameters
from edgeprune.prune.spatial_pooling import SpatialPooling
from edgeprune.prune.topk import TopK
from edgeprune.prune.visionzip import VisionZip

GRID, PATCHES = (6, 6), 36


def pictures(seed, count=None):
    """Noise of many kinds: each picture with its own contrast, some of them flat, some with equal patches."""
    rng = np.random.default_rng(seed)
    count = 1 + seed % 3 if count is None else count
    pixels = rng.standard_normal((count, 3, 24, 24)) * rng.uniform(0.1, 4, (count, 1, 1, 1))
    if seed % 5 == 3:
        pixels[0] = pixels[0, :, :1, :1]
    if seed % 5 == 4:
        pixels[0, :, 4:] = np.tile(pixels[0, :, :4], (1, 5, 1))
    return torch.from_numpy(pixels.astype(np.float32))


class Tower:
    """What the definitions need of a checkpoint's tower, in float64."""

    def __init__(self, folder):
        self.tower = load_checkpoint(folder).model.vision_tower
        self.last = len(self.tower.encoder.layers) - 1

    def run(self, pixels):
        """Hidden states [M, 1 + N, C] behind all layers but the last, and the attention block of the last that ran."""
        with torch.no_grad():
            out = self.tower(pixels, num_feature_layers=self.last)
        return out.hidden.double().numpy(), out.attention

    def last_layer(self, hidden):
        """Query of the class token [C] and keys [1 + N, C] of the last layer, for one picture."""
        layer = self.tower.encoder.layer(self.last)
        weights = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
        mean, variance = hidden.mean(-1, keepdims=True), hidden.var(-1, keepdims=True)
        normed = (hidden - mean) / np.sqrt(variance + layer.layer_norm1.eps)
        normed = normed * weights["layer_norm1.weight"] + weights["layer_norm1.bias"]
        query, key = (
            normed @ weights[f"self_attn.{name}.weight"].T + weights[f"self_attn.{name}.bias"]
            for name in ("q_proj", "k_proj")
        )
        return query[0], key


@pytest.fixture(scope="module")
def tower(llava_folder):
    return Tower(llava_folder)


def run_vision(folder, method, pixels):
    """Features and slots of every picture, as the vision stage leaves them."""
    stage = load_checkpoint(folder, methods=[method]).vision
    with torch.no_grad():
        out = stage({"pixel_values": pixels})
    count, size = pixels.shape[0], out["patch_slots"].shape[0] // pixels.shape[0]
    features = out["patch_features"].view(count, size, -1).double().numpy()
    slots = out["patch_slots"].view(count, size).numpy() - PATCHES * np.arange(count)[:, None]
    counts = out["patch_counts"].tolist() if "patch_counts" in out else [size] * count
    return [(features[i, :n], slots[i, :n].tolist()) for i, n in enumerate(counts)]


def nearest_others(keys, index, neighbours):
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    cosine = unit @ unit[index]
    others = [other for other in range(len(keys)) if other != index]
    return sorted(others, key=lambda other: (-cosine[other], other))[:neighbours]


def prumerge_reference(hidden, query, key, neighbours, plus, fixed=None):
    """Tokens and slots of one picture; None where a score is too close to its threshold to call."""
    attention = softmax(key @ query / np.sqrt(len(query)))[1:]
    keys, patches = key[1:], hidden[1:]
    low, high = np.percentile(attention, [25, 75])
    threshold = high + 1.5 * (high - low)
    if np.min(np.abs(attention - threshold)) < 1e-6:
        return None
    kept = {index for index in range(PATCHES) if attention[index] > threshold} or {int(attention.argmax())}
    if fixed is not None:
        kept = set(sorted(range(PATCHES), key=lambda index: (-attention[index], index))[:fixed])
    if plus:
        step = max(1, int(int(PATCHES / len(kept)) / 3))
        kept |= set(range(0, PATCHES - 1, step))
    tokens = []
    for index in sorted(kept):
        near = nearest_others(keys, index, neighbours)
        tokens.append(patches[index] + sum(attention[other] * patches[other] for other in near))
    slots = sorted(kept)
    dropped = [index for index in range(PATCHES) if index not in kept]
    if dropped:
        tokens.append(sum(attention[index] * patches[index] for index in dropped))
        slots.append(max(dropped, key=lambda index: (attention[index], -index)))
    return np.array(tokens), slots


@pytest.mark.parametrize(
    ("method", "plus", "fixed"),
    [
        (PruMerge(neighbours=4), False, None),
        (PruMerge(neighbours=32, keep_ratio=0.25), False, 9),
        (PruMergePlus(neighbours=5), True, None),
        (PruMergePlus(neighbours=5, keep_ratio=0.1), True, 3),
    ],
    ids=["prumerge", "prumerge, fixed", "prumerge-plus", "prumerge-plus, fixed"],
)
def test_prumerge_equals_the_definition(llava_folder, tower, method, plus, fixed):
    compared, sizes = 0, set()
    for seed in range(30):
        pixels = pictures(seed)
        hidden, _ = tower.run(pixels)
        for image, (features, slots) in enumerate(run_vision(llava_folder, method, pixels)):
            query, key = tower.last_layer(hidden[image])
            expected = prumerge_reference(hidden[image], query, key, method.neighbours, plus, fixed)
            # Flat pictures and equal patches tie in exact arithmetic only.
            if expected is None or seed % 5 in (3, 4):
                continue
            compared += 1
            sizes.add(len(slots))
            assert slots == expected[1]
            np.testing.assert_allclose(features, expected[0], atol=2e-4)
    assert compared > 25
    assert len(sizes) > 1 or fixed is not None


def test_standing_out_is_above_the_quartiles():
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 36, 577):
        scores = rng.exponential(size=(4, size)).astype(np.float32) ** 3
        low, high = np.percentile(scores, [25, 75], axis=1, keepdims=True)
        expected = scores > high + 1.5 * (high - low)
        expected[np.arange(4), scores.argmax(axis=1)] = True
        assert np.array_equal(stands_out(torch.from_numpy(scores)).numpy(), expected)


def test_nothing_stands_out_of_equal_scores():
    assert stands_out(torch.ones(2, 9)).sum(dim=1).tolist() == [1, 1]
    assert highest(torch.ones(2, 9), 3)[0].tolist() == [True] * 3 + [False] * 6


@pytest.mark.parametrize(("count", "tokens"), [(32, 129), (36, 152)])
def test_sample_counts_of_prumerge_plus(count, tokens):
    """Where no sample coincides with what stands out: the numbers that the authors' code gives for 576 patches."""
    step = 576 // count // 3
    free = [index for index in range(576) if index % step][:count]
    chosen = torch.zeros(1, 576, dtype=torch.bool)
    chosen[0, free] = True
    assert int((chosen | sampled_beside(chosen)).sum()) + 1 == tokens


def test_prumerge_plus_samples_everything_where_the_step_would_be_zero():
    chosen = torch.zeros(1, 12, dtype=torch.bool)
    chosen[0, :6] = True
    assert sampled_beside(chosen)[0].tolist() == [True] * 11 + [False]


def visionzip_reference(hidden, attention, image, dominant, contextual):
    query, key = (tensor[image].double().numpy() for tensor in (attention.query[:, :, 0], attention.key))
    scores = sum(softmax(key[head] @ query[head] / np.sqrt(key.shape[-1]))[1:] for head in range(len(key)))
    ranked = sorted(range(PATCHES), key=lambda index: (-scores[index], index))
    kept, rest = sorted(ranked[: dominant - 1]), sorted(ranked[dominant - 1 :])
    metric = key.mean(axis=0)[1:]
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    groups = {target: [] for target in targets}
    for index in rest:
        if index not in targets:
            groups[max(targets, key=lambda target: (unit[index] @ unit[target], -target))].append(index)
    patches = hidden[1:]
    merged = [
        patches[target] + (np.mean(patches[group], axis=0) if group else 0)
        for target, group in groups.items()
    ]
    free = [index for index in rest if index not in targets]
    place = max(free, key=lambda index: (scores[index], -index))
    return np.array([hidden[0], *patches[kept], *merged]), [place, *kept, *targets]


@pytest.mark.parametrize(("dominant", "contextual"), [(10, 5), (1, 3), (20, 16)])
def test_visionzip_equals_the_definition(llava_folder, tower, dominant, contextual):
    method = VisionZip(dominant=dominant, contextual=contextual)
    for seed in range(0, 30, 3):
        if seed % 5 in (3, 4):
            continue
        pixels = pictures(seed)
        hidden, attention = tower.run(pixels)
        for image, (features, slots) in enumerate(run_vision(llava_folder, method, pixels)):
            expected = visionzip_reference(hidden[image], attention, image, dominant, contextual)
            assert slots == expected[1]
            assert len(set(slots)) == dominant + contextual
            np.testing.assert_allclose(features, expected[0], atol=2e-4)


def test_topk_behind_the_tower_equals_the_definition(llava_folder, tower):
    for seed in (0, 1, 2, 5, 6):
        pixels = pictures(seed)
        hidden, _ = tower.run(pixels)
        for image, (features, slots) in enumerate(
            run_vision(llava_folder, TopK(keep=7, at="projector"), pixels)
        ):
            unit = hidden[image] / np.linalg.norm(hidden[image], axis=1, keepdims=True)
            cosine = unit[1:] @ unit[0]
            expected = sorted(sorted(range(PATCHES), key=lambda index: (-cosine[index], index))[:7])
            assert slots == expected
            np.testing.assert_allclose(features, hidden[image][1:][expected], atol=1e-5)


def test_topk_in_the_tower_drops_a_few_in_every_layer(llava_folder, tower):
    method = TopK(keep=9, at="vit")
    pixels = pictures(1)
    for image, (features, slots) in enumerate(run_vision(llava_folder, method, pixels)):
        alive = list(range(PATCHES))
        with torch.no_grad():
            embedded = tower.tower.pre_layrnorm(tower.tower.embeddings(pixels[image : image + 1]))
            for layer, count in enumerate((27, 18, 9)):
                block = tower.tower.encoder.layer(layer)
                embedded = block.attention(embedded).hidden
                unit = torch.nn.functional.normalize(embedded[0], dim=-1)
                cosine = (unit[1:] @ unit[0]).tolist()
                best = sorted(sorted(range(len(alive)), key=lambda i: (-cosine[i], i))[:count])
                alive = [alive[index] for index in best]
                embedded = block.feed_forward(embedded[:, [0, *(index + 1 for index in best)]])
        assert slots == alive
        np.testing.assert_allclose(features, embedded[0, 1:].numpy(), atol=1e-4)


def test_random_in_the_tower_ends_with_the_choice_behind_it(llava_folder):
    pixels = pictures(2)
    behind = run_vision(llava_folder, RandomTokens(keep=9, seed=4), pixels)
    inside = run_vision(llava_folder, RandomTokens(keep=9, seed=4, at="vit"), pixels)
    for (features, slots), (other_features, other_slots) in zip(behind, inside, strict=True):
        assert slots == other_slots
        assert np.abs(features - other_features).max() > 0.1, "fewer tokens are attended to in the tower"


@pytest.mark.parametrize("pooled", [(3, 3), (2, 6), (4, 5), (6, 6), (1, 1)])
def test_spatial_pooling_is_adaptive_average_pooling(llava_folder, tower, pooled):
    pixels = pictures(0, count=2)
    hidden, _ = tower.run(pixels)
    method = SpatialPooling(rows=pooled[0], columns=pooled[1])
    for image, (features, slots) in enumerate(run_vision(llava_folder, method, pixels)):
        grid = torch.from_numpy(hidden[image][1:].T.reshape(1, -1, *GRID))
        expected = torch.nn.functional.adaptive_avg_pool2d(grid, pooled)[0].flatten(1).T.numpy()
        np.testing.assert_allclose(features, expected, atol=1e-5)
        assert slots == sorted(set(slots))
        assert len(slots) == pooled[0] * pooled[1]


METHODS = [
    (PruMerge(neighbours=6), 37),
    (PruMerge(keep_ratio=0.2), 8),
    (PruMergePlus(neighbours=6), 37),
    (VisionZip(dominant=9, contextual=4), 13),
    (TopK(keep=8), 8),
    (TopK(keep=8, at="projector"), 8),
    (RandomTokens(keep_ratio=0.25, at="vit"), 9),
    (SpatialPooling(rows=3, columns=4), 12),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("method", [method for method, _ in METHODS], ids=lambda method: repr(method)[:40])
def test_vision_graphs_keep_what_torch_keeps(llava_folder, method, dtype):
    model = load_checkpoint(llava_folder, methods=[method], dtype=dtype)
    proto = ir.to_proto(trace_stage(model.vision, dtype, 23))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    disagreeing = 0
    for seed in range(50):
        pixels = pictures(seed).to(dtype)
        with torch.no_grad():
            expected = model.vision({"pixel_values": pixels})
        actual = dict(zip(names, session.run(names, {"pixel_values": pixels.numpy()}), strict=True))
        assert set(actual) == set(expected)
        same = all(
            np.array_equal(actual[name], expected[name].numpy()) for name in names if name != "patch_features"
        )
        # Equal patches tie in exact arithmetic only, and in half precision the tower itself rounds differently.
        assert same or dtype == torch.float16 or seed % 5 in (3, 4), seed
        disagreeing += not same
        if same and dtype == torch.float32 and seed % 5 not in (3, 4):
            np.testing.assert_allclose(
                actual["patch_features"], expected["patch_features"].numpy(), atol=2e-3
            )
    assert disagreeing <= (10 if dtype == torch.float32 else 25)


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("prumerge", {"preset": "fixed"}, 73),
        ("prumerge", {}, 576),
        ("prumerge-plus", {"preset": "paper"}, 576),
        ("visionzip", {"preset": "upstream"}, 221),
        ("visionzip", {"preset": "192"}, 192),
        ("visionzip", {"preset": "128"}, 128),
        ("visionzip", {"preset": "64"}, 64),
        ("topk", {"preset": "ivtp-table-1"}, 64),
        ("random", {"preset": "ivtp-table-1"}, 64),
        ("random", {"keep_ratio": 0.1}, 57),
        ("spatial-pooling", {"preset": "ivtp-table-1"}, 64),
    ],
)
def test_presets(name, parameters, tokens):
    assert method_from_parameters(name, parameters).tokens_per_tile(LLAVA_7B) == tokens


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("prumerge", {"keep_ratio": 1.5}, "'keep_ratio' is 1.5, allowed: above 0, up to 1"),
        ("prumerge", {"neighbours": 0}, "'neighbours' is 0, allowed: 1 or more"),
        ("prumerge-plus", {"keep_ratio": -0.1}, "prumerge-plus: 'keep_ratio' is -0.1"),
        ("visionzip", {"dominant": 0}, "'dominant' is 0, allowed: 1 or more"),
        ("topk", {"at": "decoder"}, "'at' is 'decoder', allowed: vit, projector"),
        ("topk", {"keep_ratio": 0.0}, "'keep_ratio' is 0.0, allowed: above 0, up to 1"),
        ("random", {"at": "decoder"}, "'at' is 'decoder', allowed: vit, projector"),
    ],
)
def test_wrong_parameters(name, parameters, message):
    with pytest.raises(PruningError) as error:
        method_from_parameters(name, parameters)
    assert message in str(error.value)


def geometry(**changes):
    base = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "head_dim": 8,
        "grid": GRID,
        "vision_layers": 3,
        "has_class_token": True,
    }
    return ModelGeometry(**base | changes)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (PruMerge(), {"has_class_token": False}, "no class token or no layers; use a decoder method"),
        (VisionZip(5, 5), {"vision_layers": 0}, "no class token or no layers"),
        (TopK(), {"has_class_token": False}, "no class token or no layers"),
        (PruMerge(), {"patches_per_token": 4}, "joins 4 patches to one visual token"),
        (SpatialPooling(2, 2), {"patches_per_token": 4}, "joins 4 patches to one visual token"),
        (VisionZip(30, 7), {}, "30 'dominant' and 7 'contextual' tokens, but a tile has 36"),
        (TopK(keep=37), {}, "'keep' is 37, but a picture has 36 visual tokens"),
        (SpatialPooling(7, 2), {}, "'rows' is 7, this model's tiles allow 1 … 6"),
        (
            RandomTokens(at="vit"),
            {"vision_layers": 0},
            "no layer of this vision tower runs; choose at=projector",
        ),
    ],
)
def test_models_that_do_not_fit(method, changes, message):
    with pytest.raises(PruningError) as error:
        method.check(geometry(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_prumerge_reads_the_last_layer_where_all_run(tmp_path):
    """With features behind the last layer there is none behind them; its own attention is read."""
    folder = build_llava(tmp_path, TinyLlava(feature_layer=-1, seed=4))
    model = load_checkpoint(folder, methods=[PruMerge(neighbours=3)])
    pixels = pictures(1)
    with torch.no_grad():
        out = model.vision({"pixel_values": pixels})
        last = model.model.vision_tower(pixels, num_feature_layers=4).attention
    query = last.query[:, :, 0].flatten(1)
    key = last.key.transpose(1, 2).flatten(2)
    scores = torch.softmax((key @ query.unsqueeze(2)).squeeze(2) / query.shape[1] ** 0.5, dim=1)[:, 1:]
    kept = stands_out(scores).sum(dim=1)
    assert out["patch_counts"].tolist() == (kept + 1).tolist()


@pytest.mark.parametrize("method", [PruMerge(neighbours=4), PruMergePlus(neighbours=4)])
def test_every_picture_has_a_number_of_its_own(llava_folder, method):
    """Upstream takes its outliers from all pictures of a batch at once; here company changes nothing."""
    pixels = pictures(1, count=3)
    together = run_vision(llava_folder, method, pixels)
    assert len({len(slots) for _, slots in together}) > 1, "the pictures would not tell"
    for image, (features, slots) in enumerate(together):
        ((alone, alone_slots),) = run_vision(llava_folder, method, pixels[image : image + 1])
        assert slots == alone_slots
        np.testing.assert_allclose(features, alone, atol=1e-5)
