"""A pruned model against transformers run densely, where dropped tokens stay, masked in all later layers.

Which tokens are dropped is decided once more by the NumPy references, from the dense run's activations.
"""

import numpy as np
import pytest
import torch
from masked_decoder import MaskedDecoder
from numpy_references import (
    atp_reference,
    cdpruner_kept,
    dart_kept,
    highest,
    ivtp_decoder_scores,
    mean_attention,
    rollout,
    value_norms,
)
from safetensors.torch import load_file
from tiny_checkpoints import TINY, random_prompt

from edgeprune.checkpoint import load_checkpoint
from edgeprune.prune.cdpruner import CdPruner
from edgeprune.prune.dart import Dart
from edgeprune.prune.ivtp import Ivtp, equal_steps, layer_groups
from edgeprune.prune.random_tokens import RandomTokens

TOLERANCE = 1e-4
GRID = (6, 6)
NUM_TEXT = 7
IMAGE_TOKEN = 3


@pytest.fixture(scope="module")
def dense(llava_folder):
    return MaskedDecoder(llava_folder)


def double(tensor):
    return tensor[0].double().numpy()


def compare(model, dense, ids, pixels, embeds, sites, guide=None):
    """Kept tokens, caches and logits of prefill and decode against the dense run."""
    state = model.prefill(ids, pixels, guide)
    expected, layers, alive = dense.run(embeds, sites)
    assert expected[-1].std() > 0.1
    for step in range(3):
        assert (state.logits - expected[-1]).abs().max() <= TOLERANCE
        for index, (key, value) in state.caches.items():
            rows = torch.from_numpy(np.flatnonzero(alive[index]))
            assert key.shape[2] == len(rows)
            assert (key - layers[index].key[:, :, rows]).abs().max() <= TOLERANCE
            assert (value - layers[index].value[:, :, rows]).abs().max() <= TOLERANCE
        # Decode: what was dropped stays dropped, and the new token comes after the unpruned length.
        token = 40 + 13 * step
        state.logits = model.decode(token, state.next_position + step, state.caches)
        embeds = torch.cat((embeds, dense.decoder.embed_tokens(torch.tensor([[token]]))), dim=1).detach()
        alive = [np.append(rows, True) for rows in alive]
        frozen = {first: lambda _layers, _alive, kept=alive[first]: kept for first in sites}
        expected, layers, _ = dense.run(embeds, frozen)
    return state


# --- ATP ---------------------------------------------------------------------------------------------------


def atp_choice(method, site, weights, slots, num_images):
    """The definition of ATP on a dense run's layer before the site; ``slots`` of the unpruned sequence."""
    prefix = f"atp.site{site}."
    heads = {
        name.removeprefix(prefix): w.double().numpy()
        for name, w in weights.items()
        if name.startswith(prefix)
    }

    def choose(layers, alive):
        rows = np.flatnonzero(alive)
        before = layers[method.layers[site] - 1]
        query, key = double(before.query)[:, rows], double(before.key)[:, rows]
        kept, margin = atp_reference(method, GRID, query, key, slots[rows], NUM_TEXT, num_images, heads)
        assert margin.min() > 1e-5, "choose another seed: a token is too close to its threshold"
        chosen = alive.copy()
        chosen[rows] = kept
        return chosen

    return choose


@pytest.mark.parametrize(("num_images", "seed"), [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 5)])
def test_atp(atp_folder, dense, num_images, seed):
    model = load_checkpoint(atp_folder)
    method = model.plan.methods[0]
    weights = load_file(atp_folder / "pruning.safetensors")
    ids, pixels = random_prompt(num_images=num_images, suffix=NUM_TEXT, seed=seed)
    slots = np.full(len(ids), -1)
    slots[ids == IMAGE_TOKEN] = np.arange(num_images * TINY.num_patches)
    sites = {
        layer: atp_choice(method, site, weights, slots, num_images)
        for site, layer in enumerate(method.layers)
    }
    embeds = dense.embed(ids, pixels)
    state = compare(model, dense, ids, pixels, embeds, sites)
    _, _, alive = dense.run(embeds, sites)
    before = num_images * TINY.num_patches
    for result, layer in zip(state.sites, method.layers, strict=True):
        kept = slots[alive[layer]]
        assert result.slots == tuple(kept[kept >= 0])
        assert (result.tokens_in, result.kept) == (before, len(result.slots))
        before = result.kept
    assert 0 < state.sites[-1].kept < state.sites[0].kept < num_images * TINY.num_patches


def test_atp_keeps_more_of_one_picture_than_of_another(atp_folder):
    model = load_checkpoint(atp_folder)
    sites = [model.prefill(*random_prompt(seed=seed)).sites for seed in range(6)]
    assert len({result[0].kept for result in sites}) > 2


