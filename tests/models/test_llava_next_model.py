"""LLaVA-NeXT gives transformers' logits, whatever the pictures' sizes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json
from tiny_llava_next import Reference, TinyLlavaNext, build_llava_next, pictures, with_base

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import CheckpointError
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.models.llava_next import LlavaNextConfig

TOLERANCE = 1e-4
QUESTION = "What colour is the circle?"
# Square, wide, tall, thin, smaller than a tile, large; thin enough that the joined grid has no row, or newlines alone.
SIZES = [(48, 48), (60, 40), (37, 61), (200, 11), (7, 5), (640, 480), (60, 1), (2, 90), (49, 48), (300, 2)]
PROMPTS = [[], *([index] for index in range(len(SIZES))), [1, 2], [3, 0, 6, 9]]

SPECS = {
    "llama": TinyLlavaNext(),
    "mistral": with_base(TinyLlavaNext(decoder="mistral"), seed=1),
    "qwen2, tied": with_base(TinyLlavaNext(decoder="qwen2"), tied=True, seed=2),
    "qwen3": with_base(TinyLlavaNext(decoder="qwen3"), head_dim=16, layers=2, seed=6),
    "odd grid": with_base(TinyLlavaNext(), image_size=28, patch_size=4, seed=3),
    "many resolutions": with_base(
        TinyLlavaNext(resolutions=tuple((d, a) for d in range(1, 5) for a in range(1, 5))), seed=4, layers=2
    ),
    "feature layer -1, no projector bias": with_base(
        TinyLlavaNext(), feature_layer=-1, projector_bias=False, seed=5
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_logits_are_those_of_transformers_in_prefill_and_decode(spec, tmp_path):
    folder = build_llava_next(tmp_path, spec)
    ours, theirs = load_checkpoint(folder), Reference(folder)
    preprocessing = picture_preprocessing_from_checkpoint(folder, "llava_next")
    for number, chosen in enumerate(PROMPTS):
        images = pictures([SIZES[index] for index in chosen], seed=number)
        inputs = theirs.inputs(images, QUESTION)
        prepared = preprocessing.prepare(images, ours.plan.geometry.grid) if images else None
        state = ours.prefill(inputs["input_ids"][0].numpy(), prepared)
        logits, more = state.logits, list[int]()
        for step in range(3):
            expected = theirs.logits(inputs, more)
            assert expected.std() > 0.1, "the comparison would be empty"
            assert (logits - expected).abs().max() <= TOLERANCE, (chosen, step)
            token = 10 + 17 * step
            logits = ours.decode(token, state.next_position + step, state.caches)
            more.append(token)


def test_the_newline_and_the_order_of_tiles_matter(llava_next_folder, llava_next_copy):
    """What the comparison above rests on: other newlines or another order give other logits."""
    images = pictures([(60, 40)])
    theirs = Reference(llava_next_folder)
    inputs = theirs.inputs(images, QUESTION)
    expected = theirs.logits(inputs)
    weights = load_file(llava_next_copy / "model.safetensors")
    save_file({**weights, "image_newline": -weights["image_newline"]}, llava_next_copy / "model.safetensors")
    assert (Reference(llava_next_copy).logits(inputs) - expected).abs().max() > 100 * TOLERANCE
    moved = {**inputs, "pixel_values": inputs["pixel_values"][:, [0, 2, 1, 3, 4]]}
    assert (theirs.logits(moved) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "prefixes",
    [
        (
            "language_model.model.",
            "language_model.lm_head.",
            "vision_tower.vision_model.",
            "multi_modal_projector.",
            "image_newline",
        ),
        (
            "model.language_model.",
            "lm_head.",
            "model.vision_tower.vision_model.",
            "model.multi_modal_projector.",
            "model.image_newline",
        ),
    ],
    ids=["transformers before 4.52", "from 4.52"],
)
def test_names_of_older_transformers_versions_load(llava_next_folder, llava_next_copy, prefixes):
    ours = ("language_model.", "lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline")
    expected = load_checkpoint(llava_next_folder).model.state_dict()
    renamed = {
        prefix + name.removeprefix(own): tensor.clone()
        for name, tensor in expected.items()
        for own, prefix in zip(ours, prefixes, strict=True)
        if name.startswith(own)
    }
    assert len(renamed) == len(expected)
    save_file(renamed, llava_next_copy / "model.safetensors")
    loaded = load_checkpoint(llava_next_copy).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def published(**fields):
    """The fields that llava-v1.6-mistral-7b-hf's config.json names; everything else comes from defaults."""
    return {
        "model_type": "llava_next",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        "use_image_newline_parameter": True,
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
        **fields,
    }


