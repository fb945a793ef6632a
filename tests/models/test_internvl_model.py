"""InternVL against transformers: logits of prefill and decode, configurations, weight names."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, edit_weights
from tiny_internvl import TinyInternvl, build_internvl, internvl_prompt
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen3Config

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import CheckpointError
from edgeprune.models.families import FAMILIES
from edgeprune.models.internvl import InternvlConfig

TOLERANCE = 1e-4

VIT_6B = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
SPECS = {
    "InternVL3: Qwen2": TinyInternvl(),
    "InternVL2.5-8B: Llama, dynamic rope": TinyInternvl(
        text="llama", rope={"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}, seed=1
    ),
    "InternVL3.5: Qwen3": TinyInternvl(text="qwen3", decoder={"head_dim": 16}, seed=11),
    "InternVL3.5-1B: Qwen3, tied": TinyInternvl(text="qwen3", decoder={"head_dim": 16}, tied=True, seed=12),
    "Qwen3 with biases": TinyInternvl(
        text="qwen3", decoder={"head_dim": 8, "attention_bias": True, "rms_norm_eps": 1e-2}, seed=13
    ),
    "InternViT-6B": TinyInternvl(vision=VIT_6B, seed=2),
    "class token's norm": TinyInternvl(vision={"use_mean_pooling": False}, seed=3),
    "no positions, layer norm's epsilon": TinyInternvl(
        vision={"use_absolute_position_embeddings": False, "layer_norm_eps": 0.1}, seed=4
    ),
    "mask token": TinyInternvl(vision={"use_mask_token": True, "attention_bias": True}, seed=5),
    "feature layer -2": TinyInternvl(model={"vision_feature_layer": -2}, seed=6),
    "last feature layer without its norm": TinyInternvl(
        model={"vision_feature_layer": 4}, vision={"use_mean_pooling": False}, seed=7
    ),
    "16 patches a token": TinyInternvl(image_size=32, model={"downsample_ratio": 0.25}, seed=8),
    "tied": TinyInternvl(tied=True, seed=9),
    "bfloat16 files": TinyInternvl(dtype=torch.bfloat16, seed=10),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_logits_are_those_of_transformers_in_prefill_and_decode(spec, tmp_path):
    folder = build_internvl(tmp_path, spec)
    ours = load_checkpoint(folder, dtype=torch.float32)
    theirs = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for tiles in ((), (1,), (5, 3)):
        ids, pictures = internvl_prompt(spec, tiles=tiles, seed=sum(tiles))
        compare_prefill_and_decode(ours, theirs, ids, pictures, steps=3)


def compare_prefill_and_decode(ours, theirs, ids, pictures, steps):
    """Every step against a full recomputation without a cache."""
    state = ours.prefill(ids, pictures)
    logits = state.logits
    for step in range(steps + 1):
        expected = transformers_logits(theirs, ids, pictures)
        assert expected.std() > 0.1, "the comparison would be empty"
        assert (logits - expected).abs().max() <= TOLERANCE, f"step {step}"
        token = 10 + 17 * step
        ids = np.append(ids, token)
        logits = ours.decode(token, state.next_position + step, state.caches)
    assert all(key.shape[2] == len(ids) for key, _ in state.caches.values())


@torch.no_grad()
def transformers_logits(model, ids, pictures):
    pixels = {} if pictures is None else {"pixel_values": torch.from_numpy(pictures.pixel_values)}
    return model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **pixels).logits[0, -1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "prefixes",
    [
        # As published for transformers 4.52 and written by 5; as transformers 4.52 writes.
        {"language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
        {
            "language_model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    ],
)
def test_names_of_all_transformers_versions_load(folder, copy, prefixes):
    expected = load_checkpoint(folder).model.state_dict()

    def theirs(name):
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        name = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
        return name.replace("self_attn", "attention") if "vision_tower" in name else name

    save_file({theirs(name): tensor.clone() for name, tensor in expected.items()}, copy / "model.safetensors")
    loaded = load_checkpoint(copy).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_head_of_its_own_is_used_whatever_the_config_says(folder, copy):
    """Published configs leave out that embedding and head differ; transformers 5 assumes that they do not."""
    edit_json(copy / "config.json", tie_word_embeddings=...)
    theirs = InternVLForConditionalGeneration.from_pretrained(copy, dtype=torch.float32).eval()
    ids, pictures = internvl_prompt()
    logits = load_checkpoint(copy).prefill(ids, pictures).logits
    assert (logits - transformers_logits(theirs, ids, pictures)).abs().max() <= TOLERANCE
    head = load_file(copy / "model.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(load_checkpoint(copy).model.lm_head.weight, head)
    # Without one, the embedding is the head.
    edit_weights(copy / "model.safetensors", language_model__lm_head__weight=...)
    model = load_checkpoint(copy).model
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_dynamic_rope_is_the_default_one_up_to_the_context_length(tmp_path):
    spec = TinyInternvl(
        text="llama", context_length=64, rope={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    )
    ours = load_checkpoint(build_internvl(tmp_path, spec))
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for suffix, equal in ((46, True), (60, False)):
        ids, pictures = internvl_prompt(spec, tiles=(1,), suffix=suffix)
        assert (len(ids) <= spec.context_length) == equal
        logits = ours.prefill(ids, pictures).logits
        assert ((logits - transformers_logits(theirs, ids, pictures)).abs().max() <= TOLERANCE) == equal


def test_geometry_of_internvl3_1b():
    # The published fields; what equals transformers' defaults may be left out of a config.json.
    vision = {"attention_bias": True, "model_type": "internvl_vision", "image_size": [448, 448]}
    text = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "vocab_size": 151674,
    }
    config = InternvlConfig.from_huggingface(
        {"text_config": text, "vision_config": vision, "image_token_id": 151667}
    )
    geometry = config.geometry
    assert (geometry.grid, geometry.num_patches, geometry.patches_per_token) == ((16, 16), 256, 4)
    assert (geometry.vision_layers, config.feature_size) == (24, 4096)
    assert (geometry.one_tile, geometry.one_grid, geometry.fixed_tiles) == (False, True, True)
    assert (geometry.has_class_token, geometry.has_clip_tower) == (True, False)
    assert (geometry.num_layers, geometry.hidden_size, geometry.head_dim) == (24, 896, 64)
    assert (config.decoder.context_length, config.decoder.rope_theta) == (32768, 1e6)
    assert config.decoder.attention_bias
    assert not config.decoder.output_bias
    assert config.typical_picture.tokens == 13 * 256
    defaults = InternvlConfig.from_huggingface(
        {"text_config": {}, "vision_config": {}, "image_token_id": 1}
    ).decoder
    assert (defaults.intermediate_size, defaults.vocab_size, defaults.num_kv_heads) == (22016, 151936, 32)


# The decoder of OpenGVLab/InternVL3_5-1B-HF: Qwen3-0.6B's sizes, embedding and head apart.
QWEN3_1B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
}


def test_geometry_of_internvl3_5_1b():
    vision = {"attention_bias": True, "model_type": "internvl_vision", "image_size": [448, 448]}
    raw = {
        "text_config": QWEN3_1B,
        "vision_config": vision,
        "image_token_id": 151671,
        "tie_word_embeddings": False,
    }
    config = InternvlConfig.from_huggingface(raw)
    decoder = config.decoder
    # 16 heads of 128 are wider than the hidden states.
    assert (decoder.hidden_size, decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (
        1024,
        16,
        8,
        128,
    )
    assert decoder.head_norms
    assert (decoder.attention_bias, decoder.output_bias) == (False, False)
    assert (decoder.context_length, decoder.rope_theta, decoder.vocab_size) == (40960, 1e6, 151936)
    with torch.device("meta"):
        parameters = dict(FAMILIES["internvl"].build(raw).named_parameters())
    counts = Counter[str]()
    for name, parameter in parameters.items():
        part = name.split(".")[0]
        counts["language" if part in ("language_model", "lm_head") else part] += parameter.numel()
    # What the published file holds.
    assert counts == {
        "vision_tower": 304_012_288,
        "language": 751_632_384,
        "multi_modal_projector": 5_253_120,
    }


def test_qwen3_has_the_defaults_of_transformers():
    theirs = Qwen3Config()
    ours = InternvlConfig.from_huggingface(
        {"text_config": {"model_type": "qwen3"}, "vision_config": {}, "image_token_id": 1}
    ).decoder
    assert (ours.hidden_size, ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert (ours.intermediate_size, ours.vocab_size, ours.context_length, ours.rms_norm_eps) == (
        theirs.intermediate_size,
        theirs.vocab_size,
        theirs.max_position_embeddings,
        theirs.rms_norm_eps,
    )
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.attention_bias, ours.output_bias) == (theirs.attention_bias, theirs.attention_bias)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        (
            {
                "hidden_size": 896,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            },
            {"attention_bias": True},
        ),
        (QWEN3_1B, {"attention_bias": True}),
        (
            {
                "hidden_size": 5120,
                "num_hidden_layers": 64,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
            },
            {**VIT_6B, "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25},
        ),
    ],
    ids=["InternVL3-1B", "InternVL3.5-1B", "InternVL3-38B"],
)
def test_published_sizes_have_the_weights_of_transformers(text, vision):
    config = InternVLConfig(text_config={"model_type": "qwen2"} | text, vision_config=vision)
    family = FAMILIES["internvl"]
    with torch.device("meta"):
        theirs = InternVLForConditionalGeneration(config).state_dict()
        ours = family.build(config.to_dict()).state_dict()
    shapes = {family.canonical_name(name): tensor.shape for name, tensor in theirs.items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.items()}


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (None, {"vision_feature_select_strategy": "full"}, "'full', supported: default"),
        (None, {"projector_hidden_act": "relu"}, "'projector_hidden_act' is 'relu', supported: gelu"),
        (None, {"vision_feature_layer": [-1, -2]}, "'vision_feature_layer' is [-1, -2], expected int"),
        (None, {"vision_feature_layer": -6}, "'vision_feature_layer' is -6, the tower has 5 states"),
        (None, {"downsample_ratio": 1.0}, "'downsample_ratio' is 1.0, supported: 0.5, 0.25"),
        (None, {"downsample_ratio": 0.25}, "6 × 6 patches cannot be joined 4 × 4"),
        (None, {"image_token_id": ...}, "lacks the field 'image_token_id'"),
        (None, {"text_config": ...}, "its name ends in -hf"),
        (
            "text_config",
            {"model_type": "qwen3_moe"},
            "'model_type' is 'qwen3_moe', supported: llama, qwen2, qwen3",
        ),
        (
            "text_config",
            {"use_sliding_window": True, "sliding_window": 9},
            "'sliding_window' is 9, supported",
        ),
        (
            "text_config",
            {"model_type": "gpt_oss"},
            "'model_type' is 'gpt_oss', supported: llama, qwen2, qwen3",
        ),
        (
            "text_config",
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4096},
            "'sliding_window' is 4096, supported: null (attention to all rows)",
        ),
        (
            "text_config",
            {"model_type": "qwen3", "head_dim": 9},
            "the head width 9 is odd",
        ),
        (
            "text_config",
            {"model_type": "qwen3", "head_dim": 128, "rope_parameters": {"mrope_section": [16, 24, 20]}},
            "'mrope_section' [16, 24, 20] does not add up to half of the head width 128",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn"}},
            "'yarn' is not supported (default, linear",
        ),
        ("vision_config", {"model_type": "siglip_vision_model"}, "supported: internvl_vision"),
        ("vision_config", {"norm_type": "batch_norm"}, "supported: layer_norm, rms_norm"),
        ("vision_config", {"hidden_act": "silu"}, "'hidden_act' is 'silu', supported: gelu"),
        ("vision_config", {"image_size": [24, 48]}, "'image_size' is [24, 48], supported: squares"),
        ("vision_config", {"patch_size": "4"}, "'patch_size' is '4', expected a number of pixels"),
        ("vision_config", {"num_channels": 1}, "'num_channels' is 1, supported: 3"),
        ("vision_config", {"hidden_size": 25}, "width 25 is no multiple of 2 attention heads"),
        ("vision_config", {"num_hidden_layers": 0}, "'num_layers' is 0, expected at least 1"),
    ],
)
def test_unsupported_configs_are_refused(copy, section, fields, message):
    path = copy / "config.json"
    if section is not None:
        fields = {section: json.loads(path.read_text())[section] | fields}
    edit_json(path, **fields)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(copy)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_window_that_the_config_leaves_to_transformers_is_refused():
    """Qwen's windows have 4,096 rows where 'sliding_window' is missing."""
    text = {"model_type": "qwen3", "use_sliding_window": True}
    with pytest.raises(CheckpointError, match="'sliding_window' is 4096, supported: null"):
        InternvlConfig.from_huggingface({"text_config": text, "vision_config": {}, "image_token_id": 1})


def test_weights_without_the_norms_of_the_heads_are_refused(tmp_path):
    folder = build_internvl(tmp_path, SPECS["InternVL3.5: Qwen3"])
    edit_weights(
        folder / "model.safetensors", language_model__model__layers__1__self_attn__q_norm__weight=...
    )
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_norm\.weight") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
