"""Qwen2-VL (``model_type`` "qwen2_vl"): pictures of any size, full attention in the tower, M-RoPE in a Qwen2 decoder.

Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution" (2024), §2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import CheckpointError
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.qwen_vision import NORM_EPS, QwenVisionConfig, QwenVisionTower
from edgeprune.models.qwen_vl import QwenVlConfig, QwenVlModel, vision_section


@dataclass(frozen=True)
class Qwen2VlConfig(QwenVlConfig):
    """A checkpoint of this family."""

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "Qwen2VlConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        vision = vision_section(config)
        require_choice(vision, "hidden_act", ("quick_gelu",), "quick_gelu")
        width = read_field(vision, "embed_dim", int, 1280)
        ratio = read_field(vision, "mlp_ratio", float, 4.0)
        tower = QwenVisionConfig(
            hidden_size=width,
            num_layers=read_field(vision, "depth", int, 32),
            num_heads=read_field(vision, "num_heads", int, 16),
            intermediate_size=int(width * ratio),
            patch_size=read_field(vision, "patch_size", int, 14),
            temporal_patch_size=read_field(vision, "temporal_patch_size", int, 2),
            merge_size=read_field(vision, "spatial_merge_size", int, 2),
            output_size=read_field(vision, "hidden_size", int, 3584),
        )
        if tower.intermediate_size < 1:
            raise CheckpointError(f"vision_config: 'mlp_ratio' is {ratio}, expected more than 0")
        return cls.of(config, tower, mlp_matrices=2)


class Qwen2VisionMlp(nn.Module):
    """The two-layer MLP with QuickGELU."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] → [P, C]."""
        inner = self.fc1(x)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class Qwen2VlModel(QwenVlModel):
    """The whole model, unpruned."""

    def __init__(self, config: Qwen2VlConfig) -> None:
        vision = config.vision
        tower = QwenVisionTower(
            vision,
            norm=lambda: nn.LayerNorm(vision.hidden_size, eps=NORM_EPS),
            mlp=lambda: Qwen2VisionMlp(vision),
        )
        super().__init__(config, tower)
