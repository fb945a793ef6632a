"""What the kernels must do, whoever executes them: the emulator on the host, or a GPU.

Indices equal the reference's; scores differ by rounding only. Run twice, every result has the same bits.
"""

import numpy as np
import torch
from kernel_inputs import (
    DTYPES,
    AttentionCase,
    DppCase,
    SoftNmsCase,
    dpp_in_float64,
    random_droppable,
    random_scores,
    soft_nms_in_float64,
)
from torch import Tensor

from edgeprune.plugins.kernel_library import KernelLibrary

# Of a score, and of the largest score. Tensor cores cut off what is below the last bit of a sum, so that a logit of
# size 100 may be off by 1e-4, which is then the relative error of its probability; without sharp logits it is a few
# 1e-6. A wrong mask, tile or weight is off by the size of a score.
RELATIVE, OF_LARGEST = 5e-4, 1e-5

ATTENTION_CASES = {
    # Few rows: one vector per key head, several, numbers read one by one, more keys than one run of 64.
    "last row": AttentionCase(B=2, H=4, Hkv=4, Q=1, R=1, S=150, D=64),
    "last row of all, listed": AttentionCase(H=4, Hkv=4, Q=9, R=1, S=70, D=32),
    "few rows, grouped heads": AttentionCase(B=2, H=6, Hkv=2, Q=30, R=2, S=130, D=80, G=3, per_batch=True),
    "few rows, not causal": AttentionCase(H=4, Hkv=2, Q=3, R=3, S=67, D=16, causal=False),
    "few rows, odd width": AttentionCase(H=6, Hkv=2, Q=2, R=2, S=65, D=11, G=2),
    "one key": AttentionCase(H=2, Hkv=1, Q=1, R=1, S=1, D=8),
    # Tiles: ragged in rows, keys and width, several tiles of each, masks that hide whole tiles.
    "all rows": AttentionCase(H=2, Hkv=2, Q=140, R=140, S=140, D=64),
    "all rows behind a cache": AttentionCase(H=1, Hkv=1, Q=70, R=70, S=200, D=24, G=2),
    "text rows, grouped heads": AttentionCase(B=2, H=4, Hkv=2, Q=150, R=60, S=170, D=40, G=1),
    "many weightings": AttentionCase(B=2, H=2, Hkv=1, Q=20, R=20, S=70, D=16, G=6, per_batch=True),
    "not causal": AttentionCase(H=2, Hkv=2, Q=65, R=65, S=129, D=128, causal=False),
    "widest heads": AttentionCase(H=1, Hkv=1, Q=40, R=40, S=70, D=256),
    "wide and odd": AttentionCase(H=1, Hkv=1, Q=33, R=33, S=33, D=133),
    "narrow and odd": AttentionCase(H=1, Hkv=1, Q=33, R=33, S=70, D=7),
    "sharp": AttentionCase(H=2, Hkv=2, Q=40, R=40, S=70, D=64, spread=4.0),
    # Blocks that go through several tiles: sizes beyond the number of splits, with one and with two stages.
    "many keys": AttentionCase(H=1, Hkv=1, Q=20, R=20, S=1600, D=16),
    "many rows": AttentionCase(H=8, Hkv=1, Q=320, R=320, S=330, D=16),
    "many keys, widest heads": AttentionCase(H=1, Hkv=1, Q=10, R=10, S=600, D=256),
    "many rows, widest heads": AttentionCase(H=8, Hkv=1, Q=280, R=280, S=40, D=256, causal=False),
    # Logits: rows are summed up first.
    "logits": AttentionCase(B=2, H=4, Hkv=2, Q=100, R=100, S=130, D=80, G=9, mode="logits"),
    "logits, one weighting": AttentionCase(
        B=2, H=4, Hkv=2, Q=100, R=40, S=65, D=256, mode="logits", per_batch=True
    ),
    "logits, odd width": AttentionCase(H=2, Hkv=2, Q=70, R=70, S=30, D=5, mode="logits"),
    "no rows": AttentionCase(H=2, Hkv=2, Q=0, R=0, S=30, D=8),
}

SOFT_NMS_CASES = {
    "two sequences": SoftNmsCase(B=2, keep=(9, 30)),
    "none and all": SoftNmsCase(B=2, rows=3, keep=(0, 99)),
    "more neighbours than a list holds": SoftNmsCase(rows=1, columns=140, reach=140, keep=(4,), F=6),
    "nothing in reach": SoftNmsCase(reach=0, keep=(5,)),
    "odd width": SoftNmsCase(F=37, keep=(7,)),
}

# Choices up to the number of features, whose leads are clear; ties come from kernels that are exact.
DPP_CASES = {
    "two sequences of two groups": DppCase(B=2, keep=(9, 14)),
    "one group": DppCase(groups=1, keep=(8,), group_keep=(40,)),
    "groups that are full": DppCase(S=60, groups=3, keep=(50,), group_keep=(2, 0, 5)),
    "none and all": DppCase(B=2, S=5, F=16, groups=1, keep=(-1, 99), group_keep=(9,)),
    "more rows than threads": DppCase(S=1100, F=24, keep=(16,), group_keep=(5, 20)),
}


