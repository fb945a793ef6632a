"""Checkpoints as LLaVA's own code saves them, and VILA's first version after it.

Their ``config.json`` is that of the decoder with ``mm_…`` fields beside it; the vision tower is named there, and its
weights lie in the checkpoint (VILA, where it was trained) or in a CLIP checkpoint of their own (LLaVA-1.5). This module
turns such a config into transformers' form; names of weights are turned by :mod:`edgeprune.models.families`.

Read: haotian-liu/LLaVA c121f04, ``llava/model/llava_arch.py``, ``multimodal_encoder/clip_encoder.py``,
``multimodal_projector/builder.py`` and ``mm_utils.py``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeprune.checkpoint_weights import open_weights, read_json, weight_files
from edgeprune.errors import CheckpointError
from edgeprune.models.config_fields import read_field, require_choice

MODEL_TYPES = ("llava", "llava_llama")
IMAGE_TOKEN = "<image>"
PAD, RESIZE, CROP = "pad", "resize", "square"

# The towers of the published checkpoints, which name them without saying how large they are.
_OPENAI_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": {**_OPENAI_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_OPENAI_LARGE, "image_size": 336},
}


def saved_by_llava(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has the layout of LLaVA's own code; also after :func:`to_huggingface`."""
    return "mm_vision_tower" in config


def refuse_parts(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse VILA-1.5's layout, whose parts lie in folders of their own.

    Raises:
        CheckpointError: With what can be used instead.
    """
    if "llm_cfg" in config or "vision_tower_cfg" in config:
        raise CheckpointError(
            f"{folder} has VILA-1.5's layout (folders llm, vision_tower and mm_projector, a SigLIP tower), which "
            "is not supported: use a checkpoint of VILA-1 or LLaVA-1.5, whose config.json has 'mm_vision_tower'"
        )


def to_huggingface(config: Mapping[str, Any], folder: Path, clip: Path | None) -> dict[str, Any]:
    """The config in transformers' form, its own fields kept.

    Args:
        config: A parsed ``config.json`` of this layout.
        folder: The checkpoint.
        clip: The CLIP checkpoint of the vision tower, if the user has given one.

    Raises:
        CheckpointError: A variant that is not supported, or the tower is unknown.
    """
    require_choice(config, "model_type", MODEL_TYPES, "llava")
    require_choice(config, "mm_projector_type", ("mlp2x_gelu", "linear"), "linear")
    require_choice(config, "mm_vision_select_feature", ("patch",), "patch")
    require_choice(config, "mm_patch_merge_type", ("flat",), "flat")
    aspect = config.get("image_aspect_ratio")
    if aspect not in (None, CROP, PAD, RESIZE):
        raise CheckpointError(
            f"config.json: 'image_aspect_ratio' is {aspect!r}, supported: pad, resize, square; for LLaVA-1.6 use the "
            "checkpoint in transformers' layout (model_type 'llava_next')"
        )
    for field in ("mm_use_im_start_end", "mm_resampler_type", "s2"):
        if config.get(field):
            raise CheckpointError(
                f"config.json: '{field}' is {config[field]!r}, supported: null or false (a picture's tokens alone)"
            )
    own = ("text_config", "vision_config", "architectures", "torch_dtype")
    text = {name: value for name, value in config.items() if not name.startswith("mm_") and name not in own}
    image_token = _stated_image_token(folder)
    return {
        **config,
        "model_type": "llava",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": _tower_config(config, folder, clip),
        "vision_feature_layer": read_field(config, "mm_vision_select_layer", int, -2),
        # LLaVA's code has no token for pictures; theirs is one beyond the vocabulary.
        "image_token_index": read_field(config, "vocab_size", int, 32000)
        if image_token is None
        else image_token,
        "mm_projector_type": config.get("mm_projector_type") or "linear",
    }


def tower_folder(config: Mapping[str, Any], folder: Path, clip: Path | None) -> Path | None:
    """The CLIP checkpoint of the vision tower: the user's, or a folder that config.json names; else None."""
    if clip is not None:
        return clip
    name = Path(str(config["mm_vision_tower"]))
    return next((path for path in (name, folder / name) if (path / "config.json").is_file()), None)


def with_tower(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, clip: Path | None
) -> dict[str, Tensor]:
    """The checkpoint's tensors, with the vision tower's from its own checkpoint where they are not inside.

    Raises:
        CheckpointError: They are nowhere.
    """
    if any(name.startswith("vision_tower.") for name in tensors):
        return dict(tensors)
    source = tower_folder(config, folder, clip)
    if source is None:
        raise CheckpointError(
            f"{folder} does not contain its vision tower, '{config['mm_vision_tower']}': download that checkpoint and "
            "give its folder with --clip PATH"
        )
    prefix = "vision_model."
    tower = {
        "vision_tower." + name.removeprefix(prefix): tensor
        for name, tensor in open_weights(weight_files(source)).items()
        if name.startswith(prefix)
    }
    return {**tensors, **tower}


def _tower_config(config: Mapping[str, Any], folder: Path, clip: Path | None) -> Mapping[str, Any]:
    source = tower_folder(config, folder, clip)
    name = config["mm_vision_tower"]
    if source is None and name in _KNOWN_TOWERS:
        return _KNOWN_TOWERS[name]
    if source is None:
        raise CheckpointError(
            f"{folder} names the vision tower '{name}', whose sizes are not known: give the folder of that CLIP "
            "checkpoint with --clip PATH"
        )
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json: --clip takes the folder of a CLIP checkpoint")
    found = read_json(source / "config.json")
    section = found.get("vision_config", found)
    if found.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(section, Mapping):
        raise CheckpointError(
            f"{source} is no CLIP checkpoint: its config.json is of '{found.get('model_type')}'"
        )
    return section


def _stated_image_token(folder: Path) -> int | None:
    """The id of ``<image>``, if the tokenizer already has it."""
    added = folder / "added_tokens.json"
    if added.is_file() and isinstance(token := read_json(added).get(IMAGE_TOKEN), int):
        return token
    file = folder / "tokenizer.json"
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if file.is_file() else []
        return next((int(token["id"]) for token in tokens if token["content"] == IMAGE_TOKEN), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not a tokenizer ({error}): download the checkpoint again"
        ) from error
