"""LLaVA-1.5 (``model_type`` "llava"): CLIP vision tower, two-layer projector, Llama/Vicuna decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import CheckpointError
from edgeprune.models.clip import ClipVisionConfig, ClipVisionTower, FeaturePruner, FeatureTokens
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.llama import LlamaConfig
from edgeprune.models.vision_language import TowerFeatures, TowerShape, TypicalPicture, VisionLanguageModel
from edgeprune.models.vision_pruning import VisionPruner
from edgeprune.prune.method import ModelGeometry
from edgeprune.tensor_names import PIXEL_VALUES
from edgeprune.tensor_spec import TensorSpec

MODEL_TYPE = "llava"


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-1.5 checkpoint.

    Attributes:
        vision: The vision tower.
        decoder: The decoder.
        feature_layer: Index into the tower's hidden states (0 = embeddings), not negative.
        projector_bias: Whether the projector has biases.
        image_token_id: Placeholder token of a visual token.
        projector_layers: Linear layers of the projector: 2 with a GELU between, or 1.
    """

    vision: ClipVisionConfig
    decoder: LlamaConfig
    feature_layer: int
    projector_bias: bool
    image_token_id: int
    projector_layers: int

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlavaConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        text, vision_section = config.get("text_config"), config.get("vision_config")
        if not isinstance(text, Mapping) or not isinstance(vision_section, Mapping):
            raise CheckpointError(
                "config.json lacks 'text_config' or 'vision_config': is this a LLaVA checkpoint?"
            )
        require_choice(config, "projector_hidden_act", ("gelu",), "gelu")
        # "full" would feed the class token to the decoder as one more visual token without a grid position.
        require_choice(config, "vision_feature_select_strategy", ("default",), "default")
        vision = ClipVisionConfig.from_huggingface(vision_section)
        layer = read_field(config, "vision_feature_layer", int, -2)
        num_states = vision.tower.num_layers + 1
        if not -num_states <= layer < num_states:
            raise CheckpointError(
                f"config.json: 'vision_feature_layer' is {layer}, the tower has {num_states} states"
            )
        image_token = config.get("image_token_index", config.get("image_token_id"))
        if not isinstance(image_token, int):
            raise CheckpointError("config.json lacks 'image_token_index': is this a LLaVA checkpoint?")
        tied = bool(config.get("tie_word_embeddings", False)) or bool(text.get("tie_word_embeddings", False))
        return cls(
            vision=vision,
            decoder=LlamaConfig.from_huggingface(text, tie_word_embeddings=tied),
            feature_layer=layer % num_states,
            projector_bias=read_field(config, "multimodal_projector_bias", bool, True),
            image_token_id=image_token,
            # A field of LLaVA's own code; transformers knows the two-layer projector alone.
            projector_layers=1 if config.get("mm_projector_type") == "linear" else 2,
        )

    @property
    def geometry(self) -> ModelGeometry:
        """What pruning methods need to know."""
        return ModelGeometry(
            num_layers=self.decoder.num_layers,
            hidden_size=self.decoder.hidden_size,
            num_heads=self.decoder.num_heads,
            head_dim=self.decoder.head_dim,
            grid=self.vision.grid,
            vision_layers=self.feature_layer,
            has_class_token=True,
        )

    @property
    def feature_size(self) -> int:
        """Width of a patch behind the tower."""
        return self.vision.tower.hidden_size

    @property
    def tower_shape(self) -> TowerShape:
        """The vision tower's sizes."""
        width = self.vision.tower.hidden_size
        return TowerShape(
            hidden_size=width,
            intermediate_size=self.vision.tower.intermediate_size,
            mlp_matrices=2,
            class_tokens=1,
            window=0,
            global_layers=(),
            projector_sizes=(width, *[self.decoder.hidden_size] * self.projector_layers),
        )

    @property
    def typical_picture(self) -> TypicalPicture:
        """Every picture is one tile."""
        return TypicalPicture(tiles=1, tokens=self.geometry.num_patches)


class LlavaProjector(nn.Module):
    """The projector: two layers, or in the first LLaVA one."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width = config.decoder.hidden_size
        self.linear_1 = nn.Linear(config.vision.tower.hidden_size, width, bias=config.projector_bias)
        if config.projector_layers == 2:
            self.linear_2 = nn.Linear(width, width, bias=config.projector_bias)
        self.num_layers = config.projector_layers

    def forward(self, features: Tensor) -> Tensor:
        """[…, Cv] → […, C]."""
        out: Tensor = self.linear_1(features)
        if self.num_layers == 2:
            out = self.linear_2(F.gelu(out))
        return out


class LlavaModel(VisionLanguageModel):
    """The whole model, unpruned."""

    config: LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        side = config.vision.image_size
        self.vision_inputs = (TensorSpec(PIXEL_VALUES, "model", ("tiles", 3, side, side)),)
        self.vision_tower = ClipVisionTower(config.vision)
        self.multi_modal_projector = LlavaProjector(config)

    @property
    def clip_tower(self) -> ClipVisionTower:
        """The vision tower."""
        return self.vision_tower

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        *,
        pruner: VisionPruner | None = None,
        feature_pruner: FeaturePruner | None = None,
        pooled: bool = False,
    ) -> TowerFeatures:
        """Turn pictures [T, 3, height, width] into patch features."""
        vision = self.vision_tower(
            inputs[PIXEL_VALUES],
            num_feature_layers=self.config.feature_layer,
            pruner=pruner,
            pooled=pooled,
        )
        tokens = FeatureTokens(vision.hidden[:, 1:], vision.slots, None)
        if feature_pruner is not None:
            tokens = feature_pruner.prune_features(vision)
        return TowerFeatures(tokens.features, tokens.slots, tokens.counts, vision.hidden[:, 0], vision.pooled)

    def project(self, features: Tensor) -> Tensor:
        """[…, Cv] → […, C]."""
        projected: Tensor = self.multi_modal_projector(features)
        return projected
