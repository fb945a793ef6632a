"""Which part of a page-locked buffer the next upload may write, while copies out of it wait on a stream."""


class UploadStaging:
    """Hands out a buffer from its beginning to its end, and again from its beginning when all copies are done.

    Plain arithmetic: who owns the buffer puts the copies on the stream and waits for it. Not for several threads at
    once.
    """

    def __init__(self, size: int) -> None:
        """Begin with an empty buffer.

        Args:
            size: Bytes of the buffer.
        """
        self.size = size
        self._used = 0
        self._placed = 0

    def place(self, size: int) -> int | None:
        """The offset where so many bytes may be written, or None: there is no room before the stream was waited for."""
        if self._used + size > self.size:
            return None
        offset = self._used
        self._used += size
        self._placed += 1
        return offset

    def mark(self) -> int:
        """To be taken before a wait for the stream, when every copy that has a place is on it."""
        return self._placed

    def release(self, mark: int) -> None:
        """The stream was waited for: all is free again, unless something was placed since the mark."""
        if mark == self._placed:
            self._used = 0
