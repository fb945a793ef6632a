"""Hugging Face checkpoint (+ pruning.json, pruning.safetensors) → :class:`PrunedModel`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.checkpoint_weights import assign_weights, fit_to_shapes, open_weights, read_json, weight_files
from edgeprune.errors import CheckpointError, PruningError
from edgeprune.models.clip import ClipTextConfig, ClipTextTower, ClipVisionTower
from edgeprune.models.config_fields import read_field
from edgeprune.models.families import FAMILIES
from edgeprune.models.llava_layout import refuse_parts, saved_by_llava, to_huggingface, with_tower
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.ivtp_guide import IvtpGuide
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.registry import method_from_parameters
from edgeprune.pruned_model import ClipParts, PrunedModel
from edgeprune.pruning_plan import PruningPlan

PRUNING_FILE = "pruning.json"
PRUNING_WEIGHTS_FILE = "pruning.safetensors"


def load_checkpoint(
    path: str | Path,
    *,
    methods: Sequence[PruningMethod] | None = None,
    clip: str | Path | None = None,
    dtype: torch.dtype | None = None,
    fused_rotary: bool = False,
) -> PrunedModel:
    """Load a checkpoint with its pruning.

    Args:
        path: Folder of a Hugging Face checkpoint; with ``pruning.json`` (and ``pruning.safetensors``) it is pruned.
        methods: The pruning to use instead of ``pruning.json``; empty = unpruned.
        clip: Folder of the CLIP checkpoint that the vision tower comes from; needed by IVTP's guided form, and by
            checkpoints that LLaVA's own code has saved without their tower.
        dtype: Type of the weights in memory; None keeps the file's, memory-mapped.
        fused_rotary: Whether the rotary embedding is traced as one ONNX operator (opset 23).

    Raises:
        CheckpointError: The folder is no usable checkpoint.
        PruningError: The pruning is unknown or does not fit the model.
    """
    folder = Path(path)
    config = read_config(folder, clip)
    model_type = str(config.get("model_type"))
    family = FAMILIES[model_type]
    with torch.device("meta"):
        model = family.build(config)
    tensors = {
        family.canonical_name(name): tensor for name, tensor in open_weights(weight_files(folder)).items()
    }
    if saved_by_llava(config):
        tensors = with_tower(tensors, config, folder, None if clip is None else Path(clip))
    embedding = tensors.get("language_model.embed_tokens.weight", torch.empty(0))
    tied = model.config.decoder.tie_word_embeddings
    if tied:
        head = tensors.setdefault("lm_head.weight", embedding)
        # A config may leave out that a checkpoint has a head of its own; the weights are right, as in transformers.
        tied = head is embedding or torch.equal(head, embedding)
    assign_weights(model, tensors, dtype, f"the checkpoint {folder}")
    if tied:
        model.lm_head.weight = model.language_model.embed_tokens.weight
    model.eval()
    plan = PruningPlan(read_methods(folder) if methods is None else tuple(methods), model.config.geometry)
    weights = _read_pruning_weights(folder, plan)
    parts = _load_clip(plan, clip, model, dtype)
    return PrunedModel(model, plan, weights, parts, fused_rotary=fused_rotary)


def read_config(folder: Path, clip: str | Path | None = None) -> dict[str, Any]:
    """Read and check ``config.json``; one that LLaVA's own code has saved is turned into transformers' form.

    Args:
        folder: The checkpoint.
        clip: Folder of the CLIP checkpoint that the vision tower comes from, if it is known.

    Raises:
        CheckpointError: Not a checkpoint, or of an unknown family.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a Hugging Face checkpoint")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: is it a Hugging Face checkpoint?")
    config = read_json(folder / "config.json")
    refuse_parts(folder, config)
    if saved_by_llava(config):
        return to_huggingface(config, folder, None if clip is None else Path(clip))
    if str(config.get("model_type")) not in FAMILIES:
        raise CheckpointError(
            f"{folder}: the family '{config.get('model_type')}' is unknown, known: {', '.join(FAMILIES)}"
        )
    return config


