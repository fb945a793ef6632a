import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import TinyLlava, build_clip, build_llava
from transformers import CLIPModel

from edgeprune.models.clip import (
    ClipTextConfig,
    ClipTextTower,
    ClipVisionConfig,
    ClipVisionTower,
)
from edgeprune.models.vision_pruning import keep_patches

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def checkpoint(request, tmp_path_factory):
    # A gentler spread than elsewhere, so that 1e-5 is about a hundred float32 steps.
    spec = TinyLlava(vision_act=request.param, std=0.1, vision_layers=3)
    folder = tmp_path_factory.mktemp("clip")
    llava = build_llava(folder / "llava", spec)
    return build_clip(folder / "clip", llava, spec, text_layers=3)


def tower(checkpoint: Path, section: str):
    """Our tower with the checkpoint's weights."""
    config = json.loads((checkpoint / "config.json").read_text())[f"{section}_config"]
    weights = load_file(checkpoint / "model.safetensors")
    if section == "vision":
        module = ClipVisionTower(ClipVisionConfig.from_huggingface(config))
    else:
        module = ClipTextTower(ClipTextConfig.from_huggingface(config, projection_dim=12))
    prefix = f"{section}_model."
    names = module.state_dict()
    module.load_state_dict({name: weights[prefix + name] for name in names})
    return module.eval()


@torch.no_grad()
def test_vision_tower_is_that_of_transformers(checkpoint):
    ours, theirs = tower(checkpoint, "vision"), CLIPModel.from_pretrained(checkpoint).eval().vision_model
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = theirs(pixel_values=pixels, output_hidden_states=True)
    assert len(expected.hidden_states) == 4
    for layer, hidden in enumerate(expected.hidden_states):
        out = ours(pixels, num_feature_layers=layer, pooled=True)
        assert hidden.std() > 0.1
        assert (out.hidden - hidden).abs().max() <= TOLERANCE
        assert (out.pooled - expected.pooler_output).abs().max() <= TOLERANCE
        assert out.slots.tolist() == [list(range(36))] * 3
    assert ours(pixels, num_feature_layers=2).pooled is None


@torch.no_grad()
def test_text_tower_is_that_of_transformers(checkpoint):
    ours, theirs = tower(checkpoint, "text"), CLIPModel.from_pretrained(checkpoint).eval().text_model
    ids = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids=ids).last_hidden_state
    assert expected.std() > 0.1
    assert (ours(ids) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_padding_does_not_reach_the_text_before_it(checkpoint):
    ours = tower(checkpoint, "text")
    ids = torch.randint(0, 500, (1, 77), generator=torch.Generator().manual_seed(1))
    padded = ids.clone()
    padded[:, 20:] = 0
    assert torch.equal(ours(ids)[:, :20], ours(padded)[:, :20])
    assert not torch.allclose(ours(ids)[:, 20:], ours(padded)[:, 20:])


class KeepEven:
    """Drops the odd patches after the attention of layer 1."""

    def keep_after_attention(self, layer):
        return 18 if layer == 1 else None

    def prune(self, layer, history, tokens):
        assert layer == 1
        assert [attention.query.shape[2] for attention in history] == [37, 37]
        return keep_patches(tokens, torch.arange(0, 36, 2).expand(len(tokens.slots), -1))


@torch.no_grad()
def test_dropping_patches_equals_masking_them_in_later_layers(checkpoint):
    ours, theirs = tower(checkpoint, "vision"), CLIPModel.from_pretrained(checkpoint).eval().vision_model
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    out = ours(pixels, num_feature_layers=3, pruner=KeepEven(), pooled=True)
    hidden = theirs.pre_layrnorm(theirs.embeddings(pixels))
    kept = torch.tensor([0, *range(1, 37, 2)])
    mask = torch.full((1, 1, 37, 37), torch.finfo(torch.float32).min)
    mask[..., kept] = 0.0
    for index, layer in enumerate(theirs.encoder.layers):
        result = layer(hidden, attention_mask=mask if index > 1 else None)
        hidden = result[0] if isinstance(result, tuple) else result
    assert (out.hidden - hidden[:, kept]).abs().max() <= TOLERANCE
    assert (out.pooled - theirs.post_layernorm(hidden[:, 0])).abs().max() <= TOLERANCE
    assert out.slots.tolist() == [list(range(0, 36, 2))] * 2
