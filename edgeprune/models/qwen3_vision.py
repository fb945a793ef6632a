"""Qwen3-VL's vision tower: learned positions on a square grid, full attention, and the features of several layers.

Every picture's positions are those of one square table, interpolated to the picture's grid. Beside its output the
tower gives the hidden states behind some of its layers, which DeepStack (:mod:`edgeprune.models.deepstack`) adds in the
decoder. Bai et al., "Qwen3-VL Technical Report" (2025), §2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import tensor_names as names
from edgeprune.errors import CheckpointError
from edgeprune.models.qwen_vision import (
    NORM_EPS,
    PatchEmbedding,
    QwenVisionBlock,
    QwenVisionConfig,
    axial_angles,
    row_groups,
)


@dataclass(frozen=True)
class Qwen3VisionConfig(QwenVisionConfig):
    """Geometry of the tower.

    Attributes:
        position_side: Rows, and columns, of the table of positions.
        deepstack_layers: Layers whose output the decoder gets, too, in the order of their mergers.
    """

    position_side: int = 48
    deepstack_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_side < 1:
            raise CheckpointError(
                f"vision_config: the table of positions has {self.position_side} rows, not at least 1"
            )
        layers = self.deepstack_layers
        if outside := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            raise CheckpointError(
                f"vision_config: 'deepstack_visual_indexes' names layer {outside[0]}, the tower has layers 0 … "
                f"{self.num_layers - 1}: correct the one that is wrong"
            )
        if len(set(layers)) < len(layers):
            raise CheckpointError(
                f"vision_config: 'deepstack_visual_indexes' {list(layers)} names a layer twice: list each once"
            )


def picture_ends(positions: Tensor, rows: Tensor, back: Tensor) -> Tensor:
    """Last row and column of each patch's picture.

    Shapes:
        positions: [P, 2] int64; rows: [M, L] int64, the patches of each picture, -1 behind its last; back: [P] int64,
        where in the flattened ``rows`` each patch stands.
        returns: [P, 2] float32.
    """
    shown = positions.to(torch.float32).index_select(0, rows.clamp(min=0).flatten())
    shown = shown.view(rows.shape[0], rows.shape[1], 2)
    ends = torch.where((rows >= 0).unsqueeze(-1), shown, 0.0).amax(dim=1, keepdim=True)
    return ends.expand(-1, rows.shape[1], -1).reshape(-1, 2).index_select(0, back)


def interpolated_positions(table: Tensor, side: int, positions: Tensor, ends: Tensor) -> Tensor:
    """A square table of positions resampled bilinearly to pictures' grids, corners on corners.

    Shapes:
        table: [side², C]; positions: [P, 2] int64, row and column of each patch; ends: see :func:`picture_ends`.
        returns: [P, C] float32.
    """
    # A grid of one row shows the table's first.
    place = positions.to(torch.float32) * (side - 1) / ends.clamp(min=1)
    before = place.floor()
    weights = 1 - (place - before), 1 - (place - before - 1).abs()
    taps = before.to(torch.int64), (before.to(torch.int64) + 1).clamp(max=side - 1)
    total: Tensor | None = None
    # One of the four at a time: together they would be four times the picture.
    for row, row_weight in zip(taps, weights, strict=True):
        for column, column_weight in zip(taps, weights, strict=True):
            found = table.index_select(0, row[:, 0] * side + column[:, 1]).to(torch.float32)
            part = found * (row_weight[:, 0] * column_weight[:, 1]).unsqueeze(1)
            total = part if total is None else total + part
    assert total is not None
    return total


class Qwen3VisionMlp(nn.Module):
    """The two-layer MLP with the tanh form of GELU."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[P, C] → [P, C]."""
        out: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))
        return out


class Qwen3PatchMerger(nn.Module):
    """The patches of a visual token → the width of the decoder."""

    def __init__(self, config: QwenVisionConfig, *, norm_of_token: bool) -> None:
        """Build it.

        Args:
            config: The tower's geometry.
            norm_of_token: Whether the norm runs over a token's patches side by side, as in DeepStack's mergers, instead
                of over each patch.
        """
        super().__init__()
        joined = config.joined_size
        self.norm_width = joined if norm_of_token else config.hidden_size
        self.norm = nn.LayerNorm(self.norm_width, eps=NORM_EPS)
        self.linear_fc1 = nn.Linear(joined, joined)
        self.linear_fc2 = nn.Linear(joined, config.output_size)

    def forward(self, features: Tensor) -> Tensor:
        """[…, merge² · C] → […, output size]."""
        parts = features.reshape(*features.shape[:-1], -1, self.norm_width)
        out: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(self.norm(parts).flatten(-2))))
        return out


class Qwen3VisionTower(nn.Module):
    """Patch embedding, positions, layers and mergers; names follow Hugging Face."""

    def __init__(self, config: Qwen3VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config, bias=True)
        self.pos_embed = nn.Embedding(config.position_side**2, config.hidden_size)
        self.blocks = nn.ModuleList(
            QwenVisionBlock(
                config,
                norm=lambda: nn.LayerNorm(config.hidden_size, eps=NORM_EPS),
                mlp=lambda: Qwen3VisionMlp(config),
            )
            for _ in range(config.num_layers)
        )
        self.merger = Qwen3PatchMerger(config, norm_of_token=False)
        self.deepstack_merger_list = nn.ModuleList(
            Qwen3PatchMerger(config, norm_of_token=True) for _ in config.deepstack_layers
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The visual tokens before the mergers: what leaves the tower, then what left the layers of DeepStack.

        Shapes:
            inputs: pixel_values [P, 3 · frames · side²], patch_positions [P, 2], picture_rows [M, L];
            returns [P / merge², (1 + DeepStack's layers) · merge² · C].
        """
        config, positions, rows = self.config, inputs[names.PATCH_POSITIONS], inputs[names.PICTURE_ROWS]
        hidden: Tensor = self.patch_embed(inputs[names.PIXEL_VALUES])
        groups = row_groups(rows, axial_angles(positions, config.head_dim), hidden.dtype)
        ends = picture_ends(positions, rows, groups.back)
        learned = interpolated_positions(self.pos_embed.weight, config.position_side, positions, ends)
        hidden = hidden + learned.to(hidden.dtype)
        behind: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, groups)
            if index in config.deepstack_layers:
                behind.append(hidden)
        joined = [tensor.reshape(-1, config.joined_size) for tensor in (hidden, *behind)]
        return torch.cat(joined, dim=1)

    def deepstack(self, features: Tensor) -> Tensor:
        """What DeepStack adds, layer after layer: [N, (1 + J) · merge² · C] → [J, N, output size]."""
        # The tower's layers in their order, whose mergers may be listed in another.
        listed = self.config.deepstack_layers
        parts = torch.split(features, self.config.joined_size, dim=1)[1:]
        mergers = [self.deepstack_merger_list[listed.index(layer)] for layer in sorted(listed)]
        return torch.stack([merger(part) for merger, part in zip(mergers, parts, strict=True)])
