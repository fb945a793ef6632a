import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.operators.token_gather import token_gather
from edgeprune.plugins.kernel_library import KernelError

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

GATHERED_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), S=st.integers(1, 9), K=st.integers(0, 12), count=st.integers(1, 8))
def test_equals_torch_and_numpy(reference, seed, S, K, count):
    rng = np.random.default_rng(seed)
    keep = torch.from_numpy(rng.integers(0, S, K))
    tensors, axes = [], []
    for _ in range(count):
        shape = rng.integers(1, 6, rng.integers(0, 4)).tolist()
        axis = int(rng.integers(0, len(shape) + 1))
        shape.insert(axis, S)
        dtype = GATHERED_DTYPES[rng.integers(len(GATHERED_DTYPES))]
        tensors.append(torch.from_numpy(rng.integers(-99, 99, shape)).to(dtype))
        axes.append(axis)
    gathered = reference.token_gather(keep, tensors, axes)
    for ours, theirs, tensor, axis in zip(
        gathered, token_gather(keep, tensors, axes), tensors, axes, strict=True
    ):
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, theirs)
        if tensor.dtype != torch.bfloat16:
            np.testing.assert_array_equal(ours.numpy(), np.take(tensor.numpy(), keep.numpy(), axis=axis))


def test_an_index_outside_gives_zeros(reference):
    (rows,) = reference.token_gather(torch.tensor([3, -1, 2]), [torch.arange(1, 4)], [0])
    assert rows.tolist() == [0, 0, 3]


def test_nine_tensors_are_refused(reference):
    with pytest.raises(KernelError, match="not valid"):
        reference.token_gather(torch.tensor([0]), [torch.zeros(1)] * 9, [0] * 9)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 8), st.integers(1, 5)),
    room=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_compaction_keeps_rows_and_touches_nothing_else(reference, seed, sizes, room):
    B, Hkv, P, D = sizes
    rng = np.random.default_rng(seed)
    keep = torch.from_numpy(np.flatnonzero(rng.random(P) < 0.5))
    keys, values = (
        torch.from_numpy(rng.standard_normal((B, Hkv, P + room[0], D), dtype=np.float32)) for _ in "kv"
    )
    capacity = len(keep) + room[1]
    kept_keys, kept_values = reference.compact_cache(keys, values, keep, cached_rows=P, capacity=capacity)
    for kept, source in ((kept_keys, keys), (kept_values, values)):
        assert torch.equal(kept[:, :, : len(keep)], source.index_select(2, keep))
        assert not kept[:, :, len(keep) :].any()


def test_compaction_into_too_small_a_cache_is_refused(reference):
    cache = torch.zeros(1, 1, 4, 2)
    with pytest.raises(KernelError, match="not valid"):
        reference.compact_cache(cache, cache, torch.tensor([0, 1]), cached_rows=4, capacity=1)
    with pytest.raises(KernelError, match="not valid"):
        reference.compact_cache(cache, cache, torch.tensor([0]), cached_rows=5, capacity=4)