def read_methods(folder: Path) -> tuple[PruningMethod, ...]:
    """The methods of a checkpoint's ``pruning.json``; none without the file.

    Raises:
        PruningError: The file is malformed or names an unknown method.
    """
    path = folder / PRUNING_FILE
    if not path.is_file():
        return ()
    entries = read_json(path).get("methods")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise PruningError(f"{path}: 'methods' is not a list of {{method, parameters}} objects")
    for entry in entries:
        if not isinstance(entry.get("parameters", {}), Mapping):
            raise PruningError(
                f"{path}: 'parameters' of '{entry.get('method')}' is {entry['parameters']!r}, "
                "expected an object"
            )
    return tuple(
        method_from_parameters(str(entry.get("method")), entry.get("parameters", {})) for entry in entries
    )


def _read_pruning_weights(folder: Path, plan: PruningPlan) -> dict[str, Tensor]:
    shapes = plan.weight_shapes()
    if not shapes:
        return {}
    path = folder / PRUNING_WEIGHTS_FILE
    learned = " and ".join(sorted({name.partition(".")[0] for name in shapes}))
    if not path.is_file():
        raise PruningError(
            f"{learned} has learned weights, and {path} does not exist: train them first, or choose ivtp or random"
        )
    try:
        fitting = fit_to_shapes(
            open_weights([path]), shapes, str(path), "train the heads for this model and these parameters"
        )
    except CheckpointError as error:
        raise PruningError(str(error)) from error
    return {name: tensor.float() for name, tensor in fitting.items()}


def _load_clip(
    plan: PruningPlan, path: str | Path | None, model: VisionLanguageModel, dtype: torch.dtype | None
) -> ClipParts | None:
    """The CLIP parts of IVTP's guided form, checked to belong to the vision tower."""
    ivtp = next((method for method in plan.methods if isinstance(method, Ivtp)), None)
    if ivtp is None or ivtp.text_selection != "clip":
        return None
    if path is None:
        raise PruningError(
            "ivtp chooses instruction tokens with the CLIP text tower that belongs to the vision tower, which a LLaVA "
            "checkpoint does not contain: give its folder with --clip PATH, or use the paper's ablation that averages "
            "all instruction tokens (text_selection=all)"
        )
    folder, tower = Path(path), model.clip_tower
    assert tower is not None  # the method has refused other towers
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: --clip takes the folder of a CLIP checkpoint")
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    if config.get("model_type") != "clip" or not isinstance(text, Mapping):
        raise CheckpointError(
            f"{folder} is no CLIP checkpoint: its config.json is of '{config.get('model_type')}'"
        )
    embed_size = read_field(config, "projection_dim", int, 512)
    text_config = ClipTextConfig.from_huggingface(text, projection_dim=embed_size)
    tensors = open_weights(weight_files(folder))
    _check_same_tower(tensors, tower, folder)
    with torch.device("meta"):
        guide = IvtpGuide(
            ClipTextTower(text_config),
            nn.Linear(text_config.tower.hidden_size, embed_size, bias=False),
            ivtp.relevance_threshold,
        )
        projection = nn.Linear(tower.config.tower.hidden_size, embed_size, bias=False)
    renamed = {re.sub(r"^text_model\.", "text_tower.", name): tensor for name, tensor in tensors.items()}
    kept = dtype if dtype is not None else model.lm_head.weight.dtype
    assign_weights(guide, renamed, kept, f"the text tower in {folder}")
    assign_weights(
        projection, {"weight": tensors.get("visual_projection.weight", torch.empty(0))}, kept, f"{folder}"
    )
    return ClipParts(guide, projection)


def _check_same_tower(tensors: Mapping[str, Tensor], tower: ClipVisionTower, folder: Path) -> None:
    """A text tower of another CLIP would choose tokens at random without anybody noticing."""
    last = tower.config.tower.num_layers - 1
    ours = tower.state_dict()
    for name in (
        "embeddings.patch_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
        f"encoder.layers.{last}.mlp.fc1.weight",
    ):
        theirs = tensors.get(f"vision_model.{name}")
        same_shape = theirs is not None and theirs.shape == ours[name].shape
        # Either may be stored in half precision.
        if (
            theirs is None
            or not same_shape
            or not torch.allclose(theirs.float(), ours[name].float(), atol=1e-3)
        ):
            raise CheckpointError(
                f"the vision tower in {folder} is not the one of this LLaVA checkpoint ({name} differs): give the "
                "CLIP it was made from"
            )
