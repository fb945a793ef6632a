import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import PruningError
from edgeprune.operators.attention_score import attention_score


def brute_force(query, key, row_index, row_weight, scale, mode, causal):
    """The definition, one number at a time in float64."""
    B, H, R, D = query.shape
    Hkv, S = key.shape[1:3]
    score = np.zeros((B, row_weight.shape[-2], S))
    for b in range(B):
        for h in range(H):
            for r in range(R):
                keys = key[b, h // (H // Hkv)]
                logits = [scale * sum(query[b, h, r, d] * keys[j, d] for d in range(D)) for j in range(S)]
                if mode == "logits":
                    row = logits
                else:
                    seen = [not causal or j <= row_index[r] for j in range(S)]
                    highest = max(logit for logit, visible in zip(logits, seen, strict=True) if visible)
                    exps = [
                        math.exp(logit - highest) if visible else 0.0
                        for logit, visible in zip(logits, seen, strict=True)
                    ]
                    row = [e / sum(exps) for e in exps]
                for g in range(score.shape[1]):
                    weight = row_weight[b, g, r] if row_weight.ndim == 3 else row_weight[g, r]
                    for j in range(S):
                        score[b, g, j] += weight * row[j] / H
    return score


@st.composite
def attention_inputs(draw):
    B, Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    S, D, G = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    R = draw(st.integers(1, S))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = np.sort(rng.choice(S, size=R, replace=False))
    return (
        torch.tensor(rng.standard_normal((B, Hkv * group, R, D)), dtype=torch.float32),
        torch.tensor(rng.standard_normal((B, Hkv, S, D)), dtype=torch.float32),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(rng.random((B, G, R) if draw(st.booleans()) else (G, R)), dtype=torch.float32),
    )


@pytest.mark.parametrize("mode", ["probabilities", "logits"])
@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=30, deadline=None)
@given(inputs=attention_inputs())
def test_equals_the_definition(inputs, mode, causal):
    score = attention_score(*inputs, scale=0.7, mode=mode, causal=causal)
    expected = brute_force(*(tensor.double().numpy() for tensor in inputs), 0.7, mode, causal)
    assert score.dtype == torch.float32
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["probabilities", "logits"])
def test_half_types_are_computed_in_float32(dtype, mode):
    generator = torch.Generator().manual_seed(0)
    query = (torch.randn(1, 4, 3, 8, generator=generator) * 8).to(dtype)
    key = (torch.randn(1, 2, 9, 8, generator=generator) * 8).to(dtype)
    rows, weight = torch.tensor([2, 5, 8]), torch.rand(2, 3, generator=generator)
    score = attention_score(query, key, rows, weight, scale=0.3, mode=mode)
    widened = attention_score(query.float(), key.float(), rows, weight, scale=0.3, mode=mode)
    assert score.dtype == torch.float32
    assert torch.equal(score, widened)


def test_one_row_of_one_token_gets_all_the_attention():
    ones = torch.ones(1, 1, 1, 2)
    score = attention_score(ones, ones, torch.tensor([0]), torch.tensor([[2.0]]), scale=1.0)
    assert score.tolist() == [[[2.0]]]


def test_keys_behind_a_row_get_nothing():
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4)
    score = attention_score(query, key, torch.tensor([2]), torch.ones(1, 1), scale=1.0)
    assert score[0, 0, 3:].tolist() == [0.0, 0.0]
    assert score.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 2, 4), (1, 2, 5, 4), (2,), (1, 2)), "multiple of the number of key heads"),
        (((1, 2, 2, 4), (1, 2, 5, 3), (2,), (1, 2)), "head size"),
        (((1, 2, 2, 4), (1, 2, 5, 4), (3,), (1, 2)), "one index and one weight per row"),
        (((1, 2, 2, 4), (1, 2, 5, 4), (2,), (2,)), "row_weight"),
        (((1, 2, 2, 4), (1, 2, 5, 4), (2,), (3, 1, 2)), "1 batch entries"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    query, key, rows, weight = shapes
    with pytest.raises(PruningError, match=message):
        attention_score(
            torch.zeros(query),
            torch.zeros(key),
            torch.zeros(rows, dtype=torch.int64),
            torch.zeros(weight),
            scale=1.0,
        )


def test_an_unknown_mode_is_an_error():
    query = torch.zeros(1, 1, 1, 1)
    with pytest.raises(PruningError, match="unknown mode 'max'"):
        attention_score(query, query, torch.tensor([0]), torch.ones(1, 1), scale=1.0, mode="max")


def test_the_custom_operator_is_well_formed():
    arguments = (torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.tensor([4, 5, 6]), torch.rand(2, 3))
    torch.library.opcheck(
        torch.ops.edgeprune.attention_score.default,
        (*arguments, 0.5, "probabilities", True),
        test_utils=("test_schema", "test_faketensor"),
    )
