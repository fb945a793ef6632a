import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    DTYPES,
    DppCase,
    SoftNmsCase,
    dpp_in_float64,
    random_droppable,
    random_scores,
    soft_nms_in_float64,
)

from edgeprune.operators.token_select import (
    select_by_dpp,
    select_by_soft_nms,
    select_by_threshold,
    select_top_k,
)
from edgeprune.plugins.kernel_library import KernelError

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

SEEDS = st.integers(0, 2**32 - 1)


def ranks(score: np.ndarray) -> np.ndarray:
    """The order of rows, the best first: the specification in two stable sorts."""
    by_score = np.argsort(-np.where(np.isnan(score), -np.inf, score), kind="stable")
    return by_score[np.argsort(np.isnan(score)[by_score], kind="stable")]


def permutation(keep: np.ndarray) -> tuple[list[int], int]:
    return [*np.flatnonzero(keep).tolist(), *np.flatnonzero(~keep).tolist()], int(keep.sum())


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, B=st.integers(1, 3), S=st.integers(0, 70), extra=st.integers(-2, 2))
def test_top_k(reference, seed, B, S, extra):
    rng = np.random.default_rng(seed)
    scores, droppable = random_scores(rng, B, S), random_droppable(rng, B, S)
    num_keep = torch.from_numpy(rng.choice([0, extra, S + extra, *range(S)], size=B))
    order, count = reference.select_top_k(scores, num_keep, droppable)
    for b in range(B):
        expected = select_top_k(scores[b : b + 1], num_keep[b], droppable[b])
        assert torch.equal(order[b], expected[0])
        assert count[b] == expected[1]
        best = [i for i in ranks(scores[b].numpy()) if droppable[b, i]][: max(int(num_keep[b]), 0)]
        keep = ~droppable[b].numpy()
        keep[best] = True
        assert (order[b].tolist(), int(count[b])) == permutation(keep)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, B=st.integers(1, 3), P=st.integers(1, 3), S=st.integers(0, 70))
def test_threshold(reference, seed, B, P, S):
    rng = np.random.default_rng(seed)
    scores, thresholds = random_scores(rng, B, P, S), random_scores(rng, B, P, S)
    if rng.random() < 0.3:  # nothing is above
        thresholds[:] = torch.inf
    droppable = random_droppable(rng, B, S)
    order, count = reference.select_by_threshold(scores, thresholds, droppable)
    for b in range(B):
        expected = select_by_threshold(scores[b], thresholds[b], droppable[b])
        assert torch.equal(order[b], expected[0])
        assert count[b] == expected[1]
        flags = droppable[b].numpy()
        chosen = (scores[b].numpy() > thresholds[b].numpy()).any(axis=0) & flags
        if flags.any() and not chosen.any():
            chosen[next(i for i in ranks(scores[b, 0].numpy()) if flags[i])] = True
        assert (order[b].tolist(), int(count[b])) == permutation(chosen | ~flags)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    columns=st.integers(1, 7),
    keep=st.tuples(st.integers(-1, 40), st.integers(0, 12)),
    dtype=st.sampled_from(sorted(DTYPES)),
    reach=st.integers(0, 5),
)
def test_soft_nms(reference, seed, columns, keep, dtype, reach):
    case = SoftNmsCase(B=2, columns=columns, keep=keep, dtype=dtype, reach=reach)
    inputs = case.inputs(seed)
    order, count = reference.select_by_soft_nms(**inputs, similarity_sigma=case.sigma)
    for b in range(case.B):
        kept, margin = soft_nms_in_float64(inputs, b, case.sigma)
        # Below it, rounding decides which of two scores is the higher, here and in torch.
        assume(margin > 1e-5)
        chosen = ~inputs["droppable"][b].numpy()
        chosen[kept] = True
        assert (order[b].tolist(), int(count[b])) == permutation(chosen)
        expected = select_by_soft_nms(
            inputs["scores"][b : b + 1],
            inputs["num_keep"][b],
            inputs["droppable"][b],
            inputs["features"][b].float(),
            inputs["places"][b],
            inputs["nearness"],
            similarity_sigma=case.sigma,
        )
        assert torch.equal(order[b], expected[0])
        assert count[b] == expected[1]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, S=st.integers(1, 40))
