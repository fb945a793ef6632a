"""The vision tower of Qwen2-VL and Qwen2.5-VL: pictures of any size as one row of patches, without a class token.

Qwen3-VL's (:mod:`edgeprune.models.qwen3_vision`) is made of the same blocks.

Patches of all pictures lie one after the other. Inside a picture they come block by block: the merge × merge patches
that will be one visual token stand together. Which patches attend to each other, a picture or a window of it, is given
from outside as rows of indices, so that nothing in the tower depends on the pictures' sizes but the lengths of its
inputs. Pictures only: a video's frames would be further groups, and nothing here makes them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import tensor_names as names
from edgeprune.errors import CheckpointError
from edgeprune.models.llama import RotaryAngles, apply_rotary
from edgeprune.tensor_spec import TensorSpec

NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class QwenVisionConfig:
    """Geometry of the tower.

    Attributes:
        hidden_size: Width of the tower.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        intermediate_size: Width of the MLP.
        patch_size: Side of a patch in pixels.
        temporal_patch_size: Frames of a patch; a picture is repeated as often.
        merge_size: Side in patches of the block that becomes one visual token.
        output_size: Width behind the merger, that of the decoder.
        window_size: Side of an attention window in pixels; 0 = every layer attends to the whole picture.
        global_layers: Layers that attend to the whole picture, where there are windows.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    output_size: int
    window_size: int = 0
    global_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "patch_size",
            "temporal_patch_size",
            "merge_size",
        ):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"vision_config: '{name}' is {getattr(self, name)}, expected at least 1"
                )
        if self.hidden_size % (4 * self.num_heads):
            raise CheckpointError(
                f"vision_config: the width {self.hidden_size} does not give {self.num_heads} attention heads a "
                "multiple of 4, which their rotary embedding of rows and columns needs"
            )
        if self.window_size and self.window_tokens < 1:
            raise CheckpointError(
                f"vision_config: 'window_size' is {self.window_size} pixels, less than the "
                f"{self.patch_size * self.merge_size} of a visual token"
            )
        if outside := [layer for layer in self.global_layers if not 0 <= layer < self.num_layers]:
            raise CheckpointError(
                f"vision_config: 'fullatt_block_indexes' names layer {outside[0]}, the tower has {self.num_layers}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patches_per_token(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2

    @property
    def joined_size(self) -> int:
        """Width of a visual token's patches side by side."""
        return self.patches_per_token * self.hidden_size

    @property
    def patch_values(self) -> int:
        """Values of a patch: 3 · frames · pixels."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in visual tokens; 0 without windows."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Patches of a whole attention window; 0 without windows."""
        return (self.window_tokens * self.merge_size) ** 2

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the tower takes."""
        groups = [TensorSpec(names.PICTURE_ROWS, "int64", ("pictures", "longest_picture"))]
        if self.window_size:
            groups.append(TensorSpec(names.WINDOW_ROWS, "int64", ("windows", self.window_patches)))
        return (
            TensorSpec(names.PIXEL_VALUES, "model", ("patches", self.patch_values)),
            TensorSpec(names.PATCH_POSITIONS, "int64", ("patches", 2)),
            *groups,
        )


class RowGroups(NamedTuple):
    """Patches that attend to each other, padded to the longest group.

    Shapes:
        rows: [G, L] int64, patches; 0 where there is none.
        mask: [G, 1, L, L] bool, the keys that are patches.
        back: [P] int64, where in the flattened groups each patch stands.
        angles: rotary angles of ``rows``, [G, L, D/2].
    """

    rows: Tensor
    mask: Tensor
    back: Tensor
    angles: RotaryAngles


def row_groups(rows: Tensor, angles: Tensor, dtype: torch.dtype) -> RowGroups:
    """Prepare groups for the layers that use them.

    Shapes:
        rows: [G, L] int64, each patch in one group, -1 behind a group's last; angles: [P, D/2] float32.
    """
    inside = rows >= 0
    own = rows.clamp(min=0)
    places = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device)
    # Padding, -1, is written to a row of its own, the first, and cut off.
    back = rows.new_zeros(angles.shape[0] + 1).scatter(0, (rows + 1).flatten(), places)[1:]
    chosen = angles.index_select(0, own.flatten()).view(rows.shape[0], rows.shape[1], angles.shape[1])
    return RowGroups(
        own,
        # A row for every query: ONNX Runtime's Attention does not broadcast its mask.
        inside[:, None, None, :].expand(-1, -1, rows.shape[1], -1),
        back,
        RotaryAngles(chosen.cos().to(dtype), chosen.sin().to(dtype), fused=False),
    )


def axial_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angles of the rotary embedding: half of a head's frequencies turn with the row, half with the column.

    Shapes:
        positions: [P, 2] int64, row and column of each patch; returns [P, D/2] float32.
    """
    half = head_dim // 2
    inverse = torch.tensor(
        [1.0 / math.pow(ROPE_THETA, index / half) for index in range(0, half, 2)],
        dtype=torch.float32,
        device=positions.device,
    )
    return (positions.to(torch.float32).unsqueeze(-1) * inverse).flatten(1)


class PatchEmbedding(nn.Module):
    """Linear map of a patch's pixels, kept in the shape of the convolution that the checkpoint holds."""

    def __init__(self, config: QwenVisionConfig, *, bias: bool = False) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, 3 · frames · side²] → [P, C]; the kernel covers a patch, so the convolution is one product."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class QwenVisionAttention(nn.Module):
    """Attention within groups of patches."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, groups: RowGroups) -> Tensor:
        """[P, C] → [P, C]."""
        num_groups, length = groups.rows.shape
        rows = self.qkv(hidden).index_select(0, groups.rows.flatten())
        parts = rows.view(num_groups, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query, key = apply_rotary(query, groups.angles), apply_rotary(key, groups.angles)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=groups.mask)
        merged = mixed.transpose(1, 2).reshape(num_groups * length, self.num_heads * self.head_dim)
        out: Tensor = self.proj(merged.index_select(0, groups.back))
        return out


class QwenVisionBlock(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self, config: QwenVisionConfig, norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = QwenVisionAttention(config)
        self.mlp = mlp()

    def forward(self, hidden: Tensor, groups: RowGroups) -> Tensor:
        """[P, C] → [P, C]."""
        hidden = hidden + self.attn(self.norm1(hidden), groups)
        out: Tensor = hidden + self.mlp(self.norm2(hidden))
        return out


class PatchMerger(nn.Module):
    """The projector: norm of each patch, then an MLP over the patches of a visual token."""

    def __init__(self, config: QwenVisionConfig, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patches, self.width = config.patches_per_token, config.hidden_size
        joined = config.joined_size
        self.ln_q = norm()
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.output_size))

    def forward(self, features: Tensor) -> Tensor:
        """[…, merge² · C] → […, output size]."""
        patches = features.reshape(*features.shape[:-1], self.patches, self.width)
        out: Tensor = self.mlp(self.ln_q(patches).flatten(-2))
        return out


class QwenVisionTower(nn.Module):
    """Patch embedding, layers and merger; names follow Hugging Face."""

    def __init__(
        self, config: QwenVisionConfig, norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module]
    ) -> None:
        """Build the tower.

        Args:
            config: Its geometry.
            norm: Builds a norm over the tower's width.
            mlp: Builds a layer's MLP.
        """
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(QwenVisionBlock(config, norm, mlp) for _ in range(config.num_layers))
        self.merger = PatchMerger(config, norm)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The patches before the merger.

        Shapes:
            inputs: pixel_values [P, 3 · frames · side²], patch_positions [P, 2], picture_rows [M, L] and, with
            windows, window_rows [W, window_patches]; returns [P, C].
        """
        hidden: Tensor = self.patch_embed(inputs[names.PIXEL_VALUES])
        angles = axial_angles(inputs[names.PATCH_POSITIONS], self.config.head_dim)
        pictures = row_groups(inputs[names.PICTURE_ROWS], angles, hidden.dtype)
        windows = pictures
        if self.config.window_size:
            windows = row_groups(inputs[names.WINDOW_ROWS], angles, hidden.dtype)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, pictures if index in self.config.global_layers else windows)
        return hidden
