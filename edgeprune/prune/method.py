"""The contract between a pruning method and everything that exports, runs or reports it.

A method is a frozen dataclass of its parameters. It says where tokens are dropped, which activations its score reads,
and builds the torch modules that score and select; export traces those same modules.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeaturePruner
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.models.vision_pruning import VisionPruner
from edgeprune.numbering import ORIGINAL
from edgeprune.positions import SEQUENTIAL


@dataclass(frozen=True)
class ModelGeometry:
    """What a method may know of the model it prunes.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: C of the decoder.
        num_heads: Query heads of the decoder.
        head_dim: D of the decoder.
        grid: Visual tokens of a tile, (rows, columns); a tile is what the vision tower sees at a time.
        vision_layers: Layers of the vision tower that run before the features are taken.
        has_class_token: Whether the vision tower has a class token.
        one_tile: Whether every picture is one tile, so that all have equally many visual tokens.
        one_grid: Whether all visual tokens stand in grids of the size of ``grid``.
        fixed_tiles: Whether all tiles have the size of ``grid``; if not, a picture is one tile of its own size, and
            ``grid`` is that of a typical picture.
        patches_per_token: Patches that become one visual token behind the tower.
        has_clip_tower: Whether the vision tower is one of CLIP's, which has a text tower to it.
        positions: Kind of position ids (:mod:`edgeprune.positions`).
        deepstack_layers: Decoder layers, the first ones, behind which features of the tower are added to the visual
            rows (:mod:`edgeprune.models.deepstack`).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    grid: tuple[int, int]
    vision_layers: int
    has_class_token: bool
    one_tile: bool = True
    one_grid: bool = True
    fixed_tiles: bool = True
    patches_per_token: int = 1
    has_clip_tower: bool = True
    positions: str = SEQUENTIAL
    deepstack_layers: int = 0

    @property
    def one_size(self) -> bool:
        """Whether all pictures have equally many visual tokens."""
        return self.one_tile and self.fixed_tiles

    @property
    def num_patches(self) -> int:
        """Visual tokens of a tile before any pruning, N0."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class DecoderSite:
    """A place in the decoder where visual tokens are dropped.

    Attributes:
        cut: Between which blocks.
        reads: Names (:mod:`edgeprune.tensor_names`) of the activations that the selector takes from the segment.
        host_inputs: Names of the small index tensors that the selector takes from the host.
        keep_per_image: Visual tokens kept per picture, all if it has fewer.
        keep_share: Share of a picture's unpruned visual tokens that is kept instead, where pictures differ in their
            number. Where both are None, the count depends on what the picture shows.
        positions: What becomes of position ids behind the site (:mod:`edgeprune.numbering`).
        recycled_per_image: Dropped tokens of a picture that are looked through for merging.
        merged_per_image: Tokens that they are merged into, counted in ``keep_per_image``.
    """

    cut: Cut
    reads: tuple[str, ...]
    host_inputs: tuple[str, ...]
    keep_per_image: int | None
    keep_share: float | None = None
    positions: str = ORIGINAL
    recycled_per_image: int = 0
    merged_per_image: int = 0

    def __post_init__(self) -> None:
        if self.keep_per_image is not None and self.keep_share is not None:
            raise PruningError(
                f"a site {self.cut.description} keeps {self.keep_per_image} tokens and a share of "
                f"{self.keep_share}: give one of the two"
            )


@dataclass(frozen=True)
class ProbeSpec:
    """Rows that ride along in the decoder's query and key projections to score the visual tokens.

    Attributes:
        layers: Decoder layers whose projections are read.
        guided: Whether a guide graph chooses the text rows they average; otherwise all rows after the pictures.
    """

    layers: tuple[int, ...]
    guided: bool


class SiteSelector(nn.Module):
    """Scores and selects at one decoder site; traced as that site's graph.

    ``forward`` takes the tensors named by ``reads`` and ``host_inputs`` plus ``visual_slots`` and returns
    ``keep_indices`` [S] int64 (the kept rows first, ascending) and ``keep_count`` [] int64.
    """

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """Select the rows that survive."""
        raise NotImplementedError


class MergingSelector(SiteSelector):
    """A selector that makes new visual tokens of dropped ones.

    ``forward`` returns, besides ``keep_indices`` and ``keep_count``, by name (``tensor_names.extended``) the tensors
    that travel on (``hidden_states``, ``position_ids``, ``visual_slots``) with the new rows appended; ``keep_indices``
    [S + merged] says where in the sequence they stand.
    """


class RankingSelector(SiteSelector):
    """A selector whose method goes on dropping tokens while an answer is generated.

    ``forward`` returns, besides ``keep_indices`` and ``keep_count``, by name ``visual_ranks`` [S] int64.
    """


class ScoringSelector(SiteSelector):
    """A selector whose choice the host may replace, by scores that the site's graph gives.

    ``forward`` returns, besides ``keep_indices`` and ``keep_count``, by name ``scores`` [S] float32, of every row; the
    host looks at those of visual tokens. Nothing else may depend on what the selector itself chose, so it neither
    merges nor ranks.
    """


class RateDecision(nn.Module):
    """Decides at a generated token what share of the visual tokens is removed; traced as the graph "rate"."""

    def forward(self, query: Tensor, key: Tensor, visual_slots: Tensor) -> Tensor:
        """Index of the rate, [] int64.

        Shapes:
            query: [1, H, 1, D]; key: [1, Hkv, P + 1, D]; visual_slots: [S], of the rows that entered the site.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RateSpec:
    """How a method goes on dropping tokens while an answer is generated, behind its only site.

    Attributes:
        layer: The decoder layer whose query and keys are read, the last before the site.
        num_rates: R: index k removes the share k/R.
        decision: The module.
    """

    layer: int
    num_rates: int
    decision: RateDecision