# --- fixed positions before the decoder --------------------------------------------------------------------


def test_random_with_atp(atp_folder, dense):
    # ATP sees the slots of the grid, not the order in the sequence.
    atp = load_checkpoint(atp_folder).plan.methods[0]
    model = load_checkpoint(atp_folder, methods=[RandomTokens(keep=20, seed=3), atp])
    chosen = np.array(model.plan.methods[0].slots(model.plan.geometry))
    ids, pixels = random_prompt(num_images=2, tokens_per_image=20, suffix=NUM_TEXT, seed=6)
    full_ids, _ = random_prompt(num_images=2, suffix=NUM_TEXT, seed=6)
    full = dense.embed(full_ids, pixels)[:, full_ids == IMAGE_TOKEN]
    embeds = dense.decoder.embed_tokens(torch.from_numpy(ids)[None]).detach()
    slots = np.full(len(ids), -1)
    slots[ids == IMAGE_TOKEN] = np.concatenate([chosen, TINY.num_patches + chosen])
    embeds[:, ids == IMAGE_TOKEN] = full[:, slots[ids == IMAGE_TOKEN]]
    weights = load_file(atp_folder / "pruning.safetensors")
    sites = {layer: atp_choice(atp, site, weights, slots, 2) for site, layer in enumerate(atp.layers)}
    state = compare(model, dense, ids, pixels, embeds, sites)
    assert set(state.sites[0].slots) < set(slots[slots >= 0])


# --- IVTP --------------------------------------------------------------------------------------------------


