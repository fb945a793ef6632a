"""Checkpoints of LLaVA's own code give the logits of the same model in transformers' layout."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import random_prompt
from tiny_llava_layout import NUM_TOKENS, SPEC, BothLayouts, build_both, with_config
from transformers import LlavaForConditionalGeneration

from edgeprune.checkpoint import load_checkpoint, read_config
from edgeprune.errors import CheckpointError
from edgeprune.prune.fastv import FastV

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> BothLayouts:
    return build_both(tmp_path_factory.mktemp("both"))


def prompts():
    """Token ids with transformers' placeholder, which is an ordinary token of ours, and pictures."""
    for num_images in (0, 1, 2):
        ids, pictures = random_prompt(SPEC, num_images=num_images, seed=num_images)
        # The row that transformers' layout has more is no text.
        yield np.where(ids == NUM_TOKENS, 11, ids), pictures


@torch.no_grad()
def their_logits(model, ids, pictures):
    pixels = {} if pictures is None else {"pixel_values": torch.from_numpy(pictures.pixel_values)}
    return model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **pixels).logits[0, -1, :NUM_TOKENS]


def assert_same(ours, theirs):
    for ids, pictures in prompts():
        own = np.where(ids == theirs.config.image_token_id, NUM_TOKENS, ids)
        state = ours.prefill(own, pictures)
        logits = state.logits
        for step in range(3):
            expected = their_logits(theirs, ids, pictures)
            assert expected.std() > 0.1
            assert logits.shape == (NUM_TOKENS,)
            assert (logits - expected).abs().max() <= TOLERANCE
            token = 10 + 17 * step
            ids = np.append(ids, token)
            logits = ours.decode(token, state.next_position + step, state.caches)


@pytest.mark.parametrize(
    ("place", "model_type"), [("inside", "llava"), ("outside", "llava"), ("inside", "llava_llama")]
)
def test_logits_are_those_of_transformers(both, tmp_path, place, model_type):
    folder = with_config(getattr(both, place), tmp_path / "copy", model_type=model_type)
    theirs = LlavaForConditionalGeneration.from_pretrained(both.transformers, dtype=torch.float32).eval()
    assert_same(load_checkpoint(folder, clip=both.clip), theirs)


def test_a_linear_projector(tmp_path):
    """transformers has none: its module is replaced by one."""
    both = build_both(tmp_path, mm_projector_type="linear")
    theirs = LlavaForConditionalGeneration.from_pretrained(both.transformers, dtype=torch.float32).eval()
    theirs.model.multi_modal_projector = theirs.model.multi_modal_projector.linear_1
    ours = load_checkpoint(both.inside, clip=both.clip)
    assert_same(ours, theirs)
    assert ours.model.config.tower_shape.projector_sizes == (SPEC.vision_hidden, SPEC.hidden_size)
    assert ours.plan.geometry.grid == (6, 6)


def test_the_tower_inside_wins_over_the_one_given(both, tmp_path):
    """VILA trains its tower: the CLIP checkpoint then only says how large it is."""
    folder = with_config(both.inside, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors")
    trained, given = (
        load_checkpoint(path, clip=both.clip).model.state_dict()["vision_tower.embeddings.class_embedding"]
        for path in (folder, both.outside)
    )
    assert torch.allclose(trained, given + 1)


def test_a_tower_in_a_folder_that_the_config_names(both, tmp_path):
    for name in (str(both.clip), "../clip-beside"):
        (tmp_path / "clip-beside").symlink_to(both.clip) if name.startswith("..") else None
        folder = with_config(both.outside, tmp_path / f"copy{len(name)}", mm_vision_tower=name)
        assert load_checkpoint(folder).plan.geometry.grid == (6, 6)


def test_the_config_in_transformers_form(both):
    config = read_config(both.inside, both.clip)
    assert config["model_type"] == "llava"
    assert config["image_token_index"] == NUM_TOKENS
    assert config["text_config"]["model_type"] == "llama"
    assert config["text_config"]["rms_norm_eps"] == 1e-6
    assert config["vision_config"]["image_size"] == SPEC.image_size
    # Without a folder, the sizes of OpenAI's towers are known.
    assert read_config(both.inside)["vision_config"]["hidden_size"] == 1024
    assert read_config(both.inside)["vision_config"]["image_size"] == 336


def test_pruning_works_as_in_the_other_layout(both):
    """FastV keeps the same tokens, whose layout is that of the checkpoint no more."""
    method = FastV(layer=2, keep=9)
    theirs = load_checkpoint(both.transformers, methods=[method])
    ours = load_checkpoint(both.outside, clip=both.clip, methods=[method])
    ids, pictures = random_prompt(SPEC, num_images=1, seed=5)
    expected = theirs.prefill(ids, pictures)
    state = ours.prefill(np.where(ids == 3, NUM_TOKENS, ids), pictures)
    assert state.sites == expected.sites
    assert (state.logits - expected.logits[:NUM_TOKENS]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mm_projector_type": "mlp_downsample"},
            "'mm_projector_type' is 'mlp_downsample', supported: mlp2x_gelu, linear",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, "'cls_patch', supported: patch"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "'spatial_unpad', supported: flat"),
        ({"image_aspect_ratio": "anyres"}, "'anyres', supported: pad, resize, square; for LLaVA-1.6 use"),
        ({"mm_use_im_start_end": True}, "'mm_use_im_start_end' is True, supported: null or false"),
        ({"mm_resampler_type": "perceiver"}, "'mm_resampler_type' is 'perceiver'"),
        ({"model_type": "llava_mpt"}, "'llava_mpt', supported: llava, llava_llama"),
        (
            {"mm_vision_tower": "google/siglip-so400m"},
            "'google/siglip-so400m', whose sizes are not known: give the folder",
        ),
        ({"mm_vision_select_layer": "last"}, "'mm_vision_select_layer' is 'last', expected int"),
        ({"llm_cfg": {}, "vision_tower_cfg": {}}, "VILA-1.5's layout"),
    ],
)
def test_unsupported_configs_are_refused(both, tmp_path, fields, message):
    folder = with_config(both.inside, tmp_path / "copy", **fields)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tower_that_is_nowhere(both):
    with pytest.raises(
        CheckpointError, match=r"does not contain its vision tower, 'openai/.*--clip PATH"
    ) as error:
        load_checkpoint(both.outside)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json: --clip takes"),
        (
            {"model_type": "siglip", "vision_config": {}},
            "is no CLIP checkpoint: its config.json is of 'siglip'",
        ),
    ],
)
def test_a_folder_that_is_no_clip(both, tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(both.outside, clip=tmp_path)
