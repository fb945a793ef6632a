"""A choice of visual tokens by the program that runs a bundle, in the place of the bundle's own.

A site takes one if its graph gives its ``scores`` (:class:`edgeprune.prune.method.ScoringSelector`). What the program
returns is checked here; the C++ library has the same checks and sentences (``src/decoder/host_pruner.cpp``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeprune import tensor_names as names
from edgeprune.errors import BackendError, PruningError
from edgeprune.manifest import Manifest, SiteEntry
from edgeprune.visual_layout import Int64Array, VisualLayout


@dataclass(frozen=True)
class SiteScores:
    """What a pruner sees: the N visual tokens that have reached a site, in the order of the prompt.

    Attributes:
        name: The site, "site0" …
        place: Where it lies, in words.
        layer: The decoder layer that it lies before, or inside of, 0-based.
        scores: [N] float32, what the site's graph scored them with; the higher, the more important.
        slots: [N] int64, which tokens they are (:mod:`edgeprune.visual_layout`), as an answer's report names them.
        places: [N, 6] int64, where they stand: picture, grid, row, column, rows and columns of that grid.
        own_choice: [K] int64, the indices that the bundle itself would keep, ascending.
        elapsed_ms: Milliseconds since the answer began.
    """

    name: str
    place: str
    layer: int
    scores: NDArray[np.float32]
    slots: Int64Array
    places: Int64Array
    own_choice: Int64Array
    elapsed_ms: float

    def highest(self, count: int) -> Int64Array:
        """Indices of the ``count`` highest scores (at least 1, at most N), ascending.

        Equals go to the lower index and NaN is the lowest, as in the graphs.
        """
        # The last key is the first to sort by; the sort is stable.
        order = np.lexsort((-self.scores, np.isnan(self.scores)))
        return np.sort(order[: max(1, count)]).astype(np.int64)


Pruner = Callable[[SiteScores], ArrayLike]
"""Returns the indices of the tokens that stay: integers from 0 to N-1, at least one, each once, in any order.

It is called on the thread that asks, by several threads at once where they share a session. What it raises, the answer
raises.
"""


def check_takes_pruner(manifest: Manifest) -> None:
    """Refuse a bundle in which no pruner could choose, or not without harm.

    Raises:
        PruningError: With the remedy.
    """
    scored = False
    for site in manifest.sites:
        if scored and site.merged_per_image:
            raise PruningError(
                f"{site.graph} merges tokens and counts on those that the bundle itself leaves before it: open the "
                "bundle without a pruner"
            )
        scored = scored or any(entry.name == names.SCORES for entry in manifest.graphs[site.graph].outputs)
    if not scored:
        raise PruningError(
            "no site of this bundle takes a pruner: export it with --method host, or open it without a pruner"
        )


def choose_rows(
    pruner: Pruner,
    site: SiteEntry,
    visual: VisualLayout,
    *,
    scores: NDArray[np.float32],
    visual_slots: Int64Array,
    own_rows: Int64Array,
    elapsed_ms: float,
) -> Int64Array:
    """The rows that a pruner keeps, text included, ascending [K].

    Args:
        pruner: The program's choice.
        site: The site.
        visual: The unpruned visual tokens.
        scores: [S] float32, of the rows that have reached the site.
        visual_slots: [S], their slots, -1 for text.
        own_rows: The rows that the bundle itself keeps.
        elapsed_ms: Milliseconds since the answer began.

    Raises:
        PruningError: The pruner keeps nothing, or what is not there.
        BackendError: The site's graph scores other rows than there are.
    """
    if scores.shape != visual_slots.shape:
        raise BackendError(
            f"the graph '{site.graph}' scores other rows than there are: export the bundle again"
        )
    is_visual = visual_slots >= 0
    slots = visual_slots[is_visual]
    table = visual.table[slots]
    pictures = np.array([grid.image for grid in visual.grids], np.int64)[table[:, :1]]
    kept_by_itself = np.isin(np.flatnonzero(is_visual), own_rows)
    chosen = pruner(
        SiteScores(
            name=site.graph,
            place=site.place,
            layer=site.layer,
            scores=scores[is_visual],
            slots=slots,
            places=np.concatenate((pictures, table), axis=1),
            own_choice=np.flatnonzero(kept_by_itself),
            elapsed_ms=elapsed_ms,
        )
    )
    keep = ~is_visual
    keep[np.flatnonzero(is_visual)[_checked(chosen, slots.size, f"at {site.graph} ({site.place})")]] = True
    return np.flatnonzero(keep).astype(np.int64)


def _checked(chosen: ArrayLike, num_tokens: int, where: str) -> Int64Array:
    """The indices, each there and there once."""
    try:
        indices = np.asarray(chosen)
    except ValueError:  # rows of several lengths
        indices = np.empty((0, 0))
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise PruningError(
            f"the pruner returns {_shown(chosen)} {where}: return a list or an array of the indices that stay"
        )
    if not indices.size:
        raise PruningError(f"the pruner keeps no visual token {where}: return at least one index")
    if indices.size > num_tokens:
        raise PruningError(
            f"the pruner keeps {indices.size} of {num_tokens} visual tokens {where}: return each index once"
        )
    for index in indices[(indices < 0) | (indices >= num_tokens)]:
        raise PruningError(
            f"the pruner keeps the visual token {index} {where}: return indices from 0 to {num_tokens - 1}"
        )
    ordered = np.sort(indices)
    for index in ordered[1:][ordered[1:] == ordered[:-1]]:
        raise PruningError(f"the pruner keeps the visual token {index} twice {where}: return each index once")
    return ordered.astype(np.int64)


def _shown(chosen: object) -> str:
    """What a pruner returned, in a line."""
    if isinstance(chosen, np.ndarray):
        return f"{chosen.dtype.name} values of shape {list(chosen.shape)}"
    return " ".join(repr(chosen).split())[:60]
