"""What freed memory costs on a CPU: glibc's malloc as far as large blocks go, so that fragmentation can be forecast."""

from __future__ import annotations

import bisect

LARGEST_THRESHOLD = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bit
_FIRST_THRESHOLD = 128 * 2**10
_TOP_PAD = 128 * 2**10
_PAGE = 4096
_ALIGNMENT = 64  # PyTorch's
_SLOT = 112  # bytes posix_memalign asks for beyond a block, in which small objects settle beside it

Block = tuple[int, int]
"""Place and size of a block; place -1 is a mapping of its own."""


class Heap:
    """The memory a process keeps for blocks it allocates and frees, without allocating any.

    Blocks below a threshold, which grows as larger ones are freed, come from one heap, best fit first; a hole between
    two of them stays resident. Larger ones are mappings, and go back when freed (mallopt(3), malloc/malloc.c).

    Small objects (a tensor has some beside its storage) decide how much is lost: one that sits in the rest of a hole
    keeps the next block of the same size from fitting there. Here every block leaves one behind it, and each release
    frees the latest one, as the C library's small caches do. For the same reason the heap itself never shrinks.
    """

    def __init__(self) -> None:
        self._threshold = _FIRST_THRESHOLD
        self._holes: list[Block] = []  # (size, place), sorted
        self._size: dict[int, int] = {}  # place of a hole -> its size
        self._place: dict[int, int] = {}  # end of a hole -> its place
        self._small: list[int] = []  # places of small objects, the latest last
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
        wanted = size + _SLOT
        at = bisect.bisect_left(self._holes, (wanted, 0))
        if at < len(self._holes):
            found, place = self._holes[at]
            self._take(place)
            if found > wanted:
                self._leave(place + wanted, found - wanted)
        elif wanted >= self._threshold and self._reserved - self._used_up_to < wanted:
            mapped = -(-wanted // _PAGE) * _PAGE
            self._mapped += mapped
            return -1, mapped
        else:
            place = self._used_up_to
            self._used_up_to += wanted
            if self._used_up_to > self._reserved:
                self._reserved = self._used_up_to + _TOP_PAD
        self._small.append(place + size)
        return place, size

    def release(self, block: Block) -> None:
        """Frees a block that `allocate` returned."""
        place, size = block
        if self._small:
            self._free(self._small.pop(), _SLOT)
        if place >= 0:
            self._free(place, size)
            return
        self._mapped -= size
        if self._threshold < size <= LARGEST_THRESHOLD:
            self._threshold = size

    def _free(self, place: int, size: int) -> None:
        """Makes a hole, one with the holes beside it."""
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
