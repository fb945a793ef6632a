"""LLaVA-1.5 (``model_type`` "llava"): CLIP vision tower, two-layer projector, Llama/Vicuna decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import CheckpointError
from edgeprune.models.clip import ClipVisionConfig, ClipVisionTower, VisionPruner
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.llama import LlamaConfig, LlamaDecoder
from edgeprune.prune.method import ModelGeometry

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
    """

    vision: ClipVisionConfig
    decoder: LlamaConfig
    feature_layer: int
    projector_bias: bool
    image_token_id: int

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
        require_choice(text, "model_type", ("llama",), "llama")
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


class PictureTokens(NamedTuple):
    """Pictures as visual tokens.

    Shapes:
        features: [M, K, C] after the projector.
        slots: [M, K] int64, positions in the picture's grid.
        class_features: [M, C], the class token at the feature layer through the projector.
        pooled: [M, Cv], the tower's final class token, or None.
    """

    features: Tensor
    slots: Tensor
    class_features: Tensor
    pooled: Tensor | None


class LlavaProjector(nn.Module):
    """The two-layer projector."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width = config.decoder.hidden_size
        self.linear_1 = nn.Linear(config.vision.tower.hidden_size, width, bias=config.projector_bias)
        self.linear_2 = nn.Linear(width, width, bias=config.projector_bias)

    def forward(self, features: Tensor) -> Tensor:
        """[…, Cv] → […, C]."""
        out: Tensor = self.linear_2(F.gelu(self.linear_1(features)))
        return out


class LlavaModel(nn.Module):
    """The whole model, unpruned; parameter names follow Hugging Face without the ``model.`` prefixes."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = ClipVisionTower(config.vision)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = LlamaDecoder(config.decoder)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        if config.decoder.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def encode_pictures(
        self,
        pixel_values: Tensor,
        *,
        pruner: VisionPruner | None = None,
        projector_slots: tuple[int, ...] | None = None,
        pooled: bool = False,
    ) -> PictureTokens:
        """Turn pictures into visual tokens.

        Shapes:
            pixel_values: [M, 3, height, width].

        Args:
            pixel_values: Preprocessed pictures.
            pruner: Drops tokens inside the tower.
            projector_slots: The patches that enter the projector, if not all.
            pooled: Whether the tower's final class token is wanted.
        """
        vision = self.vision_tower(
            pixel_values, num_feature_layers=self.config.feature_layer, pruner=pruner, pooled=pooled
        )
        patches, slots = vision.hidden[:, 1:], vision.slots
        if projector_slots is not None:
            chosen = torch.tensor(projector_slots, dtype=torch.int64, device=slots.device)
            patches, slots = patches.index_select(1, chosen), slots.index_select(1, chosen)
        return PictureTokens(
            features=self.multi_modal_projector(patches),
            slots=slots,
            class_features=self.multi_modal_projector(vision.hidden[:, 0]),
            pooled=vision.pooled,
        )

    def embed(self, input_ids: Tensor, image_features: Tensor, image_slots: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings with the visual tokens in the place of their placeholders.

        Shapes:
            input_ids: [1, S] int64; image_features: [N, C]; image_slots: [N] int64.
            returns: hidden states [1, S, C] and visual slots [S] int64 (-1 for text).

        The placeholders are found in the ids; the n-th takes the n-th visual token.
        """
        is_visual = input_ids == self.config.image_token_id
        order = (is_visual.to(torch.int64).cumsum(dim=1) - 1).clamp(min=0)
        # Placeholders are counted by the caller; rows of text read row 0 and throw it away.
        visual = image_features[order[0]].unsqueeze(0)
        text = self.language_model.embed_tokens(input_ids)
        hidden = torch.where(is_visual.unsqueeze(-1), visual, text)
        return hidden, torch.where(is_visual[0], image_slots[order[0]], -1)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [B, S, C] → [B, S, V]."""
        logits: Tensor = self.lm_head(self.language_model.norm(hidden))
        return logits
