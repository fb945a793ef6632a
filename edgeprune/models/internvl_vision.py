"""InternViT, the vision tower of InternVL: class token, absolute positions, layer scale, pixel shuffle behind it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"

# transformers fixes it, whatever the config says of the other norms.
_QUERY_KEY_NORM_EPS = 1e-6


@dataclass(frozen=True)
class InternvlVisionConfig:
    """The vision tower.

    Attributes:
        hidden_size: Width of the tower.
        num_layers: Number of transformer layers.
        num_heads: Attention heads.
        intermediate_size: Width of the MLP.
        norm_type: "layer_norm", or "rms_norm" (InternViT-6B).
        norm_eps: Epsilon of the norms.
        attention_bias: Whether q/k/v projections have a bias.
        query_key_norm: Whether queries and keys are normalised over their whole width (InternViT-6B).
        position_embeddings: Whether positions are embedded.
        final_norm: Whether a norm follows the last layer.
        image_size: Side of a tile in pixels.
        patch_size: Side of a patch in pixels.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    norm_type: str
    norm_eps: float
    attention_bias: bool
    query_key_norm: bool
    position_embeddings: bool
    final_norm: bool
    image_size: int
    patch_size: int

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "patch_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"vision_config: '{name}' is {getattr(self, name)}, expected at least 1"
                )
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"vision_config: width {self.hidden_size} is no multiple of {self.num_heads} attention heads"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "InternvlVisionConfig":
        """Read a ``vision_config`` section.

        Raises:
            CheckpointError: Not InternViT, a field is of another type, or a variant is not supported.
        """
        require_choice(config, "model_type", ("internvl_vision",), "internvl_vision")
        require_choice(config, "hidden_act", ("gelu",), "gelu")
        if (channels := read_field(config, "num_channels", int, 3)) != 3:
            raise CheckpointError(f"vision_config: 'num_channels' is {channels}, supported: 3")
        return cls(
            hidden_size=read_field(config, "hidden_size", int, 1024),
            num_layers=read_field(config, "num_hidden_layers", int, 24),
            num_heads=read_field(config, "num_attention_heads", int, 16),
            intermediate_size=read_field(config, "intermediate_size", int, 4096),
            norm_type=require_choice(config, "norm_type", (LAYER_NORM, RMS_NORM), LAYER_NORM),
            norm_eps=read_field(config, "layer_norm_eps", float, 1e-6),
            attention_bias=read_field(config, "attention_bias", bool, False),
            query_key_norm=read_field(config, "use_qk_norm", bool, False),
            position_embeddings=read_field(config, "use_absolute_position_embeddings", bool, True),
            # Where the class token is not used, transformers leaves the norm out.
            final_norm=not read_field(config, "use_mean_pooling", bool, True),
            image_size=_read_side(config, "image_size", 448),
            patch_size=_read_side(config, "patch_size", 14),
        )

    @property
    def patches_per_side(self) -> int:
        """Rows and columns of patches."""
        return self.image_size // self.patch_size


def _read_side(config: Mapping[str, Any], name: str, default: int) -> int:
    """The side of a square: a number, or height and width."""
    value = config.get(name, default)
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(
            f"vision_config: '{name}' is {value!r}, expected a number of pixels, or height and width"
        )
    if sides[0] != sides[1]:
        raise CheckpointError(f"vision_config: '{name}' is {list(sides)}, supported: squares")
    return int(sides[0])


