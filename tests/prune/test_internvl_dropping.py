"""InternVL pruned, against transformers run densely, where dropped patches and tokens stay, masked from then on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from masked_decoder import MaskedDecoder
from numpy_references import (
    adaptprune_kept,
    atp_reference,
    attention_logits,
    causal_softmax,
    highest,
    last_row_scores,
    mean_attention,
    rollout,
    value_norms,
)
from safetensors.torch import load_file
from test_dropping_equals_masking import compare, double, ivtp_choice
from tiny_checkpoints import add_atp
from tiny_internvl import IMAGE_TOKEN_ID, TinyInternvl, build_internvl, internvl_prompt
from transformers import InternVLForConditionalGeneration

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.evit import Evit
from edgeprune.prune.fastv import FastV
from edgeprune.prune.ivtp import Ivtp, equal_steps, layer_groups
from edgeprune.prune.ivtp_vision import IvtpVision
from edgeprune.prune.prumerge import PruMerge
from edgeprune.prune.prumerge_plus import PruMergePlus
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.prune.spatial_pooling import SpatialPooling
from edgeprune.prune.tome import Tome
from edgeprune.prune.topk import TopK
from edgeprune.prune.visionzip import VisionZip

SPEC = TinyInternvl()
SIDE = 6
NUM_TEXT = 7  # the end of the picture, and six tokens of text


class MaskedInternvl(MaskedDecoder):
    """transformers' decoder of an InternVL checkpoint, with a mask of its own in every layer."""

    def __init__(self, folder):
        self.model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.decoder = self.model.model.language_model


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    spec = replace(SPEC, text="qwen3", decoder={"head_dim": 16}, seed=1) if request.param == "qwen3" else SPEC
    return add_atp(
        build_internvl(tmp_path_factory.mktemp("internvl"), spec), [1, 3], num_patches=SPEC.tokens_per_tile
    )


@pytest.fixture(scope="module")
def dense(folder):
    return MaskedInternvl(folder)


def prompt(tiles, seed, **more):
    """A prompt whose last picture is followed by its end token and six tokens of text."""
    ids, pictures = internvl_prompt(SPEC, tiles=tiles, suffix=4, seed=seed, **more)
    assert len(ids) - 1 - np.flatnonzero(ids == IMAGE_TOKEN_ID)[-1] == NUM_TEXT
    return ids, pictures


def fastv_choice(layer, counts, share):
    """The tokens that the last row of the layer before attends to most; a share of every picture's number."""
    num_keep = sum(int(count * share + 1e-9) for count in counts)

    def choose(ids):
        def chosen(layers, alive):
            before = layers[layer - 1]
            probabilities = causal_softmax(attention_logits(double(before.query), double(before.key)))
            visual = np.flatnonzero(ids == IMAGE_TOKEN_ID)
            kept = alive.copy()
            kept[visual] = False
            kept[visual[highest(probabilities[:, -1, visual].mean(axis=0), num_keep)]] = True
            return kept

        return chosen

    return choose


@pytest.mark.parametrize(("tiles", "seed"), [((1,), 0), ((5,), 1), ((3, 1), 2), ((1, 5), 3)])
def test_fastv(folder, dense, tiles, seed):
    model = load_checkpoint(folder, methods=[FastV(layer=2, keep_ratio=0.4)])
    ids, pictures = prompt(tiles, seed)
    counts = [9 * number for number in tiles]
    sites = {2: fastv_choice(2, counts, 0.4)(ids)}
    state = compare(model, dense, ids, pictures, dense.embed(ids, pictures), sites)
    assert state.sites[0].tokens_in == sum(counts)
    assert state.sites[0].kept == sum(int(count * 0.4) for count in counts)


@pytest.mark.parametrize(("tiles", "seed"), [((1,), 0), ((3, 1), 1)])
def test_pyramiddrop(folder, dense, tiles, seed):
    """Each layer's own queries and keys rank the tokens that enter it."""
    method = PyramidDrop(layers=(1, 3), keep_ratios=(0.6, 0.3))
    model = load_checkpoint(folder, methods=[method])
    ids, pictures = prompt(tiles, seed)

    def choice(layer, share):
        num_keep = sum(int(9 * number * share + 1e-9) for number in tiles)

        def choose(layers, alive):
            rows = np.flatnonzero(alive)
            scores = last_row_scores(double(layers[layer].query)[:, rows], double(layers[layer].key)[:, rows])
            visual = ids[rows] == IMAGE_TOKEN_ID
            chosen = alive.copy()
            chosen[rows[visual]] = False
            chosen[rows[visual][highest(scores[visual], num_keep)]] = True
            return chosen

        return choose

    sites = {
        layer: choice(layer, share) for layer, share in zip(method.layers, method.keep_ratios, strict=True)
    }
    state = compare(model, dense, ids, pictures, dense.embed(ids, pictures), sites)
    assert 0 < state.sites[1].kept < state.sites[0].kept < 9 * sum(tiles)


