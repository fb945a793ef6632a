"""CLIP: the vision tower of LLaVA-1.5, with an opening for pruning inside it, and the text tower that IVTP needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import CheckpointError
from edgeprune.models.config_fields import read_field, require_choice
from edgeprune.models.vision_pruning import (
    TowerAttention,
    TowerTokens,
    VisionPruner,
    attend,
    run_tower_layers,
)


@dataclass(frozen=True)
class ClipTowerConfig:
    """Geometry shared by both towers.

    Attributes:
        hidden_size: Width of the tower.
        num_layers: Number of transformer layers.
        num_heads: Attention heads.
        intermediate_size: Width of the MLP.
        layer_norm_eps: Epsilon of the layer norms.
        hidden_act: "quick_gelu" or "gelu".
        projection_dim: Width of the shared picture-text space.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str
    projection_dim: int

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"CLIP config: width {self.hidden_size} is no multiple of {self.num_heads} attention heads"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, projection_dim: int) -> "ClipTowerConfig":
        """Read the fields that ``vision_config`` and ``text_config`` share."""
        return cls(
            hidden_size=read_field(config, "hidden_size", int),
            num_layers=read_field(config, "num_hidden_layers", int),
            num_heads=read_field(config, "num_attention_heads", int),
            intermediate_size=read_field(config, "intermediate_size", int),
            layer_norm_eps=read_field(config, "layer_norm_eps", float, 1e-5),
            hidden_act=require_choice(config, "hidden_act", ("quick_gelu", "gelu"), "quick_gelu"),
            projection_dim=projection_dim,
        )


@dataclass(frozen=True)
class ClipVisionConfig:
    """The vision tower.

    Attributes:
        tower: The transformer.
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels.
    """

    tower: ClipTowerConfig
    image_size: int
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "ClipVisionConfig":
        """Read a ``vision_config`` section.

        Raises:
            CheckpointError: Not a CLIP vision tower, or a field is missing.
        """
        require_choice(config, "model_type", ("clip_vision_model",), "clip_vision_model")
        projection = read_field(config, "projection_dim", int, 768)
        return cls(
            tower=ClipTowerConfig.from_huggingface(config, projection_dim=projection),
            image_size=read_field(config, "image_size", int, 336),
            patch_size=read_field(config, "patch_size", int, 14),
        )


@dataclass(frozen=True)
class ClipTextConfig:
    """The text tower.

    Attributes:
        tower: The transformer.
        vocab_size: Size of CLIP's own vocabulary.
        context_length: Longest text in tokens, start and end token included (77).
    """

    tower: ClipTowerConfig
    vocab_size: int
    context_length: int

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, projection_dim: int) -> "ClipTextConfig":
        """Read a ``text_config`` section of a CLIP checkpoint."""
        return cls(
            tower=ClipTowerConfig.from_huggingface(config, projection_dim=projection_dim),
            vocab_size=read_field(config, "vocab_size", int, 49408),
            context_length=read_field(config, "max_position_embeddings", int, 77),
        )


class ClipAttention(nn.Module):
    """Multi-head attention; parameter names follow Hugging Face."""

    def __init__(self, config: ClipTowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, C] → [B, H, S, D]."""
        batch, length, width = x.shape
        return x.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class ClipMlp(nn.Module):
    """The two-layer MLP."""

    def __init__(self, config: ClipTowerConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] → [B, S, C]."""
        inner = self.fc1(x)
        inner = inner * torch.sigmoid(1.702 * inner) if self.quick else F.gelu(inner)
        out: Tensor = self.fc2(inner)
        return out