def check_attention(library: KernelLibrary, reference: KernelLibrary, case: AttentionCase, seed: int) -> None:
    inputs = case.inputs(seed)
    moved = {name: None if tensor is None else tensor.to(library.device) for name, tensor in inputs.items()}
    first, second = (library.attention_score(**moved, **case.options()) for _ in range(2))
    assert torch.equal(first, second)
    assert_close(first, reference.attention_score(**inputs, **case.options()))


def assert_close(score: Tensor, expected: Tensor) -> None:
    largest = expected.abs().max().item()
    np.testing.assert_allclose(
        score.cpu().numpy(), expected.cpu().numpy(), rtol=RELATIVE, atol=OF_LARGEST * largest
    )


def check_top_k(library: KernelLibrary, reference: KernelLibrary, B: int, S: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, droppable = random_scores(rng, B, S), random_droppable(rng, B, S)
    num_keep = torch.from_numpy(rng.choice([-1, 0, S // 3, S, S + 1, rng.integers(0, S + 1)], size=B))
    _same(library, reference, "select_top_k", scores, num_keep, droppable)


def check_threshold(
    library: KernelLibrary, reference: KernelLibrary, B: int, P: int, S: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores, thresholds = random_scores(rng, B, P, S), random_scores(rng, B, P, S)
    if seed % 3 == 0:  # nothing is above: one row survives
        thresholds[:] = torch.inf
    _same(library, reference, "select_by_threshold", scores, thresholds, random_droppable(rng, B, S))


def check_soft_nms(library: KernelLibrary, reference: KernelLibrary, case: SoftNmsCase, seed: int) -> None:
    inputs = case.inputs(seed)
    # Where a lead is smaller, rounding decides, and the test says nothing: choose another seed.
    assert min(soft_nms_in_float64(inputs, b, case.sigma)[1] for b in range(case.B)) > 1e-5
    _same(library, reference, "select_by_soft_nms", **inputs, similarity_sigma=case.sigma)


def check_dpp(library: KernelLibrary, reference: KernelLibrary, case: DppCase, seed: int) -> None:
    inputs = case.inputs(seed)
    # In steps; where a lead is smaller, rounding decides, and the test says nothing: choose another seed.
    assert min(dpp_in_float64(inputs, b)[1] for b in range(case.B)) > 1
    _same(library, reference, "select_by_dpp", **inputs)


def check_dpp_of_ties(library: KernelLibrary, reference: KernelLibrary, S: int, seed: int) -> None:
    """Rows that are copies of a few, and entries that are no numbers: everything is exact but the pivots."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 4, S)
    kernel = torch.from_numpy((kinds[:, None] == kinds).astype(np.float32)) * rng.choice([0.25, 1.0])
    for value in (torch.nan, torch.inf, -torch.inf):
        i, j = rng.integers(0, S, 2)
        kernel[i, j] = kernel[j, i] = value
    groups = rng.integers(0, 3, (1, S))
    _same(
        library,
        reference,
        "select_by_dpp",
        kernel[None],
        torch.from_numpy(rng.integers(0, S + 2, 1)),
        random_droppable(rng, 1, S),
        torch.from_numpy(groups),
        torch.from_numpy(np.array([S, 2, S // 2])[groups]),
    )


def check_gather(library: KernelLibrary, reference: KernelLibrary, S: int, K: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keep = torch.from_numpy(rng.integers(0, S, K))
    keep[K // 2 :][:1] = S  # one index outside
    shapes = [((1, S, 64), 1), ((S,), 0), ((2, 3, S, 8), 2), ((1, S, 7), 1), ((3, S), 1), ((S, 1, 5), 0)]
    dtypes = [torch.float16, torch.int64, torch.bfloat16, torch.float32, torch.bool, torch.float16]
    tensors = [
        torch.from_numpy(rng.integers(-99, 99, shape)).to(dtype)
        for (shape, _), dtype in zip(shapes, dtypes, strict=True)
    ]
    axes = [axis for _, axis in shapes]
    ours = library.token_gather(
        keep.to(library.device), [tensor.to(library.device) for tensor in tensors], axes
    )
    for gathered, expected in zip(ours, reference.token_gather(keep, tensors, axes), strict=True):
        assert torch.equal(gathered.cpu(), expected)


def check_compaction(library: KernelLibrary, reference: KernelLibrary, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, Hkv, P, D, room = 2, 3, 70, 24, 5
    keep = torch.from_numpy(np.flatnonzero(rng.random(P) < 0.6))
    keys, values = (
        torch.from_numpy(rng.standard_normal((B, Hkv, P + room, D))).to(DTYPES[dtype]) for _ in "kv"
    )
    sizes = {"cached_rows": P, "capacity": len(keep) + 3}
    expected = reference.compact_cache(keys, values, keep, **sizes)
    moved = (tensor.to(library.device) for tensor in (keys, values, keep))
    for ours, theirs in zip(library.compact_cache(*moved, **sizes), expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def _same(
    library: KernelLibrary, reference: KernelLibrary, function: str, *tensors: Tensor, **more: object
) -> None:
    """Both choose the same rows; the library does so twice."""
    expected = getattr(reference, function)(*tensors, **more)
    on_device = [tensor.to(library.device) for tensor in tensors]
    options = {
        name: value.to(library.device) if isinstance(value, Tensor) else value for name, value in more.items()
    }
    for _ in range(2):
        for ours, theirs in zip(getattr(library, function)(*on_device, **options), expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)
