"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, unpruned, against transformers: logits, positions, configurations."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json
from tiny_qwen import (
    CLASSES,
    IMAGE,
    QWEN2,
    QWEN3,
    QWEN25,
    VISION_END,
    VISION_START,
    Reference,
    TinyQwen,
    build_qwen,
    flatten_config,
    nest_weights,
    picture,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import CheckpointError, PromptError, PruningError
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.models.families import FAMILIES
from edgeprune.models.llama import rotary_angles
from edgeprune.models.qwen2_5_vl import Qwen25VlConfig
from edgeprune.models.qwen2_vl import Qwen2VlConfig
from edgeprune.models.qwen3_vision import interpolated_positions, picture_ends
from edgeprune.models.qwen3_vl import Qwen3VlConfig
from edgeprune.models.qwen_vision import row_groups
from edgeprune.positions import MULTIMODAL, prompt_positions
from edgeprune.runtimes.flat_patches import PatchPreprocessing
from edgeprune.tensor_names import PATCH_POSITIONS, PICTURE_ROWS, WINDOW_ROWS
from edgeprune.visual_layout import VisualGrid, VisualLayout

TOLERANCE = 1e-4
SPECS = {
    "qwen2_vl": QWEN2,
    "qwen2_vl tied, multi-head": TinyQwen(tied=True, kv_heads=4, mrope_section=(3, 2, 1), seed=2),
    "qwen2_vl, tokens of 3 × 3 patches": TinyQwen(merge_size=3, patch_size=2, vision_heads=3, seed=3),
    "qwen2_5_vl": QWEN25,
    "qwen2_5_vl tied, wide windows": TinyQwen("qwen2_5_vl", tied=True, window_size=32, seed=4),
    "qwen2_5_vl, windows of one token": TinyQwen("qwen2_5_vl", window_size=8, global_layers=(), seed=5),
    "qwen2_5_vl, no windows used": TinyQwen("qwen2_5_vl", global_layers=(0, 1, 2), seed=6),
    "qwen3_vl": QWEN3,
    "qwen3_vl tied, features of all layers, listed in another order": TinyQwen(
        "qwen3_vl", tied=True, deepstack_layers=(2, 0, 1), position_side=9, seed=12
    ),
    "qwen3_vl, a feature behind every decoder layer": TinyQwen(
        "qwen3_vl", layers=2, deepstack_layers=(0, 1), mrope_section=(2, 2, 2), seed=13
    ),
    "qwen3_vl, tokens of one patch, no features, one position": TinyQwen(
        "qwen3_vl", merge_size=1, patch_size=8, deepstack_layers=(), position_side=1, seed=14
    ),
}
# Width and height of every picture of a prompt.
PROMPTS = [
    [(40, 24)],
    [(9, 7)],
    [(200, 11)],
    [(8, 136)],
    [(61, 83)],
    [(24, 40), (70, 33), (16, 16)],
    [],
]


@pytest.fixture(scope="module", params=SPECS.values(), ids=SPECS.keys())
def reference(request, tmp_path_factory):
    folder = build_qwen(tmp_path_factory.mktemp("checkpoint") / "qwen", request.param)
    return Reference(folder, request.param)


@pytest.fixture
def qwen25(tmp_path):
    return build_qwen(tmp_path / "qwen", QWEN25)


@pytest.fixture
def qwen3(tmp_path):
    return build_qwen(tmp_path / "qwen", QWEN3)


def pictures_of(reference, images):
    preprocessing = picture_preprocessing_from_checkpoint(reference.folder, reference.spec.model_type)
    return preprocessing.prepare(images, (16, 16)) if images else None


def assert_same_logits(reference, inputs, images, tokens=(7, 150, 31)):
    """Prefill and every decode step."""
    model = load_checkpoint(reference.folder)
    expected = reference.steps(inputs, list(tokens))
    ids = inputs["input_ids"][0].numpy()
    state = model.prefill(ids, pictures_of(reference, images))
    assert expected[0].std() > 0.1, "the comparison would be empty"
    logits = [state.logits]
    for step, token in enumerate(tokens):
        logits.append(model.decode(token, state.next_position + step, state.caches))
    for ours, theirs in zip(logits, expected, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE
    return state


@pytest.mark.parametrize("sizes", PROMPTS, ids=str)
def test_logits_are_those_of_transformers(reference, sizes):
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    inputs = reference.chat(images, "What colour is the circle?")
    state = assert_same_logits(reference, inputs, images)
    if images:
        # Generation goes on behind the largest position, which is not the length of the sequence.
        assert state.next_position == int(
            inputs["input_ids"].shape[1] + reference.model.model.rope_deltas[0, 0]
        )


def test_pictures_among_text(reference):
    images = [picture(40, 24, 3), picture(30, 60, 4)]
    mark = VISION_START + IMAGE + VISION_END
    inputs = reference.inputs(images, f"Two squares. {mark} left of {mark} in the picture?")
    assert_same_logits(reference, inputs, images)


@pytest.mark.parametrize("spec", [QWEN2, QWEN25, QWEN3], ids=lambda spec: spec.model_type)
def test_who_attends_to_whom_shows_in_the_logits(spec, tmp_path):
    """The comparisons above would notice a wrong group, window or position."""
    reference = Reference(build_qwen(tmp_path / "qwen", spec), spec)
    images = [picture(40, 24), picture(24, 40, 1)]
    inputs = reference.chat(images, "What is it?")
    ids, model = inputs["input_ids"][0].numpy(), load_checkpoint(reference.folder)
    pictures = pictures_of(reference, images)
    right = model.prefill(ids, pictures).logits
    rows = {name: value for name, value in pictures.inputs.items() if name in (PICTURE_ROWS, WINDOW_ROWS)}
    num_patches = pictures.pixel_values.shape[0]
    for name, value in rows.items():
        together = np.arange(num_patches).reshape(1, -1)
        if name == WINDOW_ROWS:
            # Windows that begin one patch later; the graph's windows have a fixed size.
            together = value[value >= 0]
            together = np.roll(together, 1)
            shifted = value.copy()
            shifted[value >= 0] = together
            together = shifted
        wrong = type(pictures)({**pictures.inputs, name: together}, pictures.layout)
        assert (model.prefill(ids, wrong).logits - right).abs().max() > 100 * TOLERANCE, name
    swapped = type(pictures)(
        {**pictures.inputs, "patch_positions": pictures.inputs["patch_positions"][:, ::-1].copy()},
        pictures.layout,
    )
    assert (model.prefill(ids, swapped).logits - right).abs().max() > 100 * TOLERANCE


# Positions


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    texts=st.lists(st.integers(1, 7), min_size=5, max_size=5),
)
@settings(deadline=None, max_examples=80)
def test_positions_are_those_of_transformers(rope_model, sizes, texts):
    layout = VisualLayout.of_whole_grids(
        [VisualGrid(index, *size, (0.0, 0.0, 1.0, 1.0)) for index, size in enumerate(sizes)]
    )
    kinds = [0] * texts[0]
    for (rows, columns), text in zip(sizes, texts[1:], strict=False):
        kinds += [1] * rows * columns + [0] * text
    grid_thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in sizes])
    types = torch.tensor([kinds])
    theirs, deltas = rope_model.get_rope_index(torch.ones_like(types), types, image_grid_thw=grid_thw)
    ours = prompt_positions(MULTIMODAL, np.array(kinds) == 1, layout)
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())
    assert ours.max() + 1 - len(kinds) == int(deltas[0, 0])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=3),
    side=st.integers(1, 48),
    merge=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_learned_positions_are_interpolated_as_transformers_does(sizes, side, merge):
    """Grids below and above the table, of one row, one column and one token."""
    grids = [(merge * rows, merge * columns) for rows, columns in sizes]
    table = torch.randn(side**2, 3, generator=torch.Generator().manual_seed(side))
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid] for grid in grids]), side, align_corners=True, spatial_merge_size=merge
    )
    theirs = (table[indices] * weights[:, :, None]).sum(1)
    settings_ = PatchPreprocessing(
        min_pixels=1,
        max_pixels=10**8,
        patch_size=1,
        temporal_patch_size=1,
        window_tokens=0,
        resample="bicubic",
        rescale_factor=1.0,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        merge_size=merge,
    )
    prepared = settings_.prepare([Image.new("RGB", (columns, rows)) for rows, columns in grids], (16, 16))
    positions, rows = (torch.from_numpy(prepared.inputs[name]) for name in (PATCH_POSITIONS, PICTURE_ROWS))
    groups = row_groups(rows, torch.zeros(len(positions), 1), torch.float32)
    ours = interpolated_positions(table, side, positions, picture_ends(positions, rows, groups.back))
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.fixture(scope="module")
def rope_model(tmp_path_factory):
    return Reference(build_qwen(tmp_path_factory.mktemp("checkpoint") / "rope"), QWEN2).model.model


