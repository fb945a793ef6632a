"""How device memory is divided: blocks that are used again, and one arena for the scratch memory of all engines.

Sizes are plain arithmetic; who allocates and frees is given, so nothing here needs a GPU.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from edgeprune.errors import BackendError
from edgeprune.runtimes.backend import ALIGNMENT

_MIB = 2**20
# Blocks of an octave: tensors of nearly equal size share blocks, at most an eighth of which is unused.
_STEPS = 8


def block_bytes(size: int) -> int:
    """The size of the block that serves ``size`` bytes: a multiple of ``ALIGNMENT``, at most an eighth larger."""
    step = max(ALIGNMENT, (1 << max(0, size - 1).bit_length()) // (2 * _STEPS))
    return max(step, -(-size // step) * step)


def arena_bytes(scratch: Iterable[int]) -> int:
    """What engines that run one after the other share: the most that one of them needs."""
    return block_bytes(max(scratch, default=0))


class MemoryBlock:
    """Memory of the device; it goes back to its pool when nothing refers to it any more.

    Attributes:
        address: Of the first byte, a multiple of ``ALIGNMENT``.
        size: Bytes.
    """

    __slots__ = ("__weakref__", "_pool", "address", "size")

    def __init__(self, address: int, size: int, pool: "MemoryPool") -> None:
        self.address = address
        self.size = size
        # A pool that goes frees what it holds, so it must outlive its blocks.
        self._pool = pool


class MemoryPool:
    """Blocks of device memory that are used again in the order of a stream.

    A chain needs the same sizes at every token, so after the first tokens nothing is allocated any more.

    Args:
        malloc: Gives the address of so many bytes, or None where there are none.
        free: Frees an address, when nothing on the device uses it any more.
    """

    def __init__(self, malloc: Callable[[int], int | None], free: Callable[[int], Any]) -> None:
        self._malloc = malloc
        self._free = free
        self._unused: dict[int, deque[int]] = {}
        self._growing = threading.Lock()
        weakref.finalize(self, _free_all, self._unused, self._free)

    def allocate(self, size: int) -> MemoryBlock:
        """A block of at least ``size`` bytes, at least one of them.

        Raises:
            BackendError: The device has no memory left.
        """
        size = block_bytes(size)
        unused = self._unused.setdefault(size, deque())
        try:
            address = unused.pop()
        except IndexError:
            address = self._grow(size)
        block = MemoryBlock(address, size, self)
        # The callback may come in any thread, even while this one allocates: it takes no lock.
        weakref.finalize(block, unused.append, address).atexit = False
        return block

    def _grow(self, size: int) -> int:
        with self._growing:
            address = self._malloc(size)
            if address is None:
                # What is unused in other sizes may be enough.
                _free_all(self._unused, self._free)
                address = self._malloc(size)
        if address is None:
            raise BackendError(
                f"the GPU has no {max(1, size // _MIB)} MiB left: close other programs that use it, ask for fewer new "
                "tokens or smaller pictures, or build the bundle with a lower --max-sequence"
            )
        return address


def _free_all(unused: dict[int, deque[int]], free: Callable[[int], Any]) -> None:
    for addresses in list(unused.values()):
        while addresses:
            free(addresses.pop())


class Arena:
    """Scratch memory that all execution contexts of a stream share.

    Args:
        pool: Where it comes from.
    """

    def __init__(self, pool: MemoryPool) -> None:
        self._pool = pool
        self._needed = arena_bytes(())
        self._block: MemoryBlock | None = None

    def reserve(self, size: int) -> None:
        """Another engine needs ``size`` bytes while it runs."""
        self._needed = arena_bytes((self._needed, size))

    def block(self) -> MemoryBlock:
        """The memory; another one where an engine came that needs more."""
        if self._block is None or self._block.size < self._needed:
            self._block = None
            self._block = self._pool.allocate(self._needed)
        return self._block
