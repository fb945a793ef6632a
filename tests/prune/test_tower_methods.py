"""EViT, ToMe and IVTP's first stage, in the vision tower: against NumPy, and their vision graphs against torch."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import highest, mean_attention

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.export.trace import trace_stage
from edgeprune.models.vision_pruning import TowerAttention, TowerTokens
from edgeprune.prune.evit import Evit, EvitPruner
from edgeprune.prune.fastv import FastV
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.ivtp_vision import IvtpVision
from edgeprune.prune.registry import method_from_parameters
from edgeprune.prune.tome import Tome, merge_similar

PICTURES, PATCHES, WIDTH = 2, 12, 6


def random_tower(seed):
    """Attention inputs and tokens of two pictures with slots that have gaps."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((PICTURES, 2, 1 + PATCHES, 4)) for _ in range(3))
    hidden = rng.standard_normal((PICTURES, 1 + PATCHES, WIDTH))
    slots = np.stack([np.sort(rng.choice(40, PATCHES, replace=False)) for _ in range(PICTURES)])
    sizes = rng.integers(1, 4, (PICTURES, 1 + PATCHES)).astype(float)
    return query, key, value, hidden, slots, sizes


def tensors(*arrays):
    return [torch.tensor(array).float() for array in arrays]


@pytest.mark.parametrize("fuse", [True, False])
def test_evit_equals_the_definition(fuse):
    for seed in range(20):
        query, key, value, hidden, slots, _ = random_tower(seed)
        pruner = EvitPruner({3: 7 + fuse}, fuse=fuse)
        attention = TowerAttention(*tensors(hidden, query, key, value))
        result = pruner.prune(3, [attention], TowerTokens(*tensors(hidden), torch.tensor(slots)))
        for picture in range(PICTURES):
            scores = mean_attention(query[picture], key[picture], causal=False)[0, 1:]
            kept = highest(scores, 7)
            dropped = sorted(set(range(PATCHES)) - set(kept), key=lambda n: (-scores[n], n))
            rows = [hidden[picture, 0], *hidden[picture, 1:][kept]]
            places = list(slots[picture][kept])
            if fuse:
                rows.append(sum(scores[n] * hidden[picture, 1 + n] for n in dropped))
                places.append(slots[picture][dropped[0]])
            np.testing.assert_allclose(result.hidden[picture].numpy(), np.array(rows), atol=1e-5)
            assert result.slots[picture].tolist() == places


def tome_by_hand(metric, hidden, slots, sizes, merged):
    """One picture, token by token: hidden states, slots (class token -1) and sizes of what is left."""
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    count = len(metric)
    a, b = list(range(0, count, 2)), list(range(1, count, 2))
    partner = {i: max(b, key=lambda j: (unit[i] @ unit[j], -j)) for i in a if i != 0}
    ranked = sorted(partner, key=lambda i: (-(unit[i] @ unit[partner[i]]), i))
    total = {j: sizes[j] * hidden[j] for j in range(count)}
    size = dict(enumerate(sizes))
    for i in ranked[:merged]:
        total[partner[i]] = total[partner[i]] + sizes[i] * hidden[i]
        size[partner[i]] += sizes[i]
    order = [i for i in a if i not in ranked[:merged]] + b
    places = [-1, *slots]
    return (
        np.array([total[i] / size[i] for i in order]),
        [places[i] for i in order][1:],
        [size[i] for i in order],
    )


@pytest.mark.parametrize("merged", [0, 1, 4, 6])
@pytest.mark.parametrize("fresh", [True, False])
def test_tome_equals_the_definition(merged, fresh):
    for seed in range(20):
        _, key, _, hidden, slots, sizes = random_tower(seed)
        sizes = np.ones_like(sizes) if fresh else sizes
        metric = key.mean(axis=1)
        given = None if fresh else torch.tensor(sizes).float()
        tokens = TowerTokens(*tensors(hidden), torch.tensor(slots), given)
        result = merge_similar(torch.tensor(metric).float(), tokens, merged)
        for picture in range(PICTURES):
            rows, places, counts = tome_by_hand(
                metric[picture], hidden[picture], slots[picture], sizes[picture], merged
            )
            if merged == 0:
                assert result is tokens
                continue
            np.testing.assert_allclose(result.hidden[picture].numpy(), rows, atol=1e-5)
            assert result.slots[picture].tolist() == places
            assert result.sizes[picture].tolist() == counts