@pytest.mark.parametrize("key_source", ["upstream", "normed"])
@pytest.mark.parametrize(("tiles", "seed"), [((1,), 0), ((5,), 1), ((3, 1), 2), ((1, 5), 3)])
def test_adaptprune_suppresses_inside_a_tile(folder, dense, tiles, seed, key_source):
    method = AdaptPrune(layer=2, keep_ratio=0.5, similarity_sigma=0.4, key_source=key_source)
    model = load_checkpoint(folder, methods=[method])
    ids, pictures = prompt(tiles, seed)
    slots = np.full(len(ids), -1)
    slots[ids == IMAGE_TOKEN_ID] = np.arange(9 * sum(tiles))
    count = sum(int(9 * number * 0.5) for number in tiles)

    def choose(layers, alive):
        before, entering = layers[1], layers[2].hidden
        scores = last_row_scores(double(before.query), double(before.key))
        keys = adaptprune_keys(dense.decoder.layers[2], entering, key_source)
        kept, gap = adaptprune_kept(scores, keys, slots, (3, 3), count, method)
        assert gap > 1e-4, "choose another seed: a choice is too close"
        chosen = alive.copy()
        chosen[slots >= 0] = False
        chosen[kept] = True
        return chosen

    state = compare(model, dense, ids, pictures, dense.embed(ids, pictures), {2: choose})
    assert state.sites[0].kept == count


@torch.no_grad()
def adaptprune_keys(layer, hidden, key_source):
    """transformers' key projection alone, or with the norms round it; not rotated."""
    attention = layer.self_attn
    if key_source == "upstream":
        return double(attention.k_proj(hidden))
    keys = attention.k_proj(layer.input_layernorm(hidden))
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys.unflatten(-1, (-1, attention.head_dim))).flatten(-2)
    return double(keys)


@pytest.mark.parametrize(("tiles", "seed"), [((1,), 0), ((5,), 1), ((3, 5), 2)])
def test_atp_has_thresholds_for_every_tile(folder, dense, tiles, seed):
    model = load_checkpoint(folder)
    (method,) = model.plan.methods
    weights = load_file(folder / "pruning.safetensors")
    ids, pictures = prompt(tiles, seed)
    slots = np.full(len(ids), -1)
    slots[ids == IMAGE_TOKEN_ID] = np.arange(9 * sum(tiles))

    def choice(site):
        prefix = f"atp.site{site}."
        heads = {
            n.removeprefix(prefix): w.double().numpy() for n, w in weights.items() if n.startswith(prefix)
        }

        def choose(layers, alive):
            rows = np.flatnonzero(alive)
            before = layers[method.layers[site] - 1]
            query, key = double(before.query)[:, rows], double(before.key)[:, rows]
            kept, margin = atp_reference(method, (3, 3), query, key, slots[rows], NUM_TEXT, sum(tiles), heads)
            assert margin.min() > 1e-5, "choose another seed: a token is too close to its threshold"
            chosen = alive.copy()
            chosen[rows] = kept
            return chosen

        return choose

    sites = {layer: choice(site) for site, layer in enumerate(method.layers)}
    state = compare(model, dense, ids, pictures, dense.embed(ids, pictures), sites)
    assert 0 < state.sites[-1].kept < state.sites[0].kept < 9 * sum(tiles)


