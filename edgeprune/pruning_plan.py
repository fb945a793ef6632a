"""One or more pruning methods laid over one model: where tokens are dropped, in the order in which it happens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeaturePruner
from edgeprune.models.llama import Cut, LlamaDecoder, check_cuts
from edgeprune.models.vision_pruning import VisionPruner
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    ProbeSpec,
    PruningMethod,
    RateSpec,
    SiteSelector,
)


@dataclass(frozen=True)
class PlannedSite:
    """A decoder site with the method it belongs to.

    Attributes:
        name: "site0", "site1" … in the order of the decoder.
        method: The method.
        index: The site's index within its method.
        site: Where it lies and what it reads.
    """

    name: str
    method: PruningMethod
    index: int
    site: DecoderSite

    def selector(
        self, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> SiteSelector:
        """Build the site's module from the pruning weights of all methods ("atp.site0.proj.weight" …)."""
        return self.method.selector(self.index, geometry, _own_weights(self.method, weights), decoder)


@dataclass(frozen=True)
class PruningPlan:
    """The pruning of one model.

    Attributes:
        methods: The methods; empty = unpruned.
        geometry: The model.
    """

    methods: tuple[PruningMethod, ...]
    geometry: ModelGeometry

    def __post_init__(self) -> None:
        for method in self.methods:
            method.check(self.geometry)
        names = [method.name for method in self.methods]
        if len(names) != len(set(names)):
            raise PruningError(f"a pruning method is listed twice in {names}: combine different methods only")
        before = [m for m in self.methods if m.tokens_per_tile(self.geometry) is not None]
        self._at_most_one("prune before the decoder", before)
        for method in before:
            # A feature pruner is given one of CLIP's towers; left away, nothing would be dropped.
            if not self.geometry.has_clip_tower and method.vision_pruner(self.geometry) is None:
                raise PruningError(
                    f"{method.name} drops tokens between the vision tower and the projector, which takes one of CLIP's "
                    "towers, and this model has another: use a method that drops tokens in the decoder"
                )
        self._at_most_one("bring probe rows", [m for m in self.methods if m.probe(self.geometry)])
        self._check_merging()
        check_cuts([planned.site.cut for planned in self.sites], self.geometry.num_layers)

    @property
    def sites(self) -> tuple[PlannedSite, ...]:
        """The decoder sites, in the order of the decoder."""
        found = [
            (site.cut, method, index, site)
            for method in self.methods
            for index, site in enumerate(method.decoder_sites(self.geometry))
        ]
        found.sort(key=lambda entry: entry[0])
        return tuple(
            PlannedSite(f"site{order}", method, index, site)
            for order, (_, method, index, site) in enumerate(found)
        )

    @property
    def segment_cuts(self) -> tuple[Cut, ...]:
        """Start of every segment and, last, the end of the decoder."""
        return (Cut(0), *(planned.site.cut for planned in self.sites), Cut(self.geometry.num_layers))

    @property
    def carried_deepstack_layers(self) -> int:
        """J where what DeepStack adds behind the first J layers has to pass a site; 0 where none is so early."""
        added = self.geometry.deepstack_layers
        return added if any(planned.site.cut < Cut(added) for planned in self.sites) else 0

    @property
    def tokens_per_tile(self) -> int | None:
        """Visual tokens of a tile that enter the projector, the most if it depends on the picture; None = all."""
        return next((n for m in self.methods if (n := m.tokens_per_tile(self.geometry)) is not None), None)

    @property
    def probe(self) -> ProbeSpec | None:
        """The probe rows, if a method brings some."""
        return next((probe for m in self.methods if (probe := m.probe(self.geometry)) is not None), None)

    def rate(self, weights: Mapping[str, Tensor]) -> tuple[int, RateSpec] | None:
        """What drops tokens while an answer is generated: the index of its site, which is the last, and how."""
        for method in self.methods:
            spec = method.rate(self.geometry, _own_weights(method, weights))
            if spec is None:
                continue
            index = [planned.method for planned in self.sites].index(method)
            if index != len(self.sites) - 1:
                raise PruningError(
                    f"{method.name} drops tokens while generating and must be the last site: "
                    f"'{self.sites[-1].method.name}' lies behind it"
                )
            return index, spec
        return None

    def vision_pruner(self) -> VisionPruner | None:
        """A new module that prunes inside the vision tower, if a method does."""
        return next(
            (pruner for m in self.methods if (pruner := m.vision_pruner(self.geometry)) is not None), None
        )

    def feature_pruner(self, tower: ClipVisionTower | None) -> FeaturePruner | None:
        """A new module that prunes between vision tower and projector, if a method does.

        Args:
            tower: The tower, if it is one of CLIP's; methods refuse others.
        """
        if tower is None:
            return None
        return next(
            (p for m in self.methods if (p := m.feature_pruner(self.geometry, tower)) is not None), None
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The learned tensors of all methods, by the names that ``pruning.safetensors`` uses."""
        return {
            f"{method.name}.{name}": shape
            for method in self.methods
            for name, shape in method.weight_shapes(self.geometry).items()
        }

    def _check_merging(self) -> None:
        """A site that merges dropped tokens needs as many as it counts on, and carries no probe rows or additions."""
        entering: int | None = self.tokens_per_tile or self.geometry.num_patches
        added = self.geometry.deepstack_layers
        for planned in self.sites:
            site = planned.site
            if site.merged_per_image and site.cut < Cut(added):
                raise PruningError(
                    f"{planned.method.name} merges tokens {site.cut.description}, and DeepStack adds features of "
                    f"single tokens behind the first {added} layers: merge before layer {added} or a later one"
                )
            if site.merged_per_image and site.keep_per_image is not None:
                needed = site.keep_per_image - site.merged_per_image + site.recycled_per_image
                if self.probe is not None or entering is None or entering < needed:
                    names = " and ".join(method.name for method in self.methods)
                    raise PruningError(
                        f"{names}: {planned.method.name} merges dropped tokens and needs {needed} visual tokens of a "
                        f"picture {site.cut.description}: combine it with methods that leave as many, or none"
                    )
            entering = site.keep_per_image

    @staticmethod
    def _at_most_one(what: str, methods: Sequence[PruningMethod]) -> None:
        if len(methods) > 1:
            names = " and ".join(method.name for method in methods)
            raise PruningError(f"{names} both {what}: combine methods whose places differ")


def _own_weights(method: PruningMethod, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One method's tensors by its own names: "atp.site0.proj.weight" → "site0.proj.weight"."""
    prefix = f"{method.name}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
