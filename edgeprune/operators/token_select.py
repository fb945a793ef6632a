"""TokenSelect: which rows of a sequence are kept, as a permutation and a count.

Torch references of the operator's modes; the ONNX functions are ``edgeprune.export.operators.token_select``.

Both modes return ``keep_indices`` (the kept rows, ascending, then the dropped rows, ascending: a permutation
of 0 … S-1) and ``keep_count``, so no shape depends on the data. Rows that are not droppable (text) are always
kept. A NaN score is the lowest of all, below -inf; +0 and -0 are equal; equal scores go to the lower index.
"""

import torch
from torch import Tensor

from edgeprune.errors import PruningError


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
    _check(scores, droppable)
    if scores.shape[0] != 1 or num_keep.dim() != 0:
        raise PruningError(
            f"select_top_k takes scores [1, S] and a scalar num_keep; got {list(scores.shape)} and "
            f"{list(num_keep.shape)}"
        )
    return _partition(~droppable | (_rank_by_score(scores[0], droppable) < num_keep))


@_select_by_threshold.register_fake
def _select_by_threshold_fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_selection(scores)


@_select_top_k.register_fake
def _select_top_k_fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_selection(scores)


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
