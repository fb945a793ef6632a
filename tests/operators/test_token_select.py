import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import PruningError
from edgeprune.operators.token_select import (
    select_by_dpp,
    select_by_soft_nms,
    select_by_threshold,
    select_top_k,
)

# Few distinct values: ties, signed zeros, infinities and NaN meet often.
SCORES = st.sampled_from([0.0, -0.0, 0.25, 0.5, -1.0, math.inf, -math.inf, math.nan])


def permutation(kept, size):
    """The kept rows, ascending, then the others, ascending; and how many are kept."""
    front = [i for i in range(size) if i in kept]
    return front + [i for i in range(size) if i not in kept], len(front)


def best_first(scores, rows):
    """Rows by score, the highest first: NaN behind everything, ties to the lower index."""
    numbers = [i for i in rows if not math.isnan(scores[i])]
    ordered = []
    while numbers:
        best = numbers[0]
        for i in numbers:
            if scores[i] > scores[best]:
                best = i
        ordered.append(best)
        numbers.remove(best)
    return ordered + [i for i in rows if math.isnan(scores[i])]


def threshold_by_hand(scores, thresholds, droppable):
    candidates = [i for i, flag in enumerate(droppable) if flag]
    kept = {i for i in candidates for p in range(len(scores)) if scores[p][i] > thresholds[p][i]}
    if candidates and not kept:
        kept = {best_first(scores[0], candidates)[0]}
    return permutation(kept | {i for i, flag in enumerate(droppable) if not flag}, len(droppable))


def top_k_by_hand(scores, num_keep, droppable):
    candidates = [i for i, flag in enumerate(droppable) if flag]
    kept = set(best_first(scores, candidates)[: max(num_keep, 0)])
    return permutation(kept | {i for i, flag in enumerate(droppable) if not flag}, len(droppable))


@st.composite
def threshold_inputs(draw):
    P, S = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    rows = st.lists(st.lists(SCORES, min_size=S, max_size=S), min_size=P, max_size=P)
    return draw(rows), draw(rows), draw(st.lists(st.booleans(), min_size=S, max_size=S))


@st.composite
def top_k_inputs(draw):
    S = draw(st.integers(1, 12))
    scores = draw(st.lists(SCORES, min_size=S, max_size=S))
    return scores, draw(st.integers(-1, S + 2)), draw(st.lists(st.booleans(), min_size=S, max_size=S))


@settings(max_examples=300, deadline=None)
@given(inputs=threshold_inputs())
def test_threshold_equals_the_definition(inputs):
    scores, thresholds, droppable = inputs
    keep_indices, keep_count = select_by_threshold(
        torch.tensor(scores), torch.tensor(thresholds), torch.tensor(droppable)
    )
    assert (keep_indices.tolist(), keep_count.item()) == threshold_by_hand(scores, thresholds, droppable)
    assert keep_indices.dtype == keep_count.dtype == torch.int64
    assert keep_count.dim() == 0


@settings(max_examples=300, deadline=None)
@given(inputs=top_k_inputs())
def test_top_k_equals_the_definition(inputs):
    scores, num_keep, droppable = inputs
    keep_indices, keep_count = select_top_k(
        torch.tensor([scores]), torch.tensor(num_keep), torch.tensor(droppable)
    )
    assert (keep_indices.tolist(), keep_count.item()) == top_k_by_hand(scores, num_keep, droppable)
    assert keep_indices.dtype == keep_count.dtype == torch.int64
    assert keep_count.dim() == 0


def soft_nms(scores, num_keep, *, droppable=None, nearness=(1.0, 0.5, 0.0), features=None, sigma=0.1):
    """Kept rows; the rows stand in a line."""
    size = len(scores)
    places = torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)], dim=1)
    keep_indices, keep_count = select_by_soft_nms(
        torch.tensor([scores]),
        num_keep,
        torch.ones(size, dtype=torch.bool) if droppable is None else torch.tensor(droppable),
        torch.ones(size, 2) if features is None else torch.tensor(features),
        places,
        torch.tensor(nearness),
        similarity_sigma=sigma,
    )
    return keep_indices[:keep_count].tolist()


