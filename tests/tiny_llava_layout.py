"""A tiny checkpoint in the layout of LLaVA's own code, beside the same model in transformers' layout."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import TinyLlava, build_clip, build_llava, edit_json
from tiny_processors import llama_tokenizer
from transformers import CLIPImageProcessor, LlamaTokenizer

NUM_TOKENS = 420  # of llama_tokenizer, without those that are added to it
SPEC = TinyLlava(vocab_size=NUM_TOKENS + 1, layers=3, vision_layers=3, seed=30)
TOWER_NAME = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class BothLayouts:
    """The same weights twice.

    Attributes:
        transformers: A folder that transformers reads; its vocabulary has one row more, for ``<image>``.
        inside: LLaVA's layout, the vision tower inside.
        outside: LLaVA's layout, the vision tower in ``clip`` alone.
        clip: A CLIP checkpoint with the vision tower.
    """

    transformers: Path
    inside: Path
    outside: Path
    clip: Path


def build_both(folder: Path, **fields: Any) -> BothLayouts:
    """Write all folders; ``fields`` are set in LLaVA's ``config.json``."""
    theirs = build_llava(folder / "transformers", SPEC)
    clip = build_clip(folder / "clip", theirs, SPEC)
    side = SPEC.image_size
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(clip)
    inside = folder / "inside"
    inside.mkdir()
    config = llava_config() | fields
    (inside / "config.json").write_text(json.dumps(config))
    linear = config["mm_projector_type"] == "linear"
    weights = {
        llava_name(name, linear=linear): tensor.clone()
        for name, tensor in load_file(theirs / "model.safetensors").items()
        if not (linear and ".linear_2." in name)
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:NUM_TOKENS].clone()
    # What old transformers versions saved besides.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, inside / "model.safetensors")
    tokenizer().save_pretrained(inside)
    outside = Path(shutil.copytree(inside, folder / "outside"))
    without = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    save_file(without, outside / "model.safetensors")
    return BothLayouts(theirs, inside, outside, clip)


def tokenizer() -> LlamaTokenizer:
    """That of Llama's form, as LLaVA saves it: no token for pictures."""
    model = json.loads(llama_tokenizer().backend_tokenizer.to_str())["model"]
    return LlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True
    )


def llava_config() -> dict[str, Any]:
    """The fields of llava-v1.5-7b's config.json."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": SPEC.hidden_size,
        "head_dim": SPEC.head_dim,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": SPEC.intermediate_size,
        "max_position_embeddings": 512,
        "mm_hidden_size": SPEC.vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER_NAME,
        "model_type": "llava",
        "num_attention_heads": SPEC.heads,
        "num_hidden_layers": SPEC.layers,
        "num_key_value_heads": SPEC.kv_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": NUM_TOKENS,
    }


def llava_name(name: str, *, linear: bool = False) -> str:
    """A weight's name in LLaVA's layout, from transformers'."""
    if ".lm_head." in name or name.startswith("lm_head."):
        return "lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return "model." + name.removeprefix("language_model.").removeprefix("model.")
    if name.startswith("vision_tower."):
        rest = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        return "model.vision_tower.vision_tower.vision_model." + rest
    first = "model.mm_projector." if linear else "model.mm_projector.0."
    return name.replace("multi_modal_projector.linear_1.", first).replace(
        "multi_modal_projector.linear_2.", "model.mm_projector.2."
    )


def with_config(folder: Path, copy: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with other fields in its ``config.json``."""
    shutil.copytree(folder, copy)
    edit_json(copy / "config.json", **fields)
    return copy
