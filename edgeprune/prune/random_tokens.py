"""Random visual tokens: the baseline every score must beat.

A seeded, fixed subset of grid positions enters the projector; the choice is made once, at export
(IVTP, Table 1 "Random", applied after the vision tower).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgeprune.errors import PruningError
from edgeprune.prune.method import ModelGeometry, PruningMethod


@dataclass(frozen=True)
class RandomTokens(PruningMethod):
    """Parameters of the random baseline.

    Attributes:
        keep: Visual tokens kept per picture.
        seed: Seed of NumPy's PCG64 generator.
    """

    keep: int = 64
    seed: int = 0

    name: ClassVar[str] = "random"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ivtp-table-1": {"keep": 64}}

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise PruningError(f"random: 'keep' is {self.keep}, expected at least 1")
        if self.seed < 0:
            raise PruningError(f"random: 'seed' is {self.seed}, expected at least 0")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse to keep more tokens than there are."""
        if self.keep > geometry.num_patches:
            raise PruningError(
                f"random: 'keep' is {self.keep}, but a picture has {geometry.num_patches} visual tokens"
            )

    def projector_slots(self, geometry: ModelGeometry) -> tuple[int, ...]:
        """The kept grid positions, ascending."""
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(geometry.num_patches)
        return tuple(sorted(int(slot) for slot in order[: self.keep]))