class ClipLayer(nn.Module):
    """One pre-norm transformer layer, as two blocks."""

    def __init__(self, config: ClipTowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMlp(config)

    def attention(
        self, hidden: Tensor, *, causal: bool = False, sizes: Tensor | None = None
    ) -> TowerAttention:
        """Norm, attention and residual: [B, S, C] → [B, S, C] with the attention's inputs.

        Args:
            hidden: [B, S, C].
            causal: Whether a row sees only rows up to itself.
            sizes: See :func:`edgeprune.models.vision_pruning.attend`.
        """
        attn = self.self_attn
        normed = self.layer_norm1(hidden)
        query = attn.split_heads(attn.q_proj(normed))
        key = attn.split_heads(attn.k_proj(normed))
        value = attn.split_heads(attn.v_proj(normed))
        merged = attend(query, key, value, causal=causal, sizes=sizes)
        return TowerAttention(hidden + attn.out_proj(merged), query, key, value)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Norm, MLP and residual."""
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out


class ClipEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ClipTowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_layers))

    def layer(self, index: int) -> ClipLayer:
        """The layer, typed."""
        layer = self.layers[index]
        assert isinstance(layer, ClipLayer)
        return layer


class ClipVisionEmbeddings(nn.Module):
    """Patch, class and position embeddings."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        width = config.tower.hidden_size
        rows, columns = config.grid
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(rows * columns + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[M, 3, height, width] → [M, 1 + N, C], the class token first."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        embedded: Tensor = torch.cat((class_token, patches), dim=1) + self.position_embedding.weight
        return embedded


class VisionOutput(NamedTuple):
    """What the vision tower leaves.

    Shapes:
        hidden: [M, 1 + K, C] at the feature layer, the class token first.
        slots: [M, K] int64, each patch token's position in the original grid, row-major.
        pooled: [M, C], the class token after the last layer and the final norm; None unless asked for.
        attention: The attention block of the last layer that ran; None if none did.
    """

    hidden: Tensor
    slots: Tensor
    pooled: Tensor | None
    attention: TowerAttention | None


class FeatureTokens(NamedTuple):
    """Patch tokens between tower and projector.

    Shapes:
        features: [M, K, C].
        slots: [M, K] int64, positions in the original grid; of a merged token, one that it was merged from.
        counts: [M] int64, how many of the K are tokens, the first ones; None = all.
    """

    features: Tensor
    slots: Tensor
    counts: Tensor | None


class FeaturePruner(Protocol):
    """What a method that prunes between vision tower and projector offers.

    Attributes:
        counted: Whether the number of tokens depends on the picture, so that ``counts`` is given.
    """

    counted: bool

    def prune_features(self, vision: VisionOutput) -> FeatureTokens:
        """Drop or merge patch tokens."""


class ClipVisionTower(nn.Module):
    """The vision transformer."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipVisionEmbeddings(config)
        # Hugging Face spells it so.
        self.pre_layrnorm = nn.LayerNorm(config.tower.hidden_size, eps=config.tower.layer_norm_eps)
        self.encoder = ClipEncoder(config.tower)
        self.post_layernorm = nn.LayerNorm(config.tower.hidden_size, eps=config.tower.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        num_feature_layers: int,
        pruner: VisionPruner | None = None,
        pooled: bool = False,
    ) -> VisionOutput:
        """Run the tower.

        Shapes:
            pixel_values: [M, 3, height, width].

        Args:
            pixel_values: Preprocessed pictures.
            num_feature_layers: Layers run before the features are taken (LLaVA's ``-2`` = all but the last).
            pruner: A method that drops patch tokens inside the tower.
            pooled: Whether to run the remaining layers for the pooled class token.
        """
        rows, columns = self.config.grid
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        slots = torch.arange(rows * columns, device=hidden.device).expand(hidden.shape[0], -1)
        layers = [self.encoder.layer(index) for index in range(num_feature_layers)]
        tokens, attention = run_tower_layers(layers, TowerTokens(hidden, slots), pruner)
        if not pooled:
            return VisionOutput(tokens.hidden, tokens.slots, None, attention)
        last = tokens.hidden
        for index in range(num_feature_layers, self.config.tower.num_layers):
            layer = self.encoder.layer(index)
            last = layer.feed_forward(layer.attention(last, sizes=tokens.sizes).hidden)
        return VisionOutput(tokens.hidden, tokens.slots, self.post_layernorm(last[:, 0]), attention)


class ClipTextEmbeddings(nn.Module):
    """Token and position embeddings."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.tower.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.tower.hidden_size)


class ClipTextTower(nn.Module):
    """The text transformer, read out at every token."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipEncoder(config.tower)
        self.final_layer_norm = nn.LayerNorm(config.tower.hidden_size, eps=config.tower.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [Q, 77] int64 → final hidden states [Q, 77, C].

        Padding needs no mask: attention is causal and padding comes last.
        """
        hidden = self.embeddings.token_embedding(input_ids) + self.embeddings.position_embedding.weight
        for index in range(self.config.tower.num_layers):
            layer = self.encoder.layer(index)
            hidden = layer.feed_forward(layer.attention(hidden, causal=True).hidden)
        out: Tensor = self.final_layer_norm(hidden)
        return out
