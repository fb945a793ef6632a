"""Pruners by name, the same as those of ``runtimes/cpp/tests/pruners.h``, and a record of what they saw."""

import threading
from collections.abc import Callable

from edgeprune.runtimes.host_pruner import Pruner, SiteScores


class OutOfTimeError(Exception):
    """What a pruner of a user's own may raise."""


def all_tokens(site: SiteScores) -> list[int]:
    return list(range(len(site.scores)))[::-1]


def odd_columns(site: SiteScores) -> list[int]:
    """The first, and those of odd columns below the first rows, one row more with every picture."""
    return [
        index
        for index, (picture, _, row, column, _, _) in enumerate(site.places.tolist())
        if index == 0 or (column % 2 == 1 and row > picture)
    ]


def raises(site: SiteScores) -> list[int]:
    del site
    raise OutOfTimeError("no time is left")


CHOICES: dict[str, Callable] = {
    "own": lambda site: site.own_choice,
    "third": lambda site: site.highest(len(site.scores) // 3),
    "all": all_tokens,
    "odd columns": odd_columns,
}
"""Choices that there can be."""

REFUSED: dict[str, tuple[Callable, str]] = {
    "nothing": (
        lambda _: [],
        "the pruner keeps no visual token at site0 ({place}): return at least one index",
    ),
    "twice": (
        lambda _: [2, 1, 0, 2],
        "the pruner keeps the visual token 2 twice at site0 ({place}): return each index once",
    ),
    "negative": (
        lambda _: [0, -1],
        "the pruner keeps the visual token -1 at site0 ({place}): return indices from 0 to 35",
    ),
    "beyond": (
        lambda site: [0, len(site.scores)],
        "the pruner keeps the visual token 36 at site0 ({place}): return indices from 0 to 35",
    ),
    "too many": (
        lambda site: [0] * (len(site.scores) + 5),
        "the pruner keeps 41 of 36 visual tokens at site0 ({place}): return each index once",
    ),
}
"""Choices that there cannot be of one picture's 36 tokens, and what is said of them."""


class Recording:
    """A pruner that remembers what each thread has seen."""

    def __init__(self, choice: Pruner) -> None:
        self.choice = choice
        self._own = threading.local()

    def __call__(self, site: SiteScores):
        self.seen.append(site)
        return self.choice(site)

    @property
    def seen(self) -> list[SiteScores]:
        """By this thread, since :meth:`take`."""
        if not hasattr(self._own, "seen"):
            self._own.seen = []
        return self._own.seen

    def take(self) -> list[SiteScores]:
        """What was seen, forgotten."""
        seen, self._own.seen = self.seen, []
        return seen
