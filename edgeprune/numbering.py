"""Position ids behind a pruning site: kept, as they should be, or renumbered, as some methods' code does.

Read by the torch reference and by the runtimes: no torch here.
"""

from collections.abc import Sequence

from edgeprune.errors import PruningError

ORIGINAL = "original"
"""Kept tokens keep their positions; a generated token's is the unpruned length plus its index."""

RENUMBERED = "renumbered"
"""Rows are numbered from 0 behind the site; a generated token's position is the length of the layer's cache."""

RENUMBERED_PREFILL = "renumbered in prefill"
"""Rows are numbered from 0 behind the site, but generated tokens count from the unpruned length."""

NUMBERINGS = (ORIGINAL, RENUMBERED, RENUMBERED_PREFILL)


def segment_numberings(sites: Sequence[str]) -> tuple[str, ...]:
    """The numbering of every segment, from that of the sites between them.

    A site that leaves positions as they are leaves them as an earlier site made them.

    Raises:
        PruningError: A numbering is unknown.
    """
    numberings = [ORIGINAL]
    for numbering in sites:
        if numbering not in NUMBERINGS:
            raise PruningError(
                f"unknown numbering of positions '{numbering}', known: {', '.join(NUMBERINGS)}"
            )
        numberings.append(numberings[-1] if numbering == ORIGINAL else numbering)
    return tuple(numberings)


def next_position(numbering: str, unpruned: int, cached: int) -> int:
    """Position of a generated token in a segment.

    Args:
        numbering: The segment's.
        unpruned: The unpruned prompt length plus the tokens generated before.
        cached: Rows in the segment's cache.
    """
    return cached if numbering == RENUMBERED else unpruned
