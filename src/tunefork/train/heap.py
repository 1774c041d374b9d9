"""What freed memory costs on a CPU: glibc's malloc as far as large blocks go, so that fragmentation can be forecast."""

from __future__ import annotations

import bisect

_LARGEST_THRESHOLD = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bit
_FIRST_THRESHOLD = 128 * 2**10
_TOP_PAD = 128 * 2**10
_PAGE = 4096
_ALIGNMENT = 64  # PyTorch's
_SEARCH = 112  # bytes posix_memalign asks for beyond a block: a block does not fit the hole its like has left

Block = tuple[int, int]
"""Place and size of a block; place -1 is a mapping of its own."""


class Heap:
    """The memory a process keeps for blocks it allocates and frees, without allocating any.

    Blocks below a threshold, which grows as larger ones are freed, come from one heap, best fit first; a hole between
    two of them stays resident. Larger ones are mappings, and go back when freed (mallopt(3), malloc/malloc.c). The heap
    itself is taken not to shrink: in practice some small object sits near its top. Such objects are otherwise left out.
    """

    def __init__(self) -> None:
        self._threshold = _FIRST_THRESHOLD
        self._holes: list[Block] = []  # (size, place), sorted
        self._size: dict[int, int] = {}  # place of a hole -> its size
        self._place: dict[int, int] = {}  # end of a hole -> its place
        self._used_up_to = 0
        self._reserved = 0
        self._mapped = 0

    @property
    def resident(self) -> int:
        """Bytes the process holds."""
        return self._reserved + self._mapped

    def allocate(self, size: int) -> Block:
        """A block of `size` bytes."""
        size = -(-(size + 8) // _ALIGNMENT) * _ALIGNMENT
        wanted = size + _SEARCH
        at = bisect.bisect_left(self._holes, (wanted, 0))
        if at < len(self._holes):
            found, place = self._holes[at]
            self._take(place)
            self._leave(place + size, found - size)
            return place, size
        if wanted >= self._threshold and self._reserved - self._used_up_to < wanted:
            mapped = -(-wanted // _PAGE) * _PAGE
            self._mapped += mapped
            return -1, mapped
        place = self._used_up_to
        self._used_up_to += size
        if self._used_up_to > self._reserved:
            self._reserved = self._used_up_to + _TOP_PAD
        return place, size

    def release(self, block: Block) -> None:
        """Frees a block that `allocate` returned."""
        place, size = block
        if place < 0:
            self._mapped -= size
            if self._threshold < size <= _LARGEST_THRESHOLD:
                self._threshold = size
            return
        if place + size in self._size:
            size += self._take(place + size)
        if place in self._place:
            before = self._place[place]
            size, place = size + self._take(before), before
        if place + size < self._used_up_to:
            self._leave(place, size)
        else:
            self._used_up_to = place

    def _take(self, place: int) -> int:
        """Removes a hole; returns its size."""
        size = self._size.pop(place)
        del self._place[place + size]
        del self._holes[bisect.bisect_left(self._holes, (size, place))]
        return size

    def _leave(self, place: int, size: int) -> None:
        self._size[place] = size
        self._place[place + size] = place
        bisect.insort(self._holes, (size, place))