def test_soft_nms_lowers_the_scores_of_likes_nearby():
    # 0.9 halves its neighbours: 0.8 falls to 0.4, so 0.5 is the second.
    assert soft_nms([0.8, 0.9, 0.3, 0.5], 2) == [1, 3]
    # They are not alike: nothing is lowered.
    assert soft_nms([0.8, 0.9, 0.3, 0.5], 2, features=[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]) == [
        0,
        1,
    ]
    # They are not near.
    assert soft_nms([0.8, 0.9, 0.3, 0.5], 2, nearness=(1.0, 0.0)) == [0, 1]


def test_soft_nms_without_suppression_is_top_k():
    rng = random.Random(0)
    for _ in range(50):
        scores = [rng.choice([0.0, 0.25, 0.5, -1.0, math.nan]) for _ in range(8)]
        droppable = [rng.random() < 0.7 for _ in scores]
        num_keep = rng.randint(0, 9)
        order, count = top_k_by_hand(scores, num_keep, droppable)
        assert soft_nms(scores, num_keep, droppable=droppable, nearness=(0.0,)) == order[:count]


def test_soft_nms_takes_no_row_twice():
    assert soft_nms([0.0] * 5, 3, nearness=(1.0, 1.0, 1.0)) == [0, 1, 2]
    assert soft_nms([0.5] * 5, 9, droppable=[True] * 4 + [False]) == [0, 1, 2, 3, 4]


def dpp(kernel, num_keep, *, droppable=None, groups=None, group_keep=None):
    """Kept rows."""
    size = len(kernel)
    keep_indices, keep_count = select_by_dpp(
        torch.as_tensor(kernel, dtype=torch.float32),
        num_keep,
        torch.ones(size, dtype=torch.bool) if droppable is None else torch.tensor(droppable),
        torch.zeros(size, dtype=torch.int64) if groups is None else torch.tensor(groups),
        torch.full((size,), size) if group_keep is None else torch.tensor(group_keep),
    )
    return keep_indices[:keep_count].tolist()


def test_dpp_keeps_what_differs():
    directions = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.5, 0.8], [0.0, 0.9]])
    kernel = directions @ directions.T
    # The longest first; the last is at a right angle to it and loses nothing.
    assert dpp(kernel, 1) == [0]
    assert dpp(kernel, 2) == [0, 3]
    # Two rows span the plane: the others gain nothing and go by index.
    assert dpp(kernel, 3) == [0, 1, 3]
    assert dpp(kernel, 9) == [0, 1, 2, 3]
    assert dpp(kernel, -1) == []
    assert dpp(kernel, 1, droppable=[False, True, True, True]) == [0, 1]


def test_dpp_of_a_diagonal_kernel_is_top_k():
    rng = random.Random(1)
    for _ in range(50):
        # No negative diagonal in a kernel; what is not finite counts as zero.
        scores = [rng.choice([0.0, 0.25, 0.5, 1.0, math.nan, math.inf]) for _ in range(8)]
        finite = [score if math.isfinite(score) else 0.0 for score in scores]
        droppable = [rng.random() < 0.7 for _ in scores]
        num_keep = rng.randint(0, 9)
        order, count = top_k_by_hand(finite, num_keep, droppable)
        assert dpp(torch.diag(torch.tensor(scores)), num_keep, droppable=droppable) == order[:count]


def test_dpp_keeps_as_many_of_a_group_as_it_says():
    groups, group_keep = [0, 1, 0, 1, 0, 1], [2, 1, 2, 1, 2, 1]
    # All rows alike: a group's first ones; rows of the other group explain nothing.
    assert dpp(torch.ones(6, 6), 3, groups=groups, group_keep=group_keep) == [0, 1, 2]
    assert dpp(torch.ones(6, 6), 6, groups=groups, group_keep=group_keep) == [0, 1, 2]
    assert dpp(torch.ones(6, 6), 6, groups=groups, group_keep=[0] * 6) == []
    assert dpp(torch.ones(6, 6), 2, groups=groups, group_keep=[1, 9] * 3) == [0, 1]


