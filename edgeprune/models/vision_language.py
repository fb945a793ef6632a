"""What every model family offers: pictures to features, features to visual tokens, and a decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from edgeprune.models.clip import ClipVisionTower, FeaturePruner
from edgeprune.models.llama import LlamaConfig, LlamaDecoder
from edgeprune.models.vision_pruning import VisionPruner
from edgeprune.prune.method import ModelGeometry
from edgeprune.tensor_spec import TensorSpec


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower, for the cost model.

    Attributes:
        hidden_size: Width.
        intermediate_size: Width of the MLP.
        mlp_matrices: Matrices of the MLP: 2, or 3 where it is gated.
        class_tokens: Rows of a tile that are no patches.
        window: Patches that attend to each other, in the layers that do not attend to all; 0 = every layer attends
            to all.
        global_layers: Layers that attend to all patches, where ``window`` is given.
        projector_sizes: Widths that a visual token's features have on the way to the decoder, first to last.
    """

    hidden_size: int
    intermediate_size: int
    mlp_matrices: int
    class_tokens: int
    window: int
    global_layers: tuple[int, ...]
    projector_sizes: tuple[int, ...]


@dataclass(frozen=True)
class TypicalPicture:
    """A picture that reports count with, where pictures differ.

    Attributes:
        tiles: Tiles that the tower sees.
        tokens: Its visual tokens before pruning.
        inserted: Those of them that are no outputs of the tower.
    """

    tiles: int
    tokens: int
    inserted: int = 0


class FamilyConfig(Protocol):
    """The configuration of a checkpoint of any family."""

    @property
    def decoder(self) -> LlamaConfig:
        """The decoder."""

    @property
    def image_token_id(self) -> int:
        """Placeholder token of a visual token."""

    @property
    def geometry(self) -> ModelGeometry:
        """What pruning methods need to know."""

    @property
    def feature_size(self) -> int:
        """F: width of a visual token between tower and projector."""

    @property
    def tower_shape(self) -> TowerShape:
        """The vision tower's sizes."""

    @property
    def typical_picture(self) -> TypicalPicture:
        """What reports count with."""


class TowerFeatures(NamedTuple):
    """Tiles behind the vision tower.

    Shapes:
        features: [T, K, F], what the projector takes.
        slots: [T, K] int64, places in the tile's grid, row-major.
        counts: [T] int64, how many of the K are tokens, the first ones; None = all.
        class_hidden: [T, Cv], the class token at the feature layer, or None.
        pooled: [T, Cv], the tower's final class token, or None unless asked for.
    """

    features: Tensor
    slots: Tensor
    counts: Tensor | None
    class_hidden: Tensor | None
    pooled: Tensor | None


class VisionLanguageModel(nn.Module):
    """A model, unpruned; parameter names follow Hugging Face without the ``model.`` prefixes.

    A family adds its vision tower and projector.

    Attributes:
        config: The checkpoint's configuration.
        language_model: The decoder.
        lm_head: The head; shares the embedding matrix where the checkpoint ties them.
        vision_inputs: What the tower takes; the first is ``pixel_values``.
    """

    config: FamilyConfig
    vision_inputs: tuple[TensorSpec, ...]

    def __init__(self, config: FamilyConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LlamaDecoder(config.decoder)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        if config.decoder.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def clip_tower(self) -> ClipVisionTower | None:
        """The vision tower, if it is CLIP's."""
        return None

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        *,
        pruner: VisionPruner | None = None,
        feature_pruner: FeaturePruner | None = None,
        pooled: bool = False,
    ) -> TowerFeatures:
        """Turn tiles into features.

        Args:
            inputs: The tensors of ``vision_inputs``.
            pruner: Drops tokens inside the tower.
            feature_pruner: Drops tokens behind it.
            pooled: Whether the tower's final class token is wanted.
        """
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """[…, F] → […, C]."""
        raise NotImplementedError

    def deepstack(self, features: Tensor) -> Tensor:
        """[N, F] → [J, N, C], where ``config.geometry.deepstack_layers`` is J and not 0."""
        raise NotImplementedError

    @property
    def newline(self) -> Tensor | None:
        """[C], the learned row that the family inserts among visual tokens, if it does."""
        return None

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
        if self.config.image_token_id >= self.config.decoder.vocab_size:
            # The placeholder may lie beyond the vocabulary; its embedding is thrown away.
            input_ids = torch.where(is_visual, torch.zeros_like(input_ids), input_ids)
        text = self.language_model.embed_tokens(input_ids)
        hidden = torch.where(is_visual.unsqueeze(-1), visual, text)
        return hidden, torch.where(is_visual[0], image_slots[order[0]], -1)

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and head: [B, S, C] → [B, S, V]."""
        logits: Tensor = self.lm_head(self.language_model.norm(hidden))
        return logits