# Checkpoints of all generations


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("rewrite", "weight"),
    [
        (flatten_config, "model.layers.0.mlp.up_proj.weight"),
        (nest_weights, "model.visual.merger.mlp.0.weight"),
    ],
)
def test_checkpoints_of_all_generations(rewrite, weight, model_type, tied, tmp_path):
    spec = TinyQwen(model_type, tied=tied, seed=9)
    folder = build_qwen(tmp_path / "qwen", spec)
    before = Reference(folder, spec)
    images = [picture(30, 44)]
    inputs = before.chat(images, "How many squares?")
    rewrite(folder)
    assert ("text_config" in json.loads((folder / "config.json").read_text())) == (rewrite is nest_weights)
    names = load_file(folder / "model.safetensors")
    assert weight in names
    assert ("lm_head.weight" in names) != tied
    assert_same_logits(before, inputs, images)
    # transformers reads the same from it.
    after = Reference(folder, spec)
    assert (after.steps(inputs, [])[0] - before.steps(inputs, [])[0]).abs().max() <= 1e-6


PUBLISHED = {
    # The fields that matter of the files beside the published weights.
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "image_token_id": 151655,
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 1536,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    },
}

PUBLISHED["qwen3_vl"] = {
    # Qwen3-VL-4B.
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
        },
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def test_geometry_of_qwen3_vl_4b():
    config = Qwen3VlConfig.from_huggingface(PUBLISHED["qwen3_vl"])
    geometry, decoder, tower = config.geometry, config.decoder, config.tower_shape
    assert (decoder.head_dim, decoder.rope_theta, decoder.mrope_section) == (128, 5e6, (24, 20, 20))
    assert decoder.mrope_interleaved
    assert decoder.head_norms
    assert not decoder.attention_bias
    assert (geometry.deepstack_layers, geometry.vision_layers, geometry.patches_per_token) == (3, 24, 4)
    assert (config.vision.position_side, config.vision.deepstack_layers) == (48, (5, 11, 17))
    assert (tower.projector_sizes, config.feature_size) == ((4096, 4096, 2560), 4 * 4096)
    # Each position id turns as many frequencies as its section says.
    axes = torch.eye(3, dtype=torch.int64).unsqueeze(-1)
    turned = [int((rotary_angles(decoder, axis, torch.float64).sin != 0).sum()) for axis in axes]
    assert turned == [24, 20, 20]