def _norm(config: InternvlVisionConfig) -> nn.Module:
    if config.norm_type == RMS_NORM:
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class InternvlVisionAttention(nn.Module):
    """Multi-head attention; parameter names follow Hugging Face."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.projection_layer = nn.Linear(width, width)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.query_key_norm:
            self.q_norm = nn.RMSNorm(width, eps=_QUERY_KEY_NORM_EPS)
            self.k_norm = nn.RMSNorm(width, eps=_QUERY_KEY_NORM_EPS)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, C] → [B, H, S, D]."""
        batch, length, width = x.shape
        return x.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class InternvlVisionMlp(nn.Module):
    """The two-layer MLP."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] → [B, S, C]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class InternvlVisionLayer(nn.Module):
    """One pre-norm transformer layer with layer scale, as two blocks."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        # Hugging Face's "attention", here the name of the block.
        self.self_attn = InternvlVisionAttention(config)
        self.mlp = InternvlVisionMlp(config)
        self.layernorm_before = _norm(config)
        self.layernorm_after = _norm(config)
        self.lambda_1 = nn.Parameter(torch.ones(config.hidden_size))
        self.lambda_2 = nn.Parameter(torch.ones(config.hidden_size))

    def attention(self, hidden: Tensor, *, sizes: Tensor | None = None) -> TowerAttention:
        """Norm, attention, scale and residual; see :class:`edgeprune.models.vision_pruning.TowerLayer`."""
        attn = self.self_attn
        normed = self.layernorm_before(hidden)
        query = attn.split_heads(attn.q_norm(attn.q_proj(normed)))
        key = attn.split_heads(attn.k_norm(attn.k_proj(normed)))
        value = attn.split_heads(attn.v_proj(normed))
        mixed = attn.projection_layer(attend(query, key, value, sizes=sizes))
        return TowerAttention(hidden + self.lambda_1 * mixed, query, key, value)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Norm, MLP, scale and residual."""
        out: Tensor = hidden + self.lambda_2 * self.mlp(self.layernorm_after(hidden))
        return out


class InternvlVisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(InternvlVisionLayer(config) for _ in range(config.num_layers))

    def first_layers(self, count: int) -> list[InternvlVisionLayer]:
        """The first ``count`` layers, typed."""
        layers: list[InternvlVisionLayer] = []
        for layer in self.layer[:count]:
            assert isinstance(layer, InternvlVisionLayer)
            layers.append(layer)
        return layers


class InternvlPatchEmbeddings(nn.Module):
    """The projection of patches."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)


class InternvlVisionEmbeddings(nn.Module):
    """Patch, class and position embeddings."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = InternvlPatchEmbeddings(config)
        if config.position_embeddings:
            rows = config.patches_per_side**2 + 1
            self.position_embeddings = nn.Parameter(torch.zeros(1, rows, config.hidden_size))
        else:
            self.register_parameter("position_embeddings", None)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[T, 3, side, side] → [T, 1 + patches, C], the class token first."""
        patches = self.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
        embedded = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        if self.position_embeddings is not None:
            embedded = embedded + self.position_embeddings
        return embedded


class InternvlVisionTower(nn.Module):
    """The vision transformer."""

    def __init__(self, config: InternvlVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = InternvlVisionEmbeddings(config)
        self.encoder = InternvlVisionEncoder(config)
        self.layernorm: nn.Module = nn.Identity()
        if config.final_norm:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        num_layers: int,
        final_norm: bool,
        joined: int,
        pruner: VisionPruner | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the tower.

        Args:
            pixel_values: Tiles [T, 3, side, side].
            num_layers: Layers that run.
            final_norm: Whether the norm behind the last layer runs, if there is one.
            joined: Side of the square of patches that become one visual token.
            pruner: A method that drops tokens inside the tower: the patches of a token, together.

        Returns:
            The visual tokens [T, K, joined² · C], the patches of one behind each other, row by row, and their slots
            [T, K].
        """
        side, width = self.config.patches_per_side // joined, self.config.hidden_size
        hidden = self.embeddings(pixel_values)
        # Attention does not mind the order: from here on, the patches of a token stand together, row by row, which is
        # the order of channels that pixel shuffle gives.
        squares = hidden[:, 1:].unflatten(1, (side, joined, side, joined)).transpose(2, 3).flatten(1, 4)
        hidden = torch.cat((hidden[:, :1], squares), dim=1)
        slots = torch.arange(side * side, device=hidden.device).expand(hidden.shape[0], -1)
        layers = self.encoder.first_layers(num_layers)
        tokens, _ = run_tower_layers(layers, TowerTokens(hidden, slots), pruner)
        patches = tokens.hidden[:, 1:]
        if final_norm:
            patches = self.layernorm(patches)
        return patches.reshape(patches.shape[0], tokens.slots.shape[1], joined * joined * width), tokens.slots