def test_attention_counts_a_merged_token_as_often_as_it_stands_for(llava_folder):
    """A token of size 2 weighs as much as two equal tokens."""
    layer = load_checkpoint(llava_folder).model.vision_tower.encoder.layer(0)
    hidden = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    twice = torch.cat((hidden, hidden[:, 4:]), dim=1)
    with torch.no_grad():
        merged = layer.attention(hidden, sizes=torch.tensor([[1.0, 1, 1, 1, 2]])).hidden
        expected = layer.attention(twice).hidden[:, :5]
    assert (merged - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("method", "tokens"),
    [
        (Evit(layers=(0, 2), keep_ratio=0.6), 15),
        (Evit(layers=(1,), keep_ratio=0.5, fuse=False), 18),
        (Tome(r=5), 21),
        (Tome(r=99), 5),
        (IvtpVision(keep=10, group_size=1), 10),
    ],
    ids=["evit", "evit, not fusing", "tome", "tome, all it can", "ivtp-v"],
)
def test_vision_graphs_keep_what_torch_keeps(llava_folder, method, tokens, dtype):
    model = load_checkpoint(llava_folder, methods=[method], dtype=dtype)
    assert model.plan.tokens_per_tile == tokens
    proto = ir.to_proto(trace_stage(model.vision, dtype, 23))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    disagreeing = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(1 + seed % 3, 3, 24, 24, generator=generator)
        with torch.no_grad():
            expected = model.vision({"pixel_values": pixels.to(dtype)})
        features, slots = session.run(
            ["patch_features", "patch_slots"], {"pixel_values": pixels.to(dtype).numpy()}
        )
        assert features.shape == tuple(expected["patch_features"].shape)
        same = slots.tolist() == expected["patch_slots"].tolist()
        # In half precision the tower itself rounds differently, and a token may be nearer than that to another.
        assert same or dtype == torch.float16, seed
        disagreeing += not same
        if same and dtype == torch.float32:
            np.testing.assert_allclose(features, expected["patch_features"].numpy(), atol=1e-3)
    assert disagreeing <= 10


def test_ivtp_v_is_the_first_stage_of_ivtp(llava_folder):
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    both = Ivtp(tokens_after_vision=10, tokens_after_decoder=5, decoder_layers=2, text_selection="all")
    with torch.no_grad():
        first, alone = (
            load_checkpoint(llava_folder, methods=[method]).vision({"pixel_values": pixels})
            for method in (both, IvtpVision(keep=10))
        )
    assert torch.equal(first["patch_slots"], alone["patch_slots"])
    assert torch.equal(first["patch_features"], alone["patch_features"])


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("evit", {"preset": "paper-0.7"}, 201),
        ("evit", {"preset": "paper-0.5"}, 74),
        ("tome", {"preset": "llmc"}, 576 - 23 * 16),
        ("tome", {"preset": "ivtp-table-1"}, 576 - 23 * 22),
        ("ivtp-v", {"preset": "paper-64"}, 64),
    ],
)
def test_presets(name, parameters, tokens):
    assert method_from_parameters(name, parameters).tokens_per_tile(LLAVA_7B) == tokens


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("evit", {"keep_ratio": 1.0}, "'keep_ratio' is 1.0, allowed: above 0, below 1"),
        ("evit", {"layers": [6, 3]}, "'layers' is [6, 3]: list one or more, increasing"),
        ("tome", {"r": 0}, "'r' is 0, allowed: 1 or more"),
        ("ivtp-v", {"keep": 0}, "must be at least 1"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(PruningError) as caught:
        method_from_parameters(name, parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([Evit(layers=(1, 9))], "layer 9 is out of range: this vision tower allows layers 0 … 2"),
        ([IvtpVision(keep=64)], "'keep' is 64, but a picture has 36 visual tokens"),
        ([Tome(r=3), IvtpVision(keep=9)], "tome and ivtp-v both prune before the decoder"),
        ([Tome(r=10), FastV(layer=1, keep=99)], "'keep' is 99, but a picture has 36 visual tokens"),
    ],
)
def test_models_that_do_not_fit(llava_folder, methods, message):
    with pytest.raises(PruningError) as caught:
        load_checkpoint(llava_folder, methods=methods)
    assert message in str(caught.value)
