"""Seeded draws of the C++ library are NumPy's, and half precision is rounded as NumPy rounds it."""

import numpy as np

from edgeprune.runtimes.sampling import SamplingOptions, TokenSampler


def test_seeded_draws_are_numpys(cpp):
    rng = np.random.default_rng(1)
    requests, expected = [], []
    for seed in (0, 1, 2**31, 2**32, 2**40 + 7, 2**64 - 1):
        for temperature, top_k, top_p in (
            (1.0, 0, 1.0),
            (0.7, 5, 1.0),
            (2.0, 0, 0.8),
            (0.3, 40, 0.95),
            (0.0, 3, 0.5),
        ):
            logits = (rng.standard_normal((20, 433)) * 3).astype(np.float32)
            logits[5:] = np.round(logits[5:])  # many equal ones
            logits[10, ::3] = -np.inf
            settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
            finite = np.where(np.isfinite(logits), logits, -3e38)
            requests.append({**settings, "logits": finite.tolist()})
            sampler = TokenSampler(SamplingOptions(**settings))
            expected.append([sampler(row.astype(np.float32)) for row in finite])
    assert cpp.parts("sample", requests) == expected


def test_logits_that_overflowed_are_refused(cpp):
    request = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1, "logits": [[1e39, 0.0]]}
    (result,) = cpp.parts("sample", [request])
    assert "overflow of float16" in result["error"]


def test_half_precision_is_numpys(cpp):
    rng = np.random.default_rng(2)
    values = np.concatenate(
        [
            rng.standard_normal(2000).astype(np.float32)
            * np.float32(10.0) ** rng.integers(-9, 6, 2000).astype(np.float32),
            np.array(
                [0, -0.0, 65504, 65519, 65520, 1e30, 6.1e-5, 5.96e-8, 2.98e-8, 1e-9, 2049, 2051], np.float32
            ),
        ]
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16).tolist()
    assert cpp.parts("halves", [values.tolist()]) == [expected]