def test_dpp_checks_its_inputs():
    with pytest.raises(PruningError, match=r"takes kernel \[S, S\], a scalar num_keep"):
        dpp(torch.ones(3, 3), 1, groups=[0, 0])
    with pytest.raises(PruningError, match=r"kernel \[S, S\]"):
        select_by_dpp(torch.ones(3, 2), 1, torch.ones(3) > 0, torch.zeros(3), torch.zeros(3))


def test_equal_scores_go_to_the_lower_index():
    scores, droppable = torch.ones(1, 5), torch.tensor([True, False, True, True, True])
    keep_indices, keep_count = select_top_k(scores, 2, droppable)
    assert keep_indices[:keep_count].tolist() == [0, 1, 2]


def test_the_best_row_survives_where_none_is_above_its_threshold():
    scores = torch.tensor([[0.1, 0.4, 0.4], [9.0, 0.0, 0.0]])
    thresholds = torch.full((2, 3), 10.0)
    keep_indices, keep_count = select_by_threshold(scores, thresholds, torch.ones(3, dtype=torch.bool))
    assert keep_indices[:keep_count].tolist() == [1]


def test_without_droppable_rows_nothing_is_selected_for_survival():
    scores = torch.zeros(1, 3)
    keep_indices, keep_count = select_by_threshold(scores, scores, torch.zeros(3, dtype=torch.bool))
    assert keep_count.item() == 3
    assert keep_indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_keep", [3, torch.tensor(3)])
def test_num_keep_may_be_a_number_or_a_tensor(num_keep):
    _, keep_count = select_top_k(torch.rand(1, 6), num_keep, torch.ones(6, dtype=torch.bool))
    assert keep_count.item() == 3


def test_shapes_and_types_that_do_not_fit_are_named():
    droppable = torch.ones(3, dtype=torch.bool)
    with pytest.raises(PruningError, match=r"scores \[P, S\]"):
        select_by_threshold(torch.zeros(3), torch.zeros(3), droppable)
    with pytest.raises(PruningError, match="shape of scores"):
        select_by_threshold(torch.zeros(2, 3), torch.zeros(1, 3), droppable)
    with pytest.raises(PruningError, match=r"scores \[1, S\]"):
        select_top_k(torch.zeros(2, 3), 1, droppable)
    with pytest.raises(PruningError, match="float32 scores"):
        select_top_k(torch.zeros(1, 3, dtype=torch.float16), 1, droppable)
    with pytest.raises(PruningError, match=r"features \[S, F\], places \[S, 2\] and nearness \[W\] for 3"):
        select_by_soft_nms(
            torch.zeros(1, 3),
            1,
            droppable,
            torch.zeros(2, 4),
            torch.zeros(3, 2, dtype=torch.int64),
            torch.zeros(1),
            similarity_sigma=1.0,
        )
    with pytest.raises(PruningError, match="boolean droppable"):
        select_top_k(torch.zeros(1, 3), 1, droppable.long())


def test_the_custom_operators_are_well_formed():
    scores, droppable = torch.rand(2, 6), torch.tensor([True, False] * 3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.edgeprune.token_select_threshold.default,
        (scores, torch.rand(2, 6), droppable),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.edgeprune.token_select_topk.default,
        (scores[:1].clone(), torch.tensor(2), droppable),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.edgeprune.token_select_soft_nms.default,
        (
            scores[:1].clone(),
            torch.tensor(2),
            droppable,
            torch.rand(6, 3),
            torch.arange(12).view(6, 2),
            torch.tensor([1.0, 0.0]),
            0.5,
        ),
        test_utils=checks,
    )
