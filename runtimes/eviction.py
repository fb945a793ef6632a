"""Visual tokens that leave the KV caches while an answer is generated: the host's part of it."""

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


def tokens_left(num_visual: int, rate_index: int, num_rates: int) -> int:
    """N - ⌊N·k/R⌋, k = 0 … R-1 (DyRate Eq. 1: r_k is the share removed)."""
    return num_visual - num_visual * rate_index // num_rates


class Eviction:
    """Which rows the caches behind a site still hold, and which a higher rate drops.

    The rate never falls: what has left a cache is gone.

    Attributes:
        left: Visual tokens in the caches.
        events: (generated tokens, visual tokens left) at every drop.
    """

    def __init__(self, visual_ranks: Int64Array, num_visual: int, num_rates: int) -> None:
        """Start behind the prefill.

        Args:
            visual_ranks: Of every row in the caches, 0 the most important, -1 for text.
            num_visual: N, visual tokens that entered the site.
            num_rates: R.
        """
        self._ranks = visual_ranks
        self._num_visual = num_visual
        self._num_rates = num_rates
        self.left = int((visual_ranks >= 0).sum())
        self.events: list[tuple[int, int]] = []

    def rows_to_keep(self, rate_index: int, cached_rows: int, generated: int) -> Int64Array | None:
        """The rows that stay in the caches at this rate, ascending; None if all of them do.

        Args:
            rate_index: The rate's index k.
            cached_rows: Rows in the caches; those that are new since the prefill are text.
            generated: Tokens generated so far.
        """
        left = tokens_left(self._num_visual, rate_index, self._num_rates)
        if left >= self.left:
            return None
        new = np.full(cached_rows - len(self._ranks), -1, np.int64)
        ranks = np.concatenate([self._ranks, new])
        rows = np.flatnonzero(ranks < left)
        self._ranks, self.left = ranks[rows], left
        self.events.append((generated, left))
        return rows.astype(np.int64)
