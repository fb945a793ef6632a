"""TokenSelect: which rows of a sequence are kept, as a permutation and a count.

Torch references of the operator's modes; the ONNX functions are ``edgeprune.export.operators.token_select``.

Every mode returns ``keep_indices`` (the kept rows, ascending, then the dropped rows, ascending: a permutation
of 0 … S-1) and ``keep_count``, so no shape depends on the data. Rows that are not droppable (text) are always
kept. A NaN score is the lowest of all, below -inf; +0 and -0 are equal; equal scores go to the lower index.
"""

import torch
from torch import Tensor

from edgeprune.errors import PruningError
from edgeprune.operators.schema import DPP_EPSILON, DPP_STEPS


def select_by_threshold(scores: Tensor, thresholds: Tensor, droppable: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the droppable rows whose score exceeds its threshold in any of P pairs.

    The comparison is strict and false for NaN. Where there are droppable rows and none would be kept, the one
    with the highest ``scores[0]`` survives.

    Shapes:
        scores: [P, S] float32
        thresholds: [P, S] float32
        droppable: [S] bool
        returns: keep_indices [S] int64, keep_count [] int64

    Raises:
        PruningError: The shapes or types do not fit.
    """
    keep_indices, keep_count = _select_by_threshold(scores, thresholds, droppable)
    return keep_indices, keep_count


def select_top_k(scores: Tensor, num_keep: Tensor | int, droppable: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the ``num_keep`` droppable rows with the highest scores.

    ``num_keep`` is clamped to [0, number of droppable rows]. As ONNX it is the K of a TopK: TensorRT's ITopK
    takes at most 3840, so an engine without the plugin keeps at most that many droppable rows.

    Shapes:
        scores: [1, S] float32
        num_keep: [] int64
        droppable: [S] bool
        returns: keep_indices [S] int64, keep_count [] int64

    Raises:
        PruningError: The shapes or types do not fit.
    """
    if not isinstance(num_keep, Tensor):
        num_keep = torch.tensor(num_keep, dtype=torch.int64, device=scores.device)
    keep_indices, keep_count = _select_top_k(scores, num_keep, droppable)
    return keep_indices, keep_count


def select_by_soft_nms(
    scores: Tensor,
    num_keep: Tensor | int,
    droppable: Tensor,
    features: Tensor,
    places: Tensor,
    nearness: Tensor,
    *,
    similarity_sigma: float,
) -> tuple[Tensor, Tensor]:
    """Keep ``num_keep`` droppable rows, one after the other, each lowering the scores of its likes nearby.

    The row i with the highest score is kept; the score of every row j is multiplied by
    1 - nearness[d²]·exp(-(1 - cos)²/2σ²), with the squared distance of i and j and the cosine of their features;
    then the next is chosen among those that are left. ``num_keep`` is clamped to [0, number of droppable rows].

    Nearness is a table and not an expression, so that every runtime multiplies by the same numbers and rows that
    are alike in everything tie everywhere.

    Shapes:
        scores: [1, S] float32
        num_keep: [] int64
        droppable: [S] bool
        features: [S, F] float32
        places: [S, 2] int64, where a row lies; only differences count
        nearness: [W] float32 in [0, 1], by squared distance; the last entry holds for everything further away
        returns: keep_indices [S] int64, keep_count [] int64

    Args:
        scores: The higher, the sooner kept.
        num_keep: How many.
        droppable: Rows to choose from; the others are kept.
        features: What similarity is measured on.
        places: What distance is measured on.
        nearness: How much a distance suppresses.
        similarity_sigma: σ.

    Raises:
        PruningError: The shapes or types do not fit.
    """
    if not isinstance(num_keep, Tensor):
        num_keep = torch.tensor(num_keep, dtype=torch.int64, device=scores.device)
    keep_indices, keep_count = _select_by_soft_nms(
        scores, num_keep, droppable, features, places, nearness, similarity_sigma
    )
    return keep_indices, keep_count


def select_by_dpp(
    kernel: Tensor, num_keep: Tensor | int, droppable: Tensor, groups: Tensor, group_keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep ``num_keep`` droppable rows, one after the other, each the one that adds most to the determinant.

    The greedy MAP of a determinantal point process with this kernel (Chen et al., "Fast Greedy MAP Inference for
    Determinantal Point Process to Improve Recommendation Diversity", NeurIPS 2018): a row's gain is its diagonal
    entry less what the rows kept before explain of it. Rows of different groups explain nothing of each other, and
    no group keeps more than its number, so every group's choice is that of a run of its own.

    Gains are compared in steps of 2⁻¹⁶, equals go to the lower index: rows that are alike in everything tie in every
    runtime, whatever their last bits. A gain of no step is 0, and a row kept with gain 0 explains nothing: where the
    kept rows explain everything, the rest goes by index. An entry that is NaN or infinite counts as 0. ``num_keep``
    is clamped to [0, number of droppable rows]; fewer are kept where the groups' numbers end before.

    Shapes:
        kernel: [S, S] float32, positive semidefinite, its diagonal about 1
        num_keep: [] int64
        droppable: [S] bool
        groups: [S] int64, equal for the rows of a group
        group_keep: [S] int64, how many of its group are kept, equal for the rows of a group
        returns: keep_indices [S] int64, keep_count [] int64

    Raises:
        PruningError: The shapes or types do not fit.
    """
    if not isinstance(num_keep, Tensor):
        num_keep = torch.tensor(num_keep, dtype=torch.int64, device=kernel.device)
    keep_indices, keep_count = _select_by_dpp(kernel, num_keep, droppable, groups, group_keep)
    return keep_indices, keep_count


@torch.library.custom_op("edgeprune::token_select_threshold", mutates_args=())
def _select_by_threshold(scores: Tensor, thresholds: Tensor, droppable: Tensor) -> tuple[Tensor, Tensor]:
    _check(scores, droppable)
    if thresholds.shape != scores.shape:
        raise PruningError(
            f"thresholds {list(thresholds.shape)} must have the shape of scores, {list(scores.shape)}"
        )
    chosen = (scores > thresholds).any(dim=0) & droppable
    # The survivor enters without a branch on data: it counts only where nothing was chosen.
    survivor = _rank_by_score(scores[0], droppable) == 0
    return _partition(~droppable | chosen | (survivor & ~chosen.any()))


@torch.library.custom_op("edgeprune::token_select_topk", mutates_args=())
def _select_top_k(scores: Tensor, num_keep: Tensor, droppable: Tensor) -> tuple[Tensor, Tensor]:
    _check_top_k(scores, num_keep, droppable)
    return _partition(~droppable | (_rank_by_score(scores[0], droppable) < num_keep))


@torch.library.custom_op("edgeprune::token_select_soft_nms", mutates_args=())
def _select_by_soft_nms(
    scores: Tensor,
    num_keep: Tensor,
    droppable: Tensor,
    features: Tensor,
    places: Tensor,
    nearness: Tensor,
    similarity_sigma: float,
) -> tuple[Tensor, Tensor]:
    _check_top_k(scores, num_keep, droppable)
    S = scores.shape[1]
    if features.dim() != 2 or features.shape[0] != S or places.shape != (S, 2) or nearness.dim() != 1:
        raise PruningError(
            f"select_by_soft_nms takes features [S, F], places [S, 2] and nearness [W] for {S} rows; got "
            f"{list(features.shape)}, {list(places.shape)} and {list(nearness.shape)}"
        )
    # Every score is finite from here on, so that minus infinity can mean "not to be had".
    limits = torch.finfo(torch.float32)
    score = torch.where(scores[0].isnan(), limits.min, scores[0]).clamp(limits.min, limits.max)
    direction = unit_rows(features)
    available = droppable.clone()
    for _ in range(min(int(num_keep), int(droppable.sum()))):
        chosen = torch.where(available, score, -torch.inf).argmax()
        available[chosen] = False
        offset = places - places[chosen]
        squared = (offset * offset).sum(dim=1).clamp(max=nearness.shape[0] - 1)
        unlike = 1.0 - direction @ direction[chosen]
        likeness = torch.exp(-0.5 / similarity_sigma**2 * (unlike * unlike))
        score = score * (1.0 - nearness[squared] * likeness)
    return _partition(~available)


@torch.library.custom_op("edgeprune::token_select_dpp", mutates_args=())
def _select_by_dpp(
    kernel: Tensor, num_keep: Tensor, droppable: Tensor, groups: Tensor, group_keep: Tensor
) -> tuple[Tensor, Tensor]:
    S = droppable.shape[0]
    if kernel.shape != (S, S) or groups.shape != (S,) or group_keep.shape != (S,) or num_keep.dim() != 0:
        raise PruningError(
            f"select_by_dpp takes kernel [S, S], a scalar num_keep, groups [S] and group_keep [S] for {S} rows; "
            f"got {list(kernel.shape)}, {list(num_keep.shape)}, {list(groups.shape)} and {list(group_keep.shape)}"
        )
    _check(kernel, droppable)
    kernel = torch.where(kernel.abs() <= torch.finfo(torch.float32).max, kernel, 0.0)
    gain, room, available = kernel.diagonal().clone(), group_keep.clone(), droppable.clone()
    trips = max(0, min(int(num_keep), int(droppable.sum())))
    # Row t: what the t-th kept row of its group explains of each row, a row of the Cholesky factor.
    factor = kernel.new_zeros(min(trips, int(group_keep.clamp(min=0).max())), S)
    for _ in range(trips):
        steps = (gain * DPP_STEPS).round().clamp(min=0.0)
        open_rows = available & (room > 0)
        chosen = torch.where(open_rows, steps, -1.0).argmax()
        if not open_rows[chosen]:
            break
        available[chosen] = False
        group = groups == groups[chosen]
        if steps[chosen] > 0:
            left = (kernel[chosen] - factor[:, chosen] @ factor) * (gain[chosen] + DPP_EPSILON).rsqrt()
            explained = torch.where(group, left, 0.0)
            factor[group_keep[chosen] - room[chosen]] += explained
            gain = gain - explained * explained
        room = room - group.long()
    return _partition(~available)


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length one, [S, F] float32; a row of zeros stays so."""
    rows = features.float()
    return rows / rows.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


@_select_by_threshold.register_fake
def _select_by_threshold_fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_selection(scores)


@_select_top_k.register_fake
def _select_top_k_fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_selection(scores)


@_select_by_soft_nms.register_fake
def _select_by_soft_nms_fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_selection(scores)


@_select_by_dpp.register_fake
def _select_by_dpp_fake(kernel: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_selection(kernel)


def _empty_selection(scores: Tensor) -> tuple[Tensor, Tensor]:
    keep_indices = scores.new_empty((scores.shape[1],), dtype=torch.int64)
    return keep_indices, scores.new_empty((), dtype=torch.int64)


def _rank_by_score(score: Tensor, droppable: Tensor) -> Tensor:
    """Rank of each row, 0 the best: droppable rows by score, then droppable NaN, then the others.

    Shapes:
        score: [S] float32
        droppable: [S] bool
        returns: [S] int64
    """
    nan = score.isnan()
    # A sort that compares bits would put -0 below +0; the addition makes both +0.
    by_score = torch.where(nan, -torch.inf, score + 0.0).argsort(descending=True, stable=True)
    tier = torch.where(droppable, nan.long(), 2)
    order = by_score[tier[by_score].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _partition(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation that moves the kept rows to the front, and their number.

    Shapes:
        keep: [S] bool
        returns: [S] int64, [] int64
    """
    return (~keep).long().argsort(stable=True), keep.sum()


def _check(scores: Tensor, droppable: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[0] == 0 or droppable.shape != scores.shape[1:]:
        raise PruningError(
            "token selection takes scores [P, S] with P ≥ 1 and droppable [S]; got "
            f"{list(scores.shape)} and {list(droppable.shape)}"
        )
    if scores.dtype != torch.float32 or droppable.dtype != torch.bool:
        raise PruningError(
            "token selection takes float32 scores and a boolean droppable; got "
            f"{scores.dtype} and {droppable.dtype}"
        )


def _check_top_k(scores: Tensor, num_keep: Tensor, droppable: Tensor) -> None:
    _check(scores, droppable)
    if scores.shape[0] != 1 or num_keep.dim() != 0:
        raise PruningError(
            f"selection of a number of rows takes scores [1, S] and a scalar num_keep; got "
            f"{list(scores.shape)} and {list(num_keep.shape)}"
        )
