"""InternVL 2, 2.5, 3 and 3.5 in Hugging Face's format (``model_type`` "internvl").

InternViT, pixel shuffle (squares of patches become one visual token), a projector of two layers, and a Llama,
Qwen2 or Qwen3 decoder. A picture is cut into tiles, and seen as a whole beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import CheckpointError
from edgeprune.models.clip import FeaturePruner
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.internvl_vision import InternvlVisionConfig, InternvlVisionTower
from edgeprune.models.llama import LlamaConfig
from edgeprune.models.vision_language import TowerFeatures, TowerShape, TypicalPicture, VisionLanguageModel
from edgeprune.models.vision_pruning import VisionPruner
from edgeprune.prune.method import ModelGeometry
from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.tensor_spec import TensorSpec

MODEL_TYPE = "internvl"
TEXT_MODEL_TYPES = ("llama", "qwen2", "qwen3")

# How many patches a side of the square that becomes one visual token has.
_JOINED_BY_RATIO = {0.5: 2, 0.25: 4}

# A picture of 4:3 at the processors' usual limit of 12 tiles, and its overview.
_TYPICAL_TILES = 13


@dataclass(frozen=True)
class InternvlConfig:
    """An InternVL checkpoint.

    Attributes:
        vision: The vision tower.
        decoder: The decoder.
        feature_layers: Layers of the tower that run.
        final_norm: Whether the norm behind the last layer runs, if the tower has one.
        joined: Side of the square of patches that become one visual token.
        image_token_id: Placeholder token of a visual token.
    """

    vision: InternvlVisionConfig
    decoder: LlamaConfig
    feature_layers: int
    final_norm: bool
    joined: int
    image_token_id: int

    def __post_init__(self) -> None:
        side = self.vision.patches_per_side
        if side < self.joined or side % self.joined:
            raise CheckpointError(
                f"config.json: {side} × {side} patches cannot be joined {self.joined} × {self.joined} to visual "
                "tokens: 'image_size', 'patch_size' and 'downsample_ratio' do not fit"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "InternvlConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        text, vision_section = config.get("text_config"), config.get("vision_config")
        if not isinstance(text, Mapping) or not isinstance(vision_section, Mapping):
            raise CheckpointError(
                "config.json lacks 'text_config' or 'vision_config': is this an InternVL checkpoint in Hugging "
                "Face's format (its name ends in -hf)?"
            )
        require_choice(config, "projector_hidden_act", ("gelu",), "gelu")
        # With the class token, "full", the patches would be no square.
        require_choice(config, "vision_feature_select_strategy", ("default",), "default")
        ratio = read_field(config, "downsample_ratio", float, 0.5)
        if ratio not in _JOINED_BY_RATIO:
            supported = ", ".join(map(str, _JOINED_BY_RATIO))
            raise CheckpointError(f"config.json: 'downsample_ratio' is {ratio}, supported: {supported}")
        vision = InternvlVisionConfig.from_huggingface(vision_section)
        layer = read_field(config, "vision_feature_layer", int, -1)
        num_states = vision.num_layers + 1
        if not -num_states <= layer < num_states:
            raise CheckpointError(
                f"config.json: 'vision_feature_layer' is {layer}, the tower has {num_states} states"
            )
        model_type = require_choice(text, "model_type", TEXT_MODEL_TYPES, "qwen2")
        text = {**text, "model_type": model_type}
        tied = bool(config.get("tie_word_embeddings", True)) or bool(text.get("tie_word_embeddings", False))
        return cls(
            vision=vision,
            decoder=LlamaConfig.from_huggingface(text, tie_word_embeddings=tied),
            feature_layers=layer % num_states,
            final_norm=layer == -1,
            joined=_JOINED_BY_RATIO[ratio],
            image_token_id=read_field(config, "image_token_id", int),
        )

    @property
    def geometry(self) -> ModelGeometry:
        """What pruning methods need to know."""
        side = self.vision.patches_per_side // self.joined
        return ModelGeometry(
            num_layers=self.decoder.num_layers,
            hidden_size=self.decoder.hidden_size,
            num_heads=self.decoder.num_heads,
            head_dim=self.decoder.head_dim,
            grid=(side, side),
            vision_layers=self.feature_layers,
            has_class_token=True,
            one_tile=False,
            patches_per_token=self.joined**2,
            has_clip_tower=False,
        )

    @property
    def feature_size(self) -> int:
        """Width of a visual token behind the tower: that of its patches, one after the other."""
        return self.joined**2 * self.vision.hidden_size

    @property
    def tower_shape(self) -> TowerShape:
        """The vision tower's sizes."""
        width = self.decoder.hidden_size
        return TowerShape(
            hidden_size=self.vision.hidden_size,
            intermediate_size=self.vision.intermediate_size,
            mlp_matrices=2,
            class_tokens=1,
            window=0,
            global_layers=(),
            projector_sizes=(self.feature_size, width, width),
        )

    @property
    def typical_picture(self) -> TypicalPicture:
        """A picture of 4:3."""
        return TypicalPicture(tiles=_TYPICAL_TILES, tokens=_TYPICAL_TILES * self.geometry.num_patches)


class InternvlProjector(nn.Module):
    """Norm and two layers; parameter names follow Hugging Face."""

    def __init__(self, config: InternvlConfig) -> None:
        super().__init__()
        width = config.decoder.hidden_size
        self.layer_norm = nn.LayerNorm(config.feature_size)
        self.linear_1 = nn.Linear(config.feature_size, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[…, F] → […, C]."""
        out: Tensor = self.linear_2(F.gelu(self.linear_1(self.layer_norm(features))))
        return out


class InternvlModel(VisionLanguageModel):
    """The whole model, unpruned."""

    config: InternvlConfig

    def __init__(self, config: InternvlConfig) -> None:
        super().__init__(config)
        side = config.vision.image_size
        self.vision_inputs = (TensorSpec(PIXEL_VALUES, "model", ("tiles", 3, side, side)),)
        self.vision_tower = InternvlVisionTower(config.vision)
        self.multi_modal_projector = InternvlProjector(config)

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        *,
        pruner: VisionPruner | None = None,
        feature_pruner: FeaturePruner | None = None,
        pooled: bool = False,
    ) -> TowerFeatures:
        """Turn tiles [T, 3, side, side] into visual tokens.

        No ``feature_pruner`` and no ``pooled`` class token: both belong to CLIP's towers.
        """
        del feature_pruner, pooled
        features, slots = self.vision_tower(
            inputs[PIXEL_VALUES],
            num_layers=self.config.feature_layers,
            final_norm=self.config.final_norm,
            joined=self.config.joined,
            pruner=pruner,
        )
        return TowerFeatures(features, slots, None, None, None)

    def project(self, features: Tensor) -> Tensor:
        """[…, F] → […, C]."""
        projected: Tensor = self.multi_modal_projector(features)
        return projected
