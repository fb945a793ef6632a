"""Tokens are drawn from transformers' filtered distribution; stop texts are cut wherever the pieces break."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from edgeprune.errors import BackendError, PromptError
from edgeprune.runtimes.sampling import SamplingOptions, StopMatcher, TokenSampler


def their_probabilities(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    scores = TemperatureLogitsWarper(float(options.temperature))(
        None, torch.from_numpy(logits)[None].double()
    )
    if options.top_k:
        scores = TopKLogitsWarper(options.top_k)(None, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(None, scores)
    return scores[0].softmax(-1).numpy()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 60),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.floats(0.05, 4.0),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0),
)
def test_filtered_distribution_is_that_of_transformers(seed, size, spread, temperature, top_k, top_p):
    logits = (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = TokenSampler(options).probabilities(logits)
    np.testing.assert_allclose(ours, their_probabilities(logits, options), rtol=1e-9, atol=1e-12)


def test_top_k_keeps_ties_as_transformers_does():
    logits = np.array([1.0, 2.0, 1.0, 0.0, 1.0])
    options = SamplingOptions(temperature=1.0, top_k=2)
    ours = TokenSampler(options).probabilities(logits)
    assert np.flatnonzero(ours).tolist() == [0, 1, 2, 4]
    np.testing.assert_allclose(ours, their_probabilities(logits, options))


def test_top_p_keeps_the_lowest_of_tied_ids():
    ours = TokenSampler(SamplingOptions(temperature=1.0, top_p=0.5)).probabilities(np.zeros(8))
    assert np.flatnonzero(ours).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_greedy_takes_the_lowest_of_tied_ids(dtype):
    logits = np.array([0.0, 3.0, -np.inf, 3.0], dtype)
    sampler = TokenSampler(SamplingOptions())
    assert sampler(logits) == 1
    assert sampler.probabilities(logits).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_distribution():
    sampler = TokenSampler(SamplingOptions(temperature=0.7, top_k=5, seed=1))
    logits = np.random.default_rng(0).normal(size=12)
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=12)
    expected = sampler.probabilities(logits)
    assert np.all(counts[expected == 0] == 0)
    np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.015)


def test_seed_repeats_the_draws():
    logits = np.random.default_rng(0).normal(size=100)

    def draws(seed: int | None) -> list[int]:
        sampler = TokenSampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler(logits) for _ in range(30)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_extreme_draws_hit_possible_tokens(draw):
    sampler = TokenSampler(SamplingOptions(temperature=1.0))

    class Generator:
        def random(self) -> float:
            return draw

    sampler._generator = Generator()
    for logits in ([-np.inf, 0.0, 0.3, -np.inf], [-np.inf, 5.0, -80.0, -np.inf], [-np.inf, 5.0, -1e9, -1e9]):
        token_id = sampler(np.array(logits))
        assert sampler.probabilities(np.array(logits))[token_id] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_overflowed_logits(temperature, bad):
    sampler = TokenSampler(SamplingOptions(temperature=temperature))
    logits = np.array([0.0, bad, 1.0], np.float16)
    with pytest.raises(BackendError, match="float16"):
        sampler(logits)
    with pytest.raises(BackendError, match="float16"):
        sampler.probabilities(logits)


def test_logits_without_a_possible_token():
    with pytest.raises(BackendError, match="-inf"):
        TokenSampler(SamplingOptions())(np.full(4, -np.inf))


@pytest.mark.parametrize("shape", [(2, 4), (0,), ()])
def test_logits_of_another_shape(shape):
    with pytest.raises(BackendError, match="last row"):
        TokenSampler(SamplingOptions())(np.zeros(shape))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": "USER:"}, "stop"),
        ({"stop": ("a", "")}, "stop"),
        ({"stop": (1,)}, "stop"),
    ],
)
def test_invalid_options(options, named):
    with pytest.raises(PromptError, match=f"{named} must be"):
        SamplingOptions(**options)


def test_stop_texts_become_a_tuple():
    assert SamplingOptions(stop=["a", "b"]) == SamplingOptions(stop=("a", "b"))


def matched(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stop), ""
    for piece in pieces:
        text, finished = matcher.push(piece)
        shown += text
        if finished:
            return shown, True
    return shown + matcher.finish(), False


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab:", max_size=20),
    stop=st.lists(st.text("ab:", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 20), max_size=10),
)
def test_any_pieces_show_the_text_before_the_first_stop(text, stop, cuts):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    # The stop text whose last character comes first ends the answer, wherever the pieces break.
    expected, finished = text, False
    for end in range(1, len(text) + 1):
        if met := [each for each in stop if text[:end].endswith(each)]:
            expected, finished = text[: end - max(map(len, met))], True
            break
    assert matched(stop, pieces) == (expected, finished)


def test_only_what_could_become_a_stop_text_is_withheld():
    matcher = StopMatcher(("\nUSER:", "###"))
    assert matcher.push("a cat\n") == ("a cat", False)
    assert matcher.push("US") == ("", False)
    assert matcher.push("A #") == ("\nUSA ", False)
    assert matcher.push("#") == ("", False)
    assert matcher.push("!") == ("##!", False)
    assert matcher.push("\nUSER: x") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.finish() == ""


def test_without_stop_texts_nothing_is_withheld():
    matcher = StopMatcher(())
    assert matcher.push("a") == ("a", False)
    assert matcher.finish() == ""