def test_soft_nms_of_rows_that_are_alike(reference, seed, S):
    """One direction, so that every product is exact: ties, NaN, infinities and signed zeros decide the order."""
    rng = np.random.default_rng(seed)
    inputs = {
        "scores": random_scores(rng, 1, S),
        "num_keep": torch.from_numpy(rng.integers(0, S + 2, 1)),
        "droppable": random_droppable(rng, 1, S),
        "features": torch.ones(1, S, 1),
        "places": torch.from_numpy(rng.integers(0, 5, (1, S, 2))),
        "nearness": torch.tensor([1.0, 0.5, 0.25, 0.0]),
    }
    order, count = reference.select_by_soft_nms(**inputs, similarity_sigma=0.5)
    single = {name: tensor[0] for name, tensor in inputs.items() if name not in ("scores", "nearness")}
    expected = select_by_soft_nms(
        scores=inputs["scores"], nearness=inputs["nearness"], **single, similarity_sigma=0.5
    )
    assert torch.equal(order[0], expected[0])
    assert count[0] == expected[1]


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    S=st.integers(1, 50),
    groups=st.integers(1, 3),
    keep=st.tuples(st.integers(-1, 12), st.integers(0, 12)),
    group_keep=st.tuples(*[st.integers(0, 8)] * 3),
)
def test_dpp(reference, seed, S, groups, keep, group_keep):
    case = DppCase(B=2, S=S, groups=groups, keep=keep, group_keep=group_keep)
    inputs = case.inputs(seed)
    order, count = reference.select_by_dpp(**inputs)
    for b in range(case.B):
        kept, margin = dpp_in_float64(inputs, b)
        # In steps; below it, rounding decides which of two gains is the higher, here and in torch.
        assume(margin > 1)
        chosen = ~inputs["droppable"][b].numpy()
        chosen[kept] = True
        assert (order[b].tolist(), int(count[b])) == permutation(chosen)
        expected = select_by_dpp(*(tensor[b] for tensor in inputs.values()))
        assert torch.equal(order[b], expected[0])
        assert count[b] == expected[1]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, S=st.integers(1, 40))
def test_dpp_of_copies(reference, seed, S):
    """Rows that are copies of a few: ties, gains of nothing and entries that are no numbers go by index."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, S)
    kernel = torch.from_numpy((kinds[:, None] == kinds).astype(np.float32))
    at = rng.integers(0, S)
    kernel[at, at] = float(rng.choice([np.nan, np.inf, 1.0]))
    groups = rng.integers(0, 2, S)
    inputs = (
        kernel,
        torch.tensor(int(rng.integers(-1, S + 2))),
        random_droppable(rng, S),
        torch.from_numpy(groups),
        torch.from_numpy(np.array([S, 3])[groups]),
    )
    order, count = reference.select_by_dpp(*(tensor[None] for tensor in inputs))
    expected = select_by_dpp(*inputs)
    assert torch.equal(order[0], expected[0])
    assert count[0] == expected[1]


def test_more_rows_than_the_kernels_take_are_refused(reference):
    scores, droppable = torch.zeros(1, 16385), torch.ones(1, 16385, dtype=torch.bool)
    with pytest.raises(KernelError, match="too large"):
        reference.select_top_k(scores, torch.tensor([1]), droppable)
    with pytest.raises(KernelError, match="too large"):
        reference.select_by_threshold(scores[None], scores[None], droppable)
    order, count = reference.select_top_k(
        scores[:, 1:].contiguous(), torch.tensor([1]), droppable[:, 1:].contiguous()
    )
    assert (order[0, 0], count[0]) == (0, 1)
