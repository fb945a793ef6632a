"""Where the visual tokens of a prompt come from and where they stand, before anything is pruned.

Read by the torch reference and by the runtimes: no torch here.

A *slot* is the identity of a visual token all the way through the model. The slots 0 … T·P-1 are the outputs of the
vision tower, tile after tile; slots behind them belong to rows that a family inserts, as LLaVA-NeXT its newlines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class VisualGrid:
    """A rectangle of visual tokens: a picture, a tile of one, or several tiles joined.

    Attributes:
        image: The picture it belongs to.
        rows: Rows of tokens.
        columns: Columns of tokens.
        box: Left, top, right and bottom of what it shows, in pixels of the picture.
        overview: Whether it shows the picture as a whole, beside grids that show its parts.
    """

    image: int
    rows: int
    columns: int
    box: tuple[float, float, float, float]
    overview: bool = False


@dataclass(frozen=True)
class FeatureRows:
    """Which rows of the tower's output enter the decoder, in which order.

    Attributes:
        rows: [N] int64, rows of the tower's output; -1 - slot for an inserted row.
        tokens_per_image: How many of them belong to each picture.
    """

    rows: Int64Array
    tokens_per_image: tuple[int, ...]


@dataclass(frozen=True)
class VisualLayout:
    """The visual tokens of a prompt's pictures, unpruned.

    Attributes:
        grids: The rectangles, in the order of the prompt.
        places: [P, 3] int64 by slot: grid, row and column; grid -1 where the tower sees only padding.
        slots: [N] int64, the slots in the order of the prompt.
        inserted: How many slots, the last ones, are no outputs of the tower.
    """

    grids: tuple[VisualGrid, ...]
    places: Int64Array
    slots: Int64Array
    inserted: int = 0

    @classmethod
    def of_whole_grids(cls, grids: Sequence[VisualGrid]) -> "VisualLayout":
        """Pictures whose grids hold every output of the tower, row by row, and nothing else."""
        places = [
            np.stack((np.full(r.size, index), r.ravel(), c.ravel()), axis=1)
            for index, grid in enumerate(grids)
            for r, c in [np.mgrid[: grid.rows, : grid.columns]]
        ]
        joined = np.concatenate([np.zeros((0, 3), np.int64), *places]).astype(np.int64)
        return cls(tuple(grids), joined, np.arange(joined.shape[0], dtype=np.int64))

    @property
    def num_images(self) -> int:
        """M."""
        return 1 + max((grid.image for grid in self.grids), default=-1)

    @cached_property
    def tokens_per_image(self) -> tuple[int, ...]:
        """Visual tokens of every picture before pruning."""
        return self.count_by_image(self.slots)

    @cached_property
    def table(self) -> Int64Array:
        """[P, 5] int64 by slot: grid, row, column, rows and columns of that grid; zeros where nothing is."""
        sizes = np.array([(grid.rows, grid.columns) for grid in self.grids], np.int64).reshape(-1, 2)
        shown = self.places[:, :1] >= 0
        grid = np.maximum(self.places[:, 0], 0)
        table: Int64Array = np.where(shown, np.concatenate((self.places, sizes[grid]), axis=1), 0)
        return table

    def rows_beforehand(self, tokens_per_tile: int | None, tile_size: int) -> FeatureRows | None:
        """The rows that enter the decoder, if they are known before the tower has run.

        Args:
            tokens_per_tile: Tokens of a tile that leave the tower; None if nothing is dropped there.
            tile_size: Tokens of a tile that enter it.
        """
        num_tower = self.places.shape[0] - self.inserted
        if tokens_per_tile is None:
            rows = np.where(self.slots >= num_tower, -1 - self.slots, self.slots)
            return FeatureRows(rows, self.tokens_per_image)
        if not self._is_plain:
            return None
        # Rows of a tile stand together, and tiles in the order of the prompt.
        images = self._image_of(np.arange(0, num_tower, tile_size))
        rows = np.arange(images.size * tokens_per_tile, dtype=np.int64)
        return FeatureRows(rows, _counts(np.repeat(images, tokens_per_tile), self.num_images))

    def rows_of(self, patch_slots: Int64Array, counts: Int64Array | None) -> FeatureRows:
        """The rows that enter the decoder, from what has left a tower that drops tokens.

        Args:
            patch_slots: [T·K] int64, the slot of every row of the tower's output.
            counts: [T] int64, how many of a tile's K rows are tokens, the first ones; None = all.
        """
        rows = np.arange(patch_slots.shape[0], dtype=np.int64)
        if counts is not None:
            by_tile = rows.reshape(counts.shape[0], -1)
            rows = by_tile[by_tile - by_tile[:, :1] < counts[:, None]]
        if self._is_plain:
            return FeatureRows(rows, self.count_by_image(patch_slots[rows]))
        order = np.full(self.places.shape[0], -1, np.int64)
        order[self.slots] = np.arange(self.slots.shape[0])
        rows = rows[order[patch_slots[rows]] >= 0]
        new = np.arange(self.places.shape[0] - self.inserted, self.places.shape[0], dtype=np.int64)
        slots = np.concatenate((patch_slots[rows], new))
        joined = np.concatenate((rows, -1 - new))[np.argsort(order[slots], kind="stable")]
        return FeatureRows(joined, self.count_by_image(slots))

    def split_over_grids(self, per_image: Sequence[int]) -> Int64Array:
        """Divide a number for each picture among its grids, by the tokens that they show, [G] int64."""
        of_grid = np.bincount(self.places[self.slots, 0], minlength=len(self.grids))
        parts = np.zeros(len(self.grids), np.int64)
        for image, number in enumerate(per_image):
            own = [index for index, grid in enumerate(self.grids) if grid.image == image]
            ends = np.cumsum(of_grid[own]) * number // max(1, int(of_grid[own].sum()))
            parts[own] = np.diff(ends, prepend=0)
        return parts

    def count_by_image(self, slots: Int64Array) -> tuple[int, ...]:
        """How many of the slots [K] belong to each picture."""
        return _counts(self._image_of(slots), self.num_images) if slots.size else (0,) * self.num_images

    @property
    def _is_plain(self) -> bool:
        """Whether the prompt shows just what the tower gives, in its order."""
        return bool(np.array_equal(self.slots, np.arange(self.places.shape[0])) and not self.inserted)

    def _image_of(self, slots: Int64Array) -> Int64Array:
        images = np.array([grid.image for grid in self.grids], np.int64)
        found: Int64Array = images[self.places[slots, 0]]
        return found


def _counts(images: Int64Array, num_images: int) -> tuple[int, ...]:
    return tuple(int(count) for count in np.bincount(images, minlength=num_images))
