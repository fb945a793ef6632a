"""Qwen3-VL (``model_type`` "qwen3_vl", dense): a tower with learned positions, DeepStack, M-RoPE in a Qwen3 decoder.

Bai et al., "Qwen3-VL Technical Report" (2025), §2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from edgeprune.errors import CheckpointError
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.qwen3_vision import Qwen3VisionConfig, Qwen3VisionTower
from edgeprune.models.qwen_vl import QwenVlConfig, QwenVlModel, TextDefaults, vision_section
from edgeprune.prune.method import ModelGeometry

_QWEN3_TEXT = TextDefaults(
    fields={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
    },
    rope_theta=5e5,
    mrope_section=(24, 20, 20),
)


@dataclass(frozen=True)
class Qwen3VlConfig(QwenVlConfig):
    """A checkpoint of this family."""

    vision: Qwen3VisionConfig

    text_defaults: ClassVar[TextDefaults] = _QWEN3_TEXT

    def __post_init__(self) -> None:
        super().__post_init__()
        added, layers = len(self.vision.deepstack_layers), self.decoder.num_layers
        if added > layers:
            raise CheckpointError(
                f"config.json: 'deepstack_visual_indexes' names {added} layers of the vision tower, whose features are "
                f"added behind as many decoder layers, and the decoder has {layers}: correct the one that is wrong"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "Qwen3VlConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        vision = vision_section(config)
        require_choice(vision, "hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        layers = vision.get("deepstack_visual_indexes", [8, 16, 24])
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(
                f"vision_config: 'deepstack_visual_indexes' is {layers!r}, expected a list of layers"
            )
        positions = read_field(vision, "num_position_embeddings", int, 2304)
        side = math.isqrt(max(0, positions))
        if side**2 != positions:
            raise CheckpointError(
                f"vision_config: 'num_position_embeddings' is {positions}, expected the square of a number: positions "
                "are a square grid"
            )
        tower = Qwen3VisionConfig(
            hidden_size=read_field(vision, "hidden_size", int, 1152),
            num_layers=read_field(vision, "depth", int, 27),
            num_heads=read_field(vision, "num_heads", int, 16),
            intermediate_size=read_field(vision, "intermediate_size", int, 4304),
            patch_size=read_field(vision, "patch_size", int, 16),
            temporal_patch_size=read_field(vision, "temporal_patch_size", int, 2),
            merge_size=read_field(vision, "spatial_merge_size", int, 2),
            output_size=read_field(vision, "out_hidden_size", int, 3584),
            position_side=side,
            deepstack_layers=tuple(layers),
        )
        return cls.of(config, tower, mlp_matrices=2)

    @property
    def geometry(self) -> ModelGeometry:
        """What pruning methods need to know."""
        return replace(super().geometry, deepstack_layers=len(self.vision.deepstack_layers))

    @property
    def feature_size(self) -> int:
        """Width of a visual token between tower and projector: its patches side by side, from all layers that count."""
        return (1 + len(self.vision.deepstack_layers)) * self.vision.joined_size


class Qwen3VlModel(QwenVlModel):
    """The whole model, unpruned."""

    config: Qwen3VlConfig
    visual: Qwen3VisionTower

    def __init__(self, config: Qwen3VlConfig) -> None:
        super().__init__(config, Qwen3VisionTower(config.vision))

    def project(self, features: Tensor) -> Tensor:
        """[…, (1 + J) · merge² · Cv] → […, C]."""
        return super().project(features[..., : self.config.vision.joined_size])

    def deepstack(self, features: Tensor) -> Tensor:
        """[N, (1 + J) · merge² · Cv] → [J, N, C]."""
        return self.visual.deepstack(features)
