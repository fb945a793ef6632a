"""Device memory: blocks are used again and never twice at a time."""

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import BackendError
from edgeprune.runtimes.device_arena import Arena, MemoryPool, arena_bytes, block_bytes


class Heap:
    """Gives addresses one behind the other, up to a capacity."""

    def __init__(self, capacity: int = 1 << 40) -> None:
        self.capacity, self.next = capacity, 1 << 20
        self.sizes: dict[int, int] = {}

    def malloc(self, size: int) -> int | None:
        if sum(self.sizes.values()) + size > self.capacity:
            return None
        address, self.next = self.next, self.next + size
        self.sizes[address] = size
        return address

    def free(self, address: int) -> None:
        del self.sizes[address]


def new_pool(heap: Heap) -> MemoryPool:
    return MemoryPool(heap.malloc, heap.free)


@given(st.integers(0, 1 << 40))
def test_a_block_is_aligned_and_hardly_larger(size):
    block = block_bytes(size)
    assert block % 256 == 0
    assert size <= block <= max(256, size + max(256, size // 8))
    assert block_bytes(block) == block


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_larger_size_has_no_smaller_block(one, other):
    assert (block_bytes(one) <= block_bytes(other)) or one > other


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000)), max_size=60))
def test_blocks_in_use_do_not_overlap(steps):
    heap = Heap()
    pool = new_pool(heap)
    held = []
    for give_back, size in steps:
        if give_back and held:
            held.pop(size % len(held))
        else:
            held.append(pool.allocate(size))
            assert held[-1].size >= max(1, size)
        spans = sorted((block.address, block.address + block.size) for block in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_the_same_sizes_again_allocate_nothing():
    heap = Heap()
    pool = new_pool(heap)
    for _ in range(5):
        held = [pool.allocate(size) for size in (10, 300, 300, 70_000)]
        addresses = [block.address for block in held]
        del held
    assert sorted(heap.sizes) == sorted(addresses)


def test_what_is_unused_makes_room():
    heap = Heap(capacity=10_240)
    pool = new_pool(heap)
    first = pool.allocate(6144)
    with pytest.raises(BackendError, match="the GPU has no 1 MiB left: close other programs"):
        pool.allocate(8192)
    del first
    assert pool.allocate(8192).size == 8192


def test_a_pool_outlives_its_blocks_and_then_frees_all():
    heap = Heap()
    pool = new_pool(heap)
    block = pool.allocate(1000)
    del pool
    gc.collect()
    assert heap.sizes
    del block
    gc.collect()
    assert not heap.sizes


def test_the_arena_is_the_largest_need_and_moves_only_when_it_grows():
    assert arena_bytes([]) == 256
    assert arena_bytes([10, 5000, 300]) == block_bytes(5000)
    heap = Heap()
    arena = Arena(new_pool(heap))
    arena.reserve(5000)
    arena.reserve(400)
    first = arena.block()
    assert first.size >= 5000
    arena.reserve(4000)
    assert arena.block() is first
    arena.reserve(9000)
    second = arena.block()
    assert second is not first
    assert second.size >= 9000