@dataclass(frozen=True)
class PruningMethod(ABC):
    """A pruning method with its parameters."""

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a model that the parameters do not fit.

        Raises:
            PruningError: With the allowed values.
        """

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The sites inside the decoder, in order."""
        del geometry
        return ()

    def vision_pruner(self, geometry: ModelGeometry) -> VisionPruner | None:
        """The module that prunes inside the vision tower, if any."""
        del geometry
        return None

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> FeaturePruner | None:
        """The module that prunes between the vision tower and the projector, if any.

        Args:
            geometry: The model.
            tower: The tower, whose modules the pruner may use too; a bundle stores their weights once.
        """
        del geometry, tower
        return None

    def tokens_per_tile(self, geometry: ModelGeometry) -> int | None:
        """Visual tokens of a tile that enter the projector; the most, where the number depends on the picture.

        None if the method drops nothing before the decoder.
        """
        del geometry
        return None

    def probe(self, geometry: ModelGeometry) -> ProbeSpec | None:
        """The probe rows that the sites read, if any."""
        del geometry
        return None

    def weight_shapes(self, geometry: ModelGeometry) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the learned tensors that ``pruning.safetensors`` must hold (float32)."""
        del geometry
        return {}

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> SiteSelector:
        """The module of one decoder site.

        Args:
            site: Index into :meth:`decoder_sites`.
            geometry: The model.
            weights: The tensors of :meth:`weight_shapes`.
            decoder: The decoder, whose modules the selector may use too; a bundle stores their weights once.
        """
        raise NotImplementedError(f"{self.name} has no decoder sites")

    def rate(self, geometry: ModelGeometry, weights: Mapping[str, Tensor]) -> RateSpec | None:
        """What drops tokens while an answer is generated, if anything; arguments as :meth:`selector`."""
        del geometry, weights
        return None

    def parameters(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in fields(self)
            for value in [getattr(self, field.name)]
        }


def check_layers_increase(
    name: str, layers: Sequence[int], geometry: ModelGeometry, *, behind: bool = False
) -> None:
    """Refuse layers that are out of range or out of order.

    Args:
        name: The method, for messages.
        layers: Decoder layers, 0-based.
        geometry: The model.
        behind: Whether sites lie behind the layers instead of before them.

    Raises:
        PruningError: With the allowed range.
    """
    where = "behind" if behind else "before"
    first, last = (0, geometry.num_layers - 2) if behind else (1, geometry.num_layers - 1)
    for layer in layers:
        if not first <= layer <= last:
            raise PruningError(
                f"{name}: a site {where} layer {layer} is out of range: "
                f"this decoder allows layers {first} … {last}"
            )
    if list(layers) != sorted(set(layers)):
        raise PruningError(f"{name}: layers {list(layers)} are out of order: list them increasing, each once")


def check_has_class_token(name: str, geometry: ModelGeometry) -> None:
    """Refuse a tower whose class token could not be asked.

    Raises:
        PruningError: With the methods that work.
    """
    if not geometry.has_class_token or geometry.vision_layers < 1:
        raise PruningError(
            f"{name}: this vision tower has no class token or no layers; use a decoder method, "
            "such as atp or fastv"
        )


def check_tokens_are_patches(name: str, geometry: ModelGeometry) -> None:
    """Refuse a family that joins patches behind its tower: single patches must not be dropped there.

    Raises:
        PruningError: With the methods that work.
    """
    if geometry.patches_per_token > 1 or not geometry.fixed_tiles:
        others = "ivtp-v or a decoder method" if geometry.has_class_token else "a decoder method"
        raise PruningError(
            f"{name}: this family joins {geometry.patches_per_token} patches to one visual token behind the vision "
            f"tower, and it drops single ones; use {others}"
        )
