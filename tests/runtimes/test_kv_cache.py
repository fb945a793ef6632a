import itertools

import numpy as np
import pytest

from edgeprune import tensor_names as names
from edgeprune.runtimes.kv_cache import SegmentCache
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend

HEADS, WIDTH, CAPACITY = 2, 4, 9


@pytest.fixture
def backend():
    return OnnxRuntimeBackend()


def new_cache(backend, layers=(3, 4), dtype="float32"):
    return SegmentCache(
        backend, layers, num_kv_heads=HEADS, head_dim=WIDTH, capacity=CAPACITY, dtype=np.dtype(dtype)
    )


def memory(backend, tensor):
    """A writable array over the tensor's memory."""
    return backend.download(tensor)


def test_rows_written_as_present_are_read_as_past(backend):
    """A segment copies the past and appends; after any number of steps every row is the one it wrote."""
    cache = new_cache(backend)
    rng = np.random.default_rng(0)
    written = {}
    for num_new in (4, 1, 1, 3):
        past, present = cache.past(), cache.present(num_new)
        assert list(past) == [n for i in (3, 4) for n in (names.past_key(i), names.past_value(i))]
        assert list(present) == [n for i in (3, 4) for n in (names.present_key(i), names.present_value(i))]
        for old, new in zip(past, present, strict=True):
            before = memory(backend, past[old])
            assert before.shape == (1, HEADS, cache.length, WIDTH)
            assert np.array_equal(before, written.get(old, np.empty((1, HEADS, 0, WIDTH))))
            rows = rng.standard_normal((1, HEADS, num_new, WIDTH)).astype(np.float32)
            written[old] = np.concatenate((before, rows), axis=2)
            memory(backend, present[new])[...] = written[old]
        cache.advance(num_new)
    assert cache.length == CAPACITY
    for name, tensor in cache.past().items():
        assert np.array_equal(memory(backend, tensor), written[name])


def test_tensors_of_one_step_do_not_overlap(backend):
    cache = new_cache(backend)
    cache.advance(4)
    tensors = [*cache.past().values(), *cache.present(5).values()]
    spans = sorted((t.address, t.address + 4 * int(np.prod(t.shape))) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_capacity(backend):
    cache = new_cache(backend)
    cache.present(CAPACITY)
    with pytest.raises(ValueError, match="10 rows do not fit into a cache of 9"):
        cache.present(CAPACITY + 1)
    cache.advance(CAPACITY)
    with pytest.raises(ValueError, match="10 rows"):
        cache.present(1)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2)])
def test_memory(backend, dtype, size):
    # Two buffers, two layers, keys and values, each of whole blocks of 256 bytes.
    rows = HEADS * CAPACITY * WIDTH * size
    assert new_cache(backend, dtype=dtype).nbytes == 2 * 2 * 2 * (rows + -rows % 256)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_begin_at_multiples_of_256_bytes(backend, dtype):
    """TensorRT takes no others."""
    cache = new_cache(backend, layers=(0, 1, 2), dtype=dtype)
    addresses = [tensor.address for tensor in cache.past().values()]
    assert {address % 256 for address in addresses} == {addresses[0] % 256}


def test_segment_without_attention(backend):
    cache = new_cache(backend, layers=())
    assert (cache.past(), cache.present(3), cache.nbytes) == ({}, {}, 0)
    cache.advance(3)
    assert cache.length == 3
