import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import TinyLlava, build_llava, edit_json, random_prompt
from transformers import LlavaForConditionalGeneration

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import CheckpointError
from edgeprune.models.llava import LlavaConfig

TOLERANCE = 1e-4

SPECS = {
    "grouped-query": TinyLlava(),
    "multi-head": TinyLlava(heads=4, kv_heads=4, seed=1),
    "one key head": TinyLlava(hidden_size=48, heads=6, kv_heads=1, seed=2),
    "tied": TinyLlava(tied=True, seed=3),
    "last feature layer": TinyLlava(feature_layer=-1, seed=4),
    "feature layer from the front": TinyLlava(feature_layer=2, seed=5),
    "biases": TinyLlava(attention_bias=True, mlp_bias=True, seed=6),
    "no projector bias": TinyLlava(projector_bias=False, seed=7),
    "rope theta": TinyLlava(rope_theta=500.0, seed=8),
    "linear rope scaling": TinyLlava(rope_factor=4.0, seed=9),
    "wide heads, gelu": TinyLlava(head_dim=16, vision_act="gelu", image_size=32, patch_size=8, seed=10),
    "float16 files": TinyLlava(dtype=torch.float16, seed=11),
    "bfloat16 files, tied": TinyLlava(dtype=torch.bfloat16, tied=True, seed=12),
    "shards": TinyLlava(max_shard_size="50KB", seed=13),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_logits_are_those_of_transformers_in_prefill_and_decode(spec, tmp_path):
    folder = build_llava(tmp_path, spec)
    ours = load_checkpoint(folder, dtype=torch.float32)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for num_images in (0, 1, 2):
        ids, pixels = random_prompt(spec, num_images=num_images, seed=num_images)
        compare_prefill_and_decode(ours, theirs, ids, pixels, steps=4)


def compare_prefill_and_decode(ours, theirs, ids, pixels, steps):
    """Every step against a full recomputation without a cache."""
    state = ours.prefill(ids, pixels)
    logits = state.logits
    for step in range(steps + 1):
        expected = transformers_logits(theirs, ids, pixels)
        assert expected.std() > 0.1, "the comparison would be empty"
        assert (logits - expected).abs().max() <= TOLERANCE, f"step {step}"
        # Not the argmax: tiny models repeat themselves.
        token = 10 + 17 * step
        ids = np.append(ids, token)
        logits = ours.decode(token, state.next_position + step, state.caches)
    assert all(key.shape[2] == len(ids) for key, _ in state.caches.values())


@torch.no_grad()
def transformers_logits(model, ids, pixels):
    pictures = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels.pixel_values)}
    return model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **pictures).logits[0, -1]


def test_generate_gives_the_greedy_answer_of_transformers(llava_folder):
    ours = load_checkpoint(llava_folder)
    theirs = LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.float32).eval()
    ids, pixels = random_prompt(num_images=1, seed=3)
    expected = list[int]()
    for _ in range(6):
        grown = np.append(ids, np.array(expected, dtype=np.int64))
        expected.append(int(transformers_logits(theirs, grown, pixels).argmax()))
    assert ours.generate(ids, pixels, max_new_tokens=6) == (expected, [])
    end = expected[3]
    assert (
        ours.generate(ids, pixels, max_new_tokens=6, eos_token_ids=[end])[0]
        == expected[: expected.index(end)]
    )


def test_shards_are_several_files(tmp_path):
    build_llava(tmp_path, SPECS["shards"])
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize(
    "prefixes",
    [
        # transformers before 4.52, from 4.52, from 5.0
        (
            "language_model.model.",
            "language_model.lm_head.",
            "vision_tower.vision_model.",
            "multi_modal_projector.",
        ),
        (
            "model.language_model.",
            "lm_head.",
            "model.vision_tower.vision_model.",
            "model.multi_modal_projector.",
        ),
        ("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
    ],
    ids=["old", "middle", "new"],
)
def test_names_of_all_transformers_versions_load(llava_folder, llava_copy, prefixes):
    ours = ("language_model.", "lm_head.", "vision_tower.", "multi_modal_projector.")
    expected = load_checkpoint(llava_folder).model.state_dict()
    renamed = {
        prefix + name.removeprefix(own): tensor.clone()
        for name, tensor in expected.items()
        for own, prefix in zip(ours, prefixes, strict=True)
        if name.startswith(own)
    }
    assert len(renamed) == len(expected)
    save_file(renamed, llava_copy / "model.safetensors")
    loaded = load_checkpoint(llava_copy).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 777.0, "rope_scaling": None},
        {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_rope_fields_of_older_configs_are_read(llava_copy, rope):
    text = json.loads((llava_copy / "config.json").read_text())["text_config"]
    del text["rope_parameters"]
    edit_json(llava_copy / "config.json", text_config=text | rope)
    decoder = load_checkpoint(llava_copy).model.config.decoder
    assert (decoder.rope_theta, decoder.rope_factor) == (777.0, 2.0 if rope["rope_scaling"] else 1.0)
    theirs = LlavaForConditionalGeneration.from_pretrained(llava_copy, dtype=torch.float32).eval()
    ids, pixels = random_prompt()
    logits = load_checkpoint(llava_copy).prefill(ids, pixels).logits
    assert (logits - transformers_logits(theirs, ids, pixels)).abs().max() <= TOLERANCE


def test_geometry_of_llava_1_5():
    # The fields that the published config.json names; everything else comes from defaults.
    config = LlavaConfig.from_huggingface(
        {
            "image_token_index": 32000,
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
            "vision_feature_layer": -2,
        }
    )
    geometry = config.geometry
    assert (geometry.grid, geometry.num_patches, geometry.vision_layers) == ((24, 24), 576, 23)
    assert (geometry.num_layers, geometry.hidden_size, geometry.num_heads, geometry.head_dim) == (
        32,
        4096,
        32,
        128,
    )
    assert (config.decoder.context_length, config.decoder.rope_theta) == (4096, 10000.0)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (None, {"vision_feature_select_strategy": "full"}, "'full', supported: default"),
        (None, {"projector_hidden_act": "relu"}, "'projector_hidden_act' is 'relu', supported: gelu"),
        (None, {"vision_feature_layer": [-2, -5]}, "'vision_feature_layer' is [-2, -5], expected int"),
        (None, {"vision_feature_layer": -6}, "'vision_feature_layer' is -6, the tower has 5 states"),
        (None, {"image_token_index": ...}, "lacks 'image_token_index'"),
        (None, {"text_config": ...}, "lacks 'text_config' or 'vision_config'"),
        ("text_config", {"model_type": "gemma"}, "'model_type' is 'gemma', supported: llama"),
        ("text_config", {"model_type": "mistral"}, "'sliding_window' is 4096, supported: null"),
        ("text_config", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', supported: silu"),
        ("text_config", {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ("text_config", {"num_hidden_layers": "four"}, "'num_hidden_layers' is 'four', expected int"),
        ("text_config", {"num_hidden_layers": 0}, "'num_layers' is 0, expected at least 1"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "supported: clip_vision_model"),
        ("vision_config", {"hidden_size": 25}, "width 25 is no multiple of 2 attention heads"),
        ("vision_config", {"hidden_size": ...}, "lacks the field 'hidden_size'"),
    ],
)
def test_unsupported_configs_are_refused(llava_copy, section, fields, message):
    path = llava_copy / "config.json"
    if section is not None:
        merged = json.loads(path.read_text())[section] | fields
        fields = {section: {name: value for name, value in merged.items() if value is not ...}}
    edit_json(path, **fields)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(llava_copy)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