@torch.no_grad()
def masked_tower(dense, pixels, method):
    """transformers' vision tower with masks: the features [M·K, C] of the patches that are left."""
    tower, model = dense.model.model.vision_tower, dense.model.model
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.pre_layrnorm(tower.embeddings(torch.from_numpy(pixels.pixel_values)))
    num_images, length = hidden.shape[:2]
    groups = layer_groups(len(tower.encoder.layers) - 1, method.group_size)
    counts = dict(
        zip(
            [group[-1] for group in groups],
            equal_steps(length - 1, method.tokens_after_vision, len(groups)),
            strict=True,
        )
    )
    alive = np.ones((num_images, length), dtype=bool)
    group: list[list[np.ndarray]] = [[] for _ in range(num_images)]
    for index, layer in enumerate(tower.encoder.layers[:-1]):
        normed = layer.layer_norm1(hidden)
        projected = [
            projection(normed).unflatten(-1, (TINY.vision_heads, -1)).transpose(1, 2).double().numpy()
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        mask = torch.where(torch.from_numpy(alive), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        out = layer(hidden, attention_mask=mask.expand(-1, 1, length, -1))
        hidden = out[0] if isinstance(out, tuple) else out
        for image in range(num_images):
            rows = np.flatnonzero(alive[image])
            query, key, value = (tensor[image][:, rows] for tensor in projected)
            group[image].append(mean_attention(query, key, causal=False))
            if index in counts:
                score = rollout(group[image])[0] * value_norms(value)
                alive[image] = False
                alive[image, [0, *rows[1:][highest(score[1:], counts[index])]]] = True
                group[image] = []
    patches = torch.cat([hidden[image, torch.from_numpy(alive[image])][1:] for image in range(num_images)])
    slots = np.concatenate([np.flatnonzero(alive[m, 1:]) + m * TINY.num_patches for m in range(num_images)])
    return model.multi_modal_projector(patches), slots


def ivtp_choice(method, site, dense, ids, num_images):
    """IVTP's definition on a dense run's group of layers."""
    group = method.decoder_groups()[site]
    steps = equal_steps(method.tokens_after_vision, method.tokens_after_decoder, len(method.decoder_groups()))
    first_text = len(ids) - NUM_TEXT

    def choose(layers, alive):
        context = np.flatnonzero(alive[:first_text])
        probes = []
        for layer in group:
            mean = layers[layer].hidden[:, first_text:].mean(dim=1, keepdim=True)
            probe = dense.project(layer, mean, torch.tensor([[first_text]]))
            probes.append((double(probe.query), double(probe.key)))
        rows = [(double(layers[i].query)[:, context], double(layers[i].key)[:, context]) for i in group]
        score = ivtp_decoder_scores(rows, probes, double(layers[group[-1]].value)[:, context])
        visual = ids[context] == IMAGE_TOKEN
        chosen = alive.copy()
        chosen[context[visual]] = False
        chosen[context[visual][highest(score[visual], steps[site] * num_images)]] = True
        return chosen

    return choose


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize(
    ("method", "seed"),
    [
        (Ivtp(36, 12, decoder_layers=3, group_size=1, text_selection="all"), 0),
        (Ivtp(36, 10, decoder_layers=2, group_size=2, text_selection="all"), 1),
        (Ivtp(36, 10, decoder_layers=4, group_size=3, text_selection="all"), 2),
        (Ivtp(20, 8, decoder_layers=3, group_size=3, text_selection="all"), 3),
        (Ivtp(15, 6, decoder_layers=3, group_size=2, text_selection="all"), 4),
    ],
    ids=["groups of 1", "one group of 2", "up to the last layer", "with the tower", "with the tower, ragged"],
)
def test_ivtp(llava_folder, dense, method, num_images, seed):
    model = load_checkpoint(llava_folder, methods=[method])
    per_image = method.tokens_after_vision
    ids, pixels = random_prompt(num_images=num_images, tokens_per_image=per_image, suffix=NUM_TEXT, seed=seed)
    features, slots = masked_tower(dense, pixels, method)
    assert len(slots) == num_images * per_image
    embeds = dense.decoder.embed_tokens(torch.from_numpy(ids)[None]).detach()
    embeds[0, ids == IMAGE_TOKEN] = features
    sites = {
        group[-1] + 1: ivtp_choice(method, site, dense, ids, num_images)
        for site, group in enumerate(method.decoder_groups())
    }
    state = compare(model, dense, ids, pixels, embeds, sites)
    _, _, alive = dense.run(embeds, sites)
    by_row = np.full(len(ids), -1)
    by_row[ids == IMAGE_TOKEN] = slots
    for result, first in zip(state.sites, sites, strict=True):
        kept = by_row[alive[first]]
        assert result.slots == tuple(kept[kept >= 0])
    assert state.sites[-1].kept == num_images * method.tokens_after_decoder


# --- on the embedded prompt --------------------------------------------------------------------------------


def prompt_choice(method, slots, num_images):
    """CDPruner's or DART's definition on the embeddings that enter the first layer."""

    def choose(layers, alive):
        embeds, patches = double(layers[0].hidden), TINY.num_patches
        if isinstance(method, CdPruner):
            kept, clear = cdpruner_kept(embeds, slots, patches, method.keep, method)
        else:
            norms = abs(embeds).sum(axis=1)
            kept, clear = dart_kept(norms, embeds, slots, patches, method.keep, 0, method)
        assert clear > 1e-5, "choose another seed: two tokens are too close"
        assert len(kept) == method.keep * num_images
        chosen = slots < 0
        chosen[kept] = True
        return alive & chosen

    return choose


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize(
    "method", [CdPruner(keep=14), CdPruner(keep=9, halves=False, weighting="exponential"), Dart(keep=17)]
)
def test_pruning_the_embedded_prompt(llava_folder, dense, method, num_images):
    model = load_checkpoint(llava_folder, methods=[method])
    ids, pixels = random_prompt(num_images=num_images, suffix=NUM_TEXT, seed=7)
    slots = np.full(len(ids), -1)
    slots[ids == IMAGE_TOKEN] = np.arange(num_images * TINY.num_patches)
    embeds, sites = dense.embed(ids, pixels), {0: prompt_choice(method, slots, num_images)}
    state = compare(model, dense, ids, pixels, embeds, sites)
    _, _, alive = dense.run(embeds, sites)
    (result,) = state.sites
    kept = slots[alive[0]]
    assert result.slots == tuple(kept[kept >= 0])
    assert {key.shape[2] for key, _ in state.caches.values()} == {int(alive[0].sum()) + 3}


def test_a_renumbered_prompt_is_a_shorter_prompt(llava_folder, dense):
    """CDPruner's "upstream" positions: prefill and decode see the kept rows as if nothing else had been there."""
    model = load_checkpoint(llava_folder, methods=[CdPruner(keep=14, positions="upstream")])
    ids, pixels = random_prompt(num_images=2, suffix=NUM_TEXT, seed=8)
    state = model.prefill(ids, pixels)
    slots = np.full(len(ids), -1)
    slots[ids == IMAGE_TOKEN] = np.arange(2 * TINY.num_patches)
    rows = np.flatnonzero((slots < 0) | np.isin(slots, state.sites[0].slots))
    embeds = dense.embed(ids, pixels)[:, rows]
    for step in range(3):
        assert (state.logits - dense.run(embeds, {})[0][-1]).abs().max() <= TOLERANCE
        token = 40 + 13 * step
        state.logits = model.decode(token, state.next_position + step, state.caches)
        embeds = torch.cat((embeds, dense.decoder.embed_tokens(torch.tensor([[token]]))), dim=1).detach()
