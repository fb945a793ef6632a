"""How many visual tokens of a picture a method keeps: a number, or a share of what a picture has."""

from typing import NamedTuple

from edgeprune.errors import PruningError
from edgeprune.prune.method import ModelGeometry

PLACES = ("vit", "projector")
"""Where a baseline may drop tokens: inside the vision tower, or between it and the projector."""


class SiteBudget(NamedTuple):
    """What a decoder site says of the number it keeps: one of the two."""

    keep_per_image: int | None
    keep_share: float | None


def check_budget(name: str, keep: int, keep_ratio: float) -> None:
    """Refuse a budget that no model allows.

    Args:
        name: The method, for messages.
        keep: Tokens kept per picture; 0 = by ``keep_ratio``.
        keep_ratio: Share kept.

    Raises:
        PruningError: With the allowed values.
    """
    if keep < 0:
        raise PruningError(f"{name}: 'keep' is {keep}, allowed: 1 or more, or 0 to keep by 'keep_ratio'")
    if not 0 < keep_ratio <= 1:
        raise PruningError(f"{name}: 'keep_ratio' is {keep_ratio}, allowed: above 0, up to 1 (share kept)")


def check_place(name: str, place: str) -> None:
    """Refuse a place outside of :data:`PLACES`.

    Raises:
        PruningError: With the allowed values.
    """
    if place not in PLACES:
        raise PruningError(f"{name}: 'at' is '{place}', allowed: {', '.join(PLACES)}")


def tokens_to_keep(name: str, keep: int, keep_ratio: float, num_patches: int) -> int:
    """Tokens kept of a picture with ``num_patches``: ``keep``, or ⌊``num_patches`` · ``keep_ratio``⌋, at least 1.

    Raises:
        PruningError: ``keep`` is more than there are.
    """
    if keep > num_patches:
        raise PruningError(f"{name}: 'keep' is {keep}, but a picture has {num_patches} visual tokens")
    # The product is rounded first: 0.29 · 100 is 28.999999999999996.
    return keep or max(1, int(round(num_patches * keep_ratio, 6)))


def site_budget(name: str, keep: int, keep_ratio: float, geometry: ModelGeometry) -> SiteBudget:
    """The budget of a decoder site: a number where it is known, a share where pictures differ in size.

    Raises:
        PruningError: ``keep`` is more than a picture can have.
    """
    if geometry.one_size:
        return SiteBudget(tokens_to_keep(name, keep, keep_ratio, geometry.num_patches), None)
    return SiteBudget(keep, None) if keep else SiteBudget(None, keep_ratio)
