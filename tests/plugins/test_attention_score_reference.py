import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, AttentionCase, attention_in_float64

from edgeprune.operators.attention_score import attention_score
from edgeprune.plugins.kernel_library import KernelError

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

# The torch reference sums in float32 and in another order; scores are averages of numbers up to 1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@st.composite
def cases(draw):
    Hkv, group, Q = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    return AttentionCase(
        B=draw(st.integers(1, 2)),
        H=Hkv * group,
        Hkv=Hkv,
        Q=Q,
        R=draw(st.integers(1, Q)),
        S=draw(st.integers(Q, 9)),
        D=draw(st.sampled_from([1, 3, 8, 16])),
        G=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        mode=draw(st.sampled_from(["probabilities", "logits"])),
        causal=draw(st.booleans()),
        per_batch=draw(st.booleans()),
        spread=draw(st.sampled_from([0.0, 1.0, 5.0])),
    )


@settings(max_examples=150, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_equals_torch_and_the_definition(reference, case, seed):
    inputs = case.inputs(seed)
    score = reference.attention_score(**inputs, **case.options())
    rows, query = inputs.pop("query_rows"), inputs.pop("query")
    expected = attention_score(
        query if rows is None else query.index_select(2, rows), **inputs, **case.options()
    )
    # Logits are no averages: their size is that of the products.
    size = max(1.0, expected.abs().max().item())
    np.testing.assert_allclose(score.numpy() / size, expected.numpy() / size, **TOLERANCE)
    exact = attention_in_float64(case, {**inputs, "query": query, "query_rows": rows})
    np.testing.assert_allclose(score.numpy() / size, exact / size, rtol=1e-6, atol=1e-7)


def test_a_row_that_sees_no_key_adds_nothing(reference):
    case = AttentionCase(R=2, Q=2, S=3)
    inputs = case.inputs(0)
    inputs["row_index"] = torch.tensor([-1, 1])
    score = reference.attention_score(**inputs, **case.options())
    assert score.sum().item() == pytest.approx(inputs["row_weight"][0, 1].item())


def test_no_rows_give_zeros(reference):
    case = AttentionCase(R=0, Q=0, S=3)
    score = reference.attention_score(**case.inputs(0), **case.options())
    assert score.tolist() == [[[0.0, 0.0, 0.0]]]


def test_nan_reaches_every_key_that_its_row_sees(reference):
    case = AttentionCase(H=1, Hkv=1, Q=2, R=2, S=4)
    inputs = case.inputs(0)
    inputs["query"][0, 0, 0, 0] = torch.nan
    score = reference.attention_score(**inputs, **case.options())[0, 0]
    assert score.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        AttentionCase(D=257),
        AttentionCase(H=4, Hkv=3),
        AttentionCase(Q=5, R=8),  # fewer rows than weights, and no list
    ],
)
def test_sizes_that_do_not_fit_are_refused(reference, wrong):
    inputs = dataclasses.replace(wrong, Q=8).inputs(0)
    inputs["query"] = inputs["query"][:, :, : wrong.Q].contiguous()
    with pytest.raises(KernelError, match="not valid"):
        reference.attention_score(**inputs, **wrong.options())
