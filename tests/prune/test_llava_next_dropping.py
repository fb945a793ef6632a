"""Pruning LLaVA-NeXT against transformers run densely, where dropped tokens stay, masked in all later layers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from masked_decoder import MaskedDecoder
from numpy_references import highest, mean_attention
from test_dropping_equals_masking import compare, double
from tiny_llava_next import Reference, pictures
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from edgeprune.checkpoint import load_checkpoint
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.prune.fastv import FastV
from edgeprune.prune.random_tokens import RandomTokens

IMAGE_TOKEN = 3
LAYER = 2
QUESTION = "What colour is the circle?"


class NextDecoder(MaskedDecoder):
    """transformers' decoder of a LLaVA-NeXT checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.reference = Reference(folder)
        self.model = self.reference.model
        self.decoder = self.model.model.language_model

    @torch.no_grad()
    def embeds_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The decoder's input embeddings [1, S, C], as transformers merges them."""
        seen: list[torch.Tensor] = []
        hook = self.decoder.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        self.reference.logits(inputs)
        hook.remove()
        return seen[0]

    def slots_in_order(self, sizes: torch.Tensor, patches: int) -> np.ndarray:
        """The tower's outputs in the order of the prompt, -1 for a newline: transformers packs their numbers."""
        config = self.model.config
        first, tiles = 0, []
        for size in sizes:
            count = image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            numbers = torch.arange(first, first + count * patches, dtype=torch.float32)
            tiles.append(numbers.view(count, patches, 1))
            first += count * patches
        packed, _ = self.model.model.pack_image_features(tiles, sizes, "default", torch.tensor([-1.0]))
        return torch.cat(packed)[:, 0].long().numpy()


@pytest.fixture(scope="module")
def dense(llava_next_folder):
    return NextDecoder(llava_next_folder)


def fastv_choice(visual: np.ndarray, keep: int):
    """The last row's attention in the layer before, mean over heads."""

    def choose(layers, alive):
        rows = np.flatnonzero(alive)
        before = layers[LAYER - 1]
        attention = mean_attention(double(before.query)[:, rows], double(before.key)[:, rows], causal=True)
        score = np.where(visual[rows], attention[-1], -np.inf)
        chosen = alive & ~visual
        chosen[rows[highest(score, keep)]] = True
        return chosen

    return choose


@pytest.mark.parametrize("sizes", [[(60, 40)], [(37, 61), (7, 5)]])
def test_fastv(llava_next_folder, dense, sizes):
    method = FastV(layer=LAYER, keep_ratio=0.3)
    model = load_checkpoint(llava_next_folder, methods=[method])
    images = pictures(sizes, seed=2)
    inputs = dense.reference.inputs(images, QUESTION)
    ids = inputs["input_ids"][0].numpy()
    prepared = picture_preprocessing_from_checkpoint(llava_next_folder, "llava_next").prepare(images, (6, 6))
    keep = sum(int(count * 0.3) for count in prepared.layout.tokens_per_image)
    sites = {LAYER: fastv_choice(ids == IMAGE_TOKEN, keep)}
    state = compare(model, dense, ids, prepared, dense.embeds_of(inputs), sites)
    assert state.sites[0].kept == keep
    # Newlines are visual tokens like others: some stay and some go.
    newlines = set(
        range(prepared.layout.places.shape[0] - prepared.layout.inserted, prepared.layout.places.shape[0])
    )
    assert 0 < len(newlines & set(state.sites[0].slots)) < len(newlines)


@pytest.mark.parametrize("sizes", [[(60, 40)], [(37, 61), (2, 90)]])
def test_what_the_tower_drops_leaves_the_others_and_newlines_in_order(llava_next_folder, dense, sizes):
    method = RandomTokens(keep=20, seed=5)
    model = load_checkpoint(llava_next_folder, methods=[method, FastV(layer=LAYER, keep_ratio=0.2)])
    images = pictures(sizes, seed=3)
    prepared = picture_preprocessing_from_checkpoint(llava_next_folder, "llava_next").prepare(images, (6, 6))
    inputs = dense.reference.inputs(images, QUESTION)
    full_ids = inputs["input_ids"][0].numpy()
    order = dense.slots_in_order(inputs["image_sizes"], 36)
    stays = (order < 0) | np.isin(order % 36, method.slots(model.plan.geometry))
    rows = np.ones(len(full_ids), bool)
    rows[full_ids == IMAGE_TOKEN] = stays
    ids, embeds = full_ids[rows], dense.embeds_of(inputs)[:, rows]
    counts = prepared.layout.tokens_per_image
    keep = min(sum(max(1, int(round(count * 0.2, 6))) for count in counts), int(stays.sum()))
    compare(model, dense, ids, prepared, embeds, {LAYER: fastv_choice(ids == IMAGE_TOKEN, keep)})
