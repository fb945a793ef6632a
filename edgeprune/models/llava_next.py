"""LLaVA-NeXT or LLaVA-1.6 (``model_type`` "llava_next"): LLaVA on tiles of a picture, with newlines between rows."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import CheckpointError
from edgeprune.models.config_fields import read_field
from edgeprune.models.llava import LlavaConfig, LlavaModel
from edgeprune.models.vision_language import TypicalPicture
from edgeprune.prune.method import ModelGeometry
from edgeprune.runtimes.anyres import DEFAULT_PINPOINTS, best_resolution, unpad

Pinpoints = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """A LLaVA-NeXT checkpoint.

    Attributes:
        pinpoints: Resolutions (height, width) that a picture may be scaled to.
    """

    pinpoints: Pinpoints

    def __post_init__(self) -> None:
        side = self.vision.image_size
        if not self.pinpoints or any(size < side or size % side for pair in self.pinpoints for size in pair):
            raise CheckpointError(
                f"config.json: 'image_grid_pinpoints' {[list(pair) for pair in self.pinpoints]} must be multiples of "
                f"the vision tower's image_size {side}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "LlavaNextConfig":
        """Read a ``config.json``.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        llava = LlavaConfig.from_huggingface(config)
        # The first conversions say so; the others have a newline always.
        if not read_field(config, "use_image_newline_parameter", bool, True):
            raise CheckpointError(
                "config.json: 'use_image_newline_parameter' is False, supported: true (a newline behind every row)"
            )
        own = {field.name: getattr(llava, field.name) for field in fields(llava)}
        return cls(**own, pinpoints=_read_pinpoints(config))

    @property
    def geometry(self) -> ModelGeometry:
        """What pruning methods need to know."""
        return replace(super().geometry, one_tile=False, one_grid=False)

    @property
    def typical_picture(self) -> TypicalPicture:
        """A picture of 4:3 that is as wide as two tiles."""
        rows, columns = self.vision.grid
        side = self.vision.image_size
        width, height = 2 * side, round(2 * side * 3 / 4)
        down, across = (size // side for size in best_resolution(width, height, self.pinpoints))
        seen = unpad(width, height, down * rows, across * columns)
        return TypicalPicture(
            tiles=1 + down * across,
            tokens=rows * columns + seen.rows * (seen.columns + 1),
            inserted=seen.rows,
        )


def _read_pinpoints(config: Mapping[str, Any]) -> Pinpoints:
    value = config.get("image_grid_pinpoints")
    value = DEFAULT_PINPOINTS if value is None else value
    try:
        return tuple((int(height), int(width)) for height, width in value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json: 'image_grid_pinpoints' is {value!r}, expected pairs of height and width"
        ) from error


class LlavaNextModel(LlavaModel):
    """The whole model, unpruned."""

    config: LlavaNextConfig

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        self.image_newline = nn.Parameter(torch.zeros(config.decoder.hidden_size))

    @property
    def newline(self) -> Tensor:
        """[C], stands behind every row of the joined grid."""
        return self.image_newline
