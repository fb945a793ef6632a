"""PyramidDrop against its definition in NumPy, its positions, and its parameters."""

import numpy as np
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import highest, last_row_scores
from site_inputs import random_site_inputs
from tiny_checkpoints import TINY, random_prompt

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.registry import method_from_parameters


def rotated(x, positions):
    """[H, S, D] with the two halves of each head turned by position · θ^(-2i/D)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * TINY.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def test_the_next_layers_attention_ranks(llava_folder):
    layer = 2
    model = load_checkpoint(llava_folder, methods=[PyramidDrop(layers=(layer,), keep_ratios=(0.25,))])
    block = model.model.language_model.layer(layer)
    gain, w_q, w_k = (
        tensor.detach().double().numpy()
        for tensor in (
            block.input_layernorm.weight,
            block.self_attn.q_proj.weight,
            block.self_attn.k_proj.weight,
        )
    )
    compared = 0
    for seed in range(60):
        inputs = random_site_inputs(model.selects[0], seed)
        hidden = inputs[names.out(names.HIDDEN_STATES)][0].double().numpy()
        normed = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-6) * gain
        positions = inputs[names.POSITION_IDS][0].numpy().astype(float)
        query, key = (
            rotated((normed @ w.T).reshape(len(normed), -1, TINY.head_dim).transpose(1, 0, 2), positions)
            for w in (w_q, w_k)
        )
        scores = last_row_scores(query, key)
        visual = np.flatnonzero(inputs[names.VISUAL_SLOTS].numpy() >= 0)
        count = int(inputs[names.NUM_KEEP])
        ranked = np.sort(scores[visual])[::-1]
        if count < len(visual) and ranked[count - 1] - ranked[count] < 1e-7:
            continue
        compared += 1
        with torch.no_grad():
            chosen = model.selects[0](inputs)
        kept = chosen[names.KEEP_INDICES][: int(chosen[names.KEEP_COUNT])].tolist()
        expected = [int(visual[index]) for index in highest(scores[visual], count)]
        assert [row for row in kept if row in set(visual)] == expected, seed
    assert compared > 30


@pytest.mark.parametrize("positions", ["original", "upstream"])
def test_positions(llava_folder, positions):
    method = PyramidDrop(layers=(1, 3), keep_ratios=(0.5, 0.25), positions=positions)
    model = load_checkpoint(llava_folder, methods=[method])
    ids, pixels = random_prompt(num_images=1)
    prefill = model.prefill(ids, pixels, record=True)
    by_segment = [
        inputs[names.POSITION_IDS][0].tolist()
        for stage, inputs, _ in prefill.record
        if stage.name.startswith("segment")
    ]
    assert by_segment[0] == list(range(len(ids)))
    dropped = [0, 18, 27]
    for rows, less in zip(by_segment, dropped, strict=True):
        assert len(rows) == len(ids) - less
        if positions == "upstream":
            assert rows == list(range(len(rows)))
        else:
            assert rows[-1] == len(ids) - 1
    record = []
    model.decode(5, prefill.next_position, prefill.caches, record)
    # Upstream too goes on from the unpruned length.
    assert {
        int(inputs[names.POSITION_IDS]) for stage, inputs, _ in record if stage.name.startswith("segment")
    } == {len(ids)}


def test_paper_preset():
    sites = method_from_parameters("pyramiddrop", {"preset": "paper"}).decoder_sites(LLAVA_7B)
    assert [(site.cut.layer, site.keep_per_image) for site in sites] == [(8, 288), (16, 144), (24, 72)]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layers": [8]}, "1 'layers' and 3 'keep_ratios': give one ratio for each layer"),
        ({"keep_ratios": [0.5, 0.25, 0.0]}, "'keep_ratio' is 0.0, allowed: above 0, up to 1"),
        ({"keep_ratios": [0.25, 0.5, 0.1]}, "'keep_ratios' [0.25, 0.5, 0.1] rise"),
        ({"positions": "none"}, "'positions' is 'none', allowed: original, upstream"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError) as caught:
        method_from_parameters("pyramiddrop", parameters)
    assert message in str(caught.value)
