"""Qwen2.5-VL (``model_type`` "qwen2_5_vl"): Qwen2-VL with RMS norms, gated MLPs and windows in the vision tower.

Bai et al., "Qwen2.5-VL Technical Report" (2025), §2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import CheckpointError
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.qwen_vision import NORM_EPS, QwenVisionConfig, QwenVisionTower
from edgeprune.models.qwen_vl import QwenVlConfig, QwenVlModel, vision_section


@dataclass(frozen=True)
class Qwen25VlConfig(QwenVlConfig):
    """A checkpoint of this family."""

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "Qwen25VlConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        vision = vision_section(config)
        require_choice(vision, "hidden_act", ("silu",), "silu")
        layers = vision.get("fullatt_block_indexes", [7, 15, 23, 31])
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise CheckpointError(
                f"vision_config: 'fullatt_block_indexes' is {layers!r}, expected a list of layers"
            )
        window = read_field(vision, "window_size", int, 112)
        if window < 1:
            raise CheckpointError(f"vision_config: 'window_size' is {window}, expected at least 1")
        tower = QwenVisionConfig(
            hidden_size=read_field(vision, "hidden_size", int, 3584),
            num_layers=read_field(vision, "depth", int, 32),
            num_heads=read_field(vision, "num_heads", int, 16),
            intermediate_size=read_field(vision, "intermediate_size", int, 3420),
            patch_size=read_field(vision, "patch_size", int, 14),
            temporal_patch_size=read_field(vision, "temporal_patch_size", int, 2),
            merge_size=read_field(vision, "spatial_merge_size", int, 2),
            output_size=read_field(vision, "out_hidden_size", int, 3584),
            window_size=window,
            global_layers=tuple(layers),
        )
        return cls.of(config, tower, mlp_matrices=3)


class Qwen25VisionMlp(nn.Module):
    """The gated MLP, with biases."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] → [P, C]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Qwen25VlModel(QwenVlModel):
    """The whole model, unpruned."""

    def __init__(self, config: Qwen25VlConfig) -> None:
        vision = config.vision
        tower = QwenVisionTower(
            vision,
            norm=lambda: nn.RMSNorm(vision.hidden_size, eps=NORM_EPS),
            mlp=lambda: Qwen25VisionMlp(vision),
        )
        super().__init__(config, tower)
