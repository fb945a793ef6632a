"""IVTP's first stage alone: group-wise pruning in the vision tower, the decoder left as it is.

Huang et al., "IVTP: Instruction-Guided Visual Token Pruning for Large Vision-Language Models" (ECCV 2024), §3.2;
see :mod:`edgeprune.prune.ivtp`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgeprune.errors import PruningError
from edgeprune.prune.ivtp import IvtpVisionPruner
from edgeprune.prune.method import ModelGeometry, PruningMethod, check_has_class_token


@dataclass(frozen=True)
class IvtpVision(PruningMethod):
    """Parameters of IVTP's stage in the tower.

    Attributes:
        keep: Visual tokens of a picture that leave the vision tower.
        group_size: Layers in a group.
    """

    keep: int = 64
    group_size: int = 3

    name: ClassVar[str] = "ivtp-v"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper-64": {"keep": 64}}

    def __post_init__(self) -> None:
        if self.keep < 1 or self.group_size < 1:
            raise PruningError("ivtp-v: 'keep' and 'group_size' must be at least 1")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token or without layers, or more tokens than there are."""
        check_has_class_token(self.name, geometry)
        if self.keep > geometry.num_patches:
            raise PruningError(
                f"ivtp-v: 'keep' is {self.keep}, but a picture has {geometry.num_patches} visual tokens"
            )

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that leave the tower."""
        del geometry
        return self.keep

    def vision_pruner(self, geometry: ModelGeometry) -> IvtpVisionPruner:
        """The stage."""
        return IvtpVisionPruner(self.keep, self.group_size, geometry)