@torch.no_grad()
def masked_tower(dense, pictures, tokens_after_vision, group_size):
    """transformers' tower with masks, its patches row by row: projected tokens [T·K, C] and their slots."""
    model = dense.model.model
    tower, config = model.vision_tower, model.config.vision_config
    hidden = tower.embeddings(torch.from_numpy(pictures.pixel_values))
    num_tiles, length = hidden.shape[:2]
    groups = layer_groups(config.num_hidden_layers, group_size)
    steps = equal_steps(9, tokens_after_vision, len(groups))
    counts = dict(zip([group[-1] for group in groups], steps, strict=True))
    # The visual token of every patch, patches row by row.
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    token = row // 2 * 3 + column // 2
    left = np.ones((num_tiles, 9), dtype=bool)
    history: list[list[np.ndarray]] = [[] for _ in range(num_tiles)]
    for index, layer in enumerate(tower.encoder.layer):
        attention = layer.attention
        normed = layer.layernorm_before(hidden)
        alive = np.concatenate((np.ones((num_tiles, 1), bool), left[:, token]), axis=1)
        projected = [
            projection(normed)
            .unflatten(-1, (config.num_attention_heads, -1))
            .transpose(1, 2)
            .double()
            .numpy()
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        mask = torch.where(torch.from_numpy(alive), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        mixed, _ = attention(normed, attention_mask=mask.expand(-1, 1, length, -1))
        hidden = hidden + layer.lambda_1 * mixed
        for tile in range(num_tiles):
            rows = np.flatnonzero(alive[tile])
            query, key, value = (tensor[tile][:, rows] for tensor in projected)
            history[tile].append(mean_attention(query, key, causal=False))
            if index in counts:
                patches = (rollout(history[tile])[0] * value_norms(value))[1:]
                tokens = np.flatnonzero(left[tile])
                score = np.array([patches[token[rows[1:] - 1] == number].sum() for number in tokens])
                left[tile] = False
                left[tile, tokens[highest(score, counts[index])]] = True
                history[tile] = []
        hidden = hidden + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden))
    shuffled = model.pixel_shuffle(hidden[:, 1:].reshape(num_tiles, SIDE, SIDE, -1), 0.5)
    tokens = model.multi_modal_projector(shuffled.reshape(num_tiles, 9, -1))
    slots = np.flatnonzero(left)
    return tokens.flatten(0, 1)[torch.from_numpy(slots)], slots


@pytest.mark.parametrize(("tiles", "seed"), [((1,), 0), ((5,), 1), ((3, 1), 2)])
@pytest.mark.parametrize(
    "method",
    [
        IvtpVision(keep=4, group_size=1),
        IvtpVision(keep=5, group_size=3),
        Ivtp(6, 3, decoder_layers=3, group_size=2, text_selection="all"),
    ],
    ids=["ivtp-v", "ivtp-v, ragged groups", "ivtp"],
)
def test_ivtp_drops_the_patches_of_a_token_together(folder, dense, method, tiles, seed):
    model = load_checkpoint(folder, methods=[method])
    keep = method.tokens_per_tile(model.plan.geometry)
    ids, pictures = prompt(tiles, seed, tokens_per_tile=keep)
    features, slots = masked_tower(dense, pictures, keep, method.group_size)
    tower = model.encode_pictures(pictures)
    assert tower.outputs["patch_slots"].tolist() == slots.tolist()
    visual = ids == IMAGE_TOKEN_ID
    embeds = dense.decoder.embed_tokens(torch.from_numpy(ids)[None]).detach()
    embeds[0, visual] = features
    sites = {}
    if isinstance(method, Ivtp):
        sites = {
            group[-1] + 1: ivtp_choice(method, site, dense, ids, sum(tiles))
            for site, group in enumerate(method.decoder_groups())
        }
    state = compare(model, dense, ids, pictures, embeds, sites)
    if sites:
        assert state.sites[-1].kept == 3 * sum(tiles)


def test_methods_that_drop_single_patches_are_refused(folder):
    wrong = [Evit(), RandomTokens(), RandomTokens(at="vit"), Tome(), TopK(), VisionZip(), PruMerge()]
    for method in [*wrong, PruMergePlus(), SpatialPooling()]:
        with pytest.raises(PruningError) as error:
            load_checkpoint(folder, methods=[method])
        assert "joins 4 patches to one visual token" in str(error.value), method.name
        assert "use ivtp-v or a decoder method" in str(error.value)


def test_clip_cannot_choose_the_text(folder):
    with pytest.raises(PruningError, match=r"vision tower is not CLIP's: .*\(text_selection=all"):
        load_checkpoint(folder, methods=[Ivtp(6, 3, decoder_layers=3)])


def test_more_tokens_than_a_tile_has_are_refused(folder):
    with pytest.raises(PruningError, match=r"'keep' is 10, but a (picture|tile) has 9 visual tokens"):
        load_checkpoint(folder, methods=[IvtpVision(keep=10)])