def test_geometry_of_llava_1_6():
    config = LlavaNextConfig.from_huggingface(published())
    geometry = config.geometry
    assert (geometry.grid, geometry.vision_layers, geometry.has_class_token) == ((24, 24), 23, True)
    assert (geometry.one_tile, geometry.one_grid, geometry.fixed_tiles) == (False, False, True)
    assert (config.decoder.num_kv_heads, config.decoder.rope_theta) == (8, 1000000.0)
    # 672 × 504: four tiles and the whole; 36 of 48 rows are left, of 48 tokens and a newline each.
    typical = config.typical_picture
    assert (typical.tiles, typical.tokens, typical.inserted) == (5, 576 + 36 * 49, 36)
    without = published()
    del without["image_grid_pinpoints"]
    assert LlavaNextConfig.from_huggingface(without) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "'full', supported: default"),
        ({"vision_feature_layer": [-2, -5]}, "'vision_feature_layer' is [-2, -5], expected int"),
        (
            {"image_grid_pinpoints": [[336, 500]]},
            "[[336, 500]] must be multiples of the vision tower's image_size 336",
        ),
        ({"image_grid_pinpoints": []}, "[] must be multiples"),
        ({"image_grid_pinpoints": "(1x1)"}, "'(1x1)', expected pairs of height and width"),
        ({"use_image_newline_parameter": False}, "'use_image_newline_parameter' is False, supported: true"),
        ({"text_config": {"model_type": "gemma"}}, "'model_type' is 'gemma', supported: llama, mistral"),
        ({"text_config": {"model_type": "mistral"}}, "'sliding_window' is 4096, supported: null"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "supported: clip_vision_model"),
    ],
)
def test_unsupported_configs_are_refused(fields, message):
    with pytest.raises(CheckpointError) as error:
        LlavaNextConfig.from_huggingface(published(**fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_newline_is_refused(llava_next_copy):
    weights = load_file(llava_next_copy / "model.safetensors")
    del weights["image_newline"]
    save_file(weights, llava_next_copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="image_newline is missing"):
        load_checkpoint(llava_next_copy)


def test_placeholders_that_do_not_fit(llava_next_folder):
    from edgeprune.errors import PromptError

    model = load_checkpoint(llava_next_folder)
    preprocessing = picture_preprocessing_from_checkpoint(llava_next_folder, "llava_next")
    images = pictures([(60, 40)])
    ids = Reference(llava_next_folder).inputs(images, QUESTION)["input_ids"][0].numpy()
    prepared = preprocessing.prepare(images, model.plan.geometry.grid)
    for wrong in (np.append(np.full(1, 3), ids), np.delete(ids, np.flatnonzero(ids == 3)[:13])):
        with pytest.raises(PromptError, match="pictures need 140"):
            model.prefill(wrong, prepared)


def test_config_json_of_the_tiny_checkpoint_is_read_as_saved(llava_next_copy):
    """The file may name neither defaults nor pinpoints twice: the tower's own stay what they are."""
    config = json.loads((llava_next_copy / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    edit_json(llava_next_copy / "config.json", image_token_index=..., image_token_id=3)
    assert load_checkpoint(llava_next_copy).model.config.image_token_id == 3