def test_geometry_of_qwen2_vl_2b():
    config = Qwen2VlConfig.from_huggingface(PUBLISHED["qwen2_vl"])
    geometry, decoder, tower = config.geometry, config.decoder, config.tower_shape
    assert (decoder.hidden_size, decoder.num_layers, decoder.num_kv_heads, decoder.head_dim) == (
        1536,
        28,
        2,
        128,
    )
    assert (decoder.rope_theta, decoder.mrope_section, decoder.context_length) == (1e6, (16, 24, 24), 32768)
    assert decoder.attention_bias
    assert decoder.tie_word_embeddings
    assert (geometry.grid, geometry.patches_per_token, geometry.vision_layers) == ((16, 16), 4, 32)
    assert (geometry.one_tile, geometry.one_grid, geometry.fixed_tiles) == (False, False, False)
    assert (geometry.has_class_token, geometry.has_clip_tower) == (False, False)
    assert (tower.intermediate_size, tower.mlp_matrices, tower.window) == (5120, 2, 0)
    assert tower.projector_sizes == (5120, 5120, 1536)
    assert config.vision.patch_values == 1176


def test_geometry_of_qwen2_5_vl_3b():
    config = Qwen25VlConfig.from_huggingface(PUBLISHED["qwen2_5_vl"])
    tower = config.tower_shape
    assert (tower.intermediate_size, tower.mlp_matrices, tower.window) == (3420, 3, 64)
    assert tower.global_layers == (7, 15, 23, 31)
    assert (config.vision.head_dim, config.vision.window_tokens) == (80, 4)
    assert config.decoder.context_length == 128000


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_sizes_have_the_weights_of_transformers(model_type):
    """Name by name and shape by shape, without their values."""
    family = FAMILIES[model_type]
    with torch.device("meta"):
        theirs = CLASSES[model_type][1](CLASSES[model_type][0](**PUBLISHED[model_type]))
        ours = family.build(PUBLISHED[model_type])
    expected = {
        family.canonical_name(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected


def test_fields_of_qwen3_vl_that_are_left_out():
    """transformers' own defaults."""
    config = Qwen3VlConfig.from_huggingface(
        {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {"out_hidden_size": 4096}}
    )
    theirs = Reference.config_class("qwen3_vl")()
    decoder, text, vision, tower = config.decoder, theirs.text_config, config.vision, theirs.vision_config
    for ours, name in (
        (decoder.num_layers, "num_hidden_layers"),
        (decoder.num_heads, "num_attention_heads"),
        (decoder.num_kv_heads, "num_key_value_heads"),
        (decoder.head_dim, "head_dim"),
        (decoder.intermediate_size, "intermediate_size"),
        (decoder.vocab_size, "vocab_size"),
        (decoder.context_length, "max_position_embeddings"),
        (decoder.rms_norm_eps, "rms_norm_eps"),
        (decoder.attention_bias, "attention_bias"),
    ):
        assert ours == getattr(text, name), name
    assert decoder.rope_theta == text.rope_parameters["rope_theta"]
    assert config.image_token_id == theirs.image_token_id
    assert (vision.num_layers, vision.num_heads, vision.patch_size) == (27, 16, 16)
    assert (vision.num_layers, vision.hidden_size) == (tower.depth, tower.hidden_size)
    assert (vision.intermediate_size, vision.patch_size) == (tower.intermediate_size, tower.patch_size)
    assert vision.position_side**2 == tower.num_position_embeddings
    assert vision.deepstack_layers == tuple(tower.deepstack_visual_indexes)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_fields_that_are_left_out(model_type):
    """transformers' own defaults."""
    ours = Qwen2VlConfig if model_type == "qwen2_vl" else Qwen25VlConfig
    out = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
    config = ours.from_huggingface(
        {"model_type": model_type, "text_config": {}, "vision_config": {out: 8192}}
    )
    theirs = Reference.config_class(model_type)()
    decoder, vision = config.decoder, config.vision
    text = theirs.text_config
    assert decoder.num_layers == text.num_hidden_layers
    assert decoder.num_kv_heads == text.num_key_value_heads
    assert decoder.intermediate_size == text.intermediate_size
    assert decoder.vocab_size == text.vocab_size
    assert decoder.context_length == text.max_position_embeddings
    assert decoder.rms_norm_eps == text.rms_norm_eps
    assert decoder.rope_theta == text.rope_parameters["rope_theta"]
    assert decoder.mrope_section == (16, 24, 24)
    assert config.image_token_id == theirs.image_token_id
    assert (vision.num_layers, vision.num_heads) == (
        theirs.vision_config.depth,
        theirs.vision_config.num_heads,
    )
    assert vision.patch_size == theirs.vision_config.patch_size
    if model_type == "qwen2_5_vl":
        assert vision.hidden_size == theirs.vision_config.hidden_size
        assert vision.intermediate_size == theirs.vision_config.intermediate_size
        assert vision.window_size == theirs.vision_config.window_size
        assert vision.global_layers == tuple(theirs.vision_config.fullatt_block_indexes)
    else:
        assert vision.hidden_size == theirs.vision_config.embed_dim
        assert vision.intermediate_size == vision.hidden_size * theirs.vision_config.mlp_ratio


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (None, {"vision_config": ...}, "lacks 'vision_config'"),
        (None, {"image_token_id": "x"}, "'image_token_id' is 'x', expected int"),
        ("vision_config", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', supported: silu"),
        ("vision_config", {"in_channels": 1}, "'in_channels' is 1, supported: 3"),
        ("vision_config", {"patch_size": [4, 4]}, "'patch_size' is [4, 4], expected int"),
        ("vision_config", {"num_heads": 5}, "does not give 5 attention heads a multiple of 4"),
        ("vision_config", {"depth": 0}, "'num_layers' is 0, expected at least 1"),
        ("vision_config", {"out_hidden_size": 40}, "gives 40 values per visual token, the decoder takes 48"),
        ("vision_config", {"fullatt_block_indexes": [9]}, "names layer 9, the tower has 3"),
        (
            "vision_config",
            {"fullatt_block_indexes": "all"},
            "'fullatt_block_indexes' is 'all', expected a list",
        ),
        ("vision_config", {"window_size": 0}, "'window_size' is 0, expected at least 1"),
        ("vision_config", {"window_size": 4}, "'window_size' is 4 pixels, less than the 8 of a visual token"),
        (
            "vision_config",
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 5.0}},
            "supported: axial, theta 10000",
        ),
        ("text_config", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', supported: silu"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 2, 2]}},
            "rope_type 'yarn' is not supported",
        ),
        ("text_config", {"rope_parameters": {"mrope_section": [2, 2]}}, "does not add up to half"),
        ("text_config", {"rope_parameters": {"mrope_section": [3, 3]}}, "expected three numbers"),
        ("text_config", {"use_sliding_window": True, "sliding_window": 64}, "'sliding_window' is 64"),
    ],
)
def test_unsupported_configs_are_refused(qwen25, section, fields, message):
    path = qwen25 / "config.json"
    if section is not None:
        merged = json.loads(path.read_text())[section] | fields
        fields = {section: {name: value for name, value in merged.items() if value is not ...}}
    edit_json(path, **fields)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(qwen25)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (None, {"model_type": "qwen3_vl_moe"}, "the family 'qwen3_vl_moe' is unknown, known: llava,"),
        ("vision_config", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu', supported: gelu_pytorch_tanh"),
        (
            "vision_config",
            {"deepstack_visual_indexes": [0, 3]},
            "'deepstack_visual_indexes' names layer 3, the tower has layers 0 … 2: correct the one that is wrong",
        ),
        ("vision_config", {"deepstack_visual_indexes": [-1]}, "names layer -1"),
        ("vision_config", {"deepstack_visual_indexes": [1, 1]}, "names a layer twice: list each once"),
        ("vision_config", {"deepstack_visual_indexes": "all"}, "is 'all', expected a list of layers"),
        (
            "text_config",
            {"num_hidden_layers": 1},
            (
                "names 2 layers of the vision tower, whose features are added behind as many decoder layers, and the "
                "decoder has 1: correct the one that is wrong"
            ),
        ),
        ("vision_config", {"num_position_embeddings": 24}, "is 24, expected the square of a number"),
        (
            "vision_config",
            {"num_position_embeddings": 0},
            "the table of positions has 0 rows, not at least 1",
        ),
        ("vision_config", {"num_position_embeddings": -4}, "is -4, expected the square of a number"),
        ("vision_config", {"out_hidden_size": 40}, "gives 40 values per visual token, the decoder takes 48"),
        ("text_config", {"rope_parameters": {"mrope_section": [2, 2]}}, "does not add up to half"),
        ("text_config", {"rope_parameters": {"mrope_section": [3, 3]}}, "expected three numbers"),
    ],
)
def test_unsupported_configs_of_qwen3_vl_are_refused(qwen3, section, fields, message):
    path = qwen3 / "config.json"
    if section is not None:
        fields = {section: json.loads(path.read_text())[section] | fields}
    edit_json(path, **fields)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(qwen3)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "visual.pos_embed.weight",
        "visual.deepstack_merger_list.1.norm.weight",
        "language_model.layers.0.self_attn.q_norm.weight",
    ],
)
def test_a_missing_weight_of_qwen3_vl(qwen3, name):
    path = qwen3 / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(f"model.{name}")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is missing"):
        load_checkpoint(qwen3)


def test_a_missing_weight(qwen25):
    path = qwen25 / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("visual.blocks.0.mlp.gate_proj.weight")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.0\.mlp\.gate_proj\.weight is missing"):
        load_checkpoint(qwen25)


# Input that does not fit


def test_placeholders_that_do_not_fit(reference):
    images = [picture(40, 24)]
    inputs = reference.chat(images, "What is it?")
    ids = inputs["input_ids"][0].numpy()
    model, pictures = load_checkpoint(reference.folder), pictures_of(reference, images)
    first = int(np.flatnonzero(ids == reference.image_token_id)[0])
    count = int((ids == reference.image_token_id).sum())
    with pytest.raises(PromptError, match=rf"the ids hold {count - 1} visual .* 1 pictures need {count}"):
        model.prefill(np.delete(ids, first), pictures)
    with pytest.raises(PromptError, match="0 pictures need 0"):
        model.prefill(ids, None)


def test_the_tower_refuses_to_be_pruned(qwen25):
    model = load_checkpoint(qwen25).model
    with pytest.raises(PruningError, match="drops tokens in the decoder"):
        model.encode({}, pruner=object())
