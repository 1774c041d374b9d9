"""Rows of similar length together, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int, sequences: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in groups of at most `budget` padded tokens (a single row may be longer), longest first.

    `sequences[i]` is how many sequences of `lengths[i]` tokens row i becomes; 1 when absent. Longest first, so
    that a batch that does not fit memory is met at the start. A pure function: equal lengths keep their order.
    """
    fans = sequences if sequences is not None else [1] * len(lengths)
    groups: list[list[int]] = []
    width = filled = 0
    for i in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        if groups and (filled + fans[i]) * width <= budget:
            groups[-1].append(i)
            filled += fans[i]
        else:
            groups.append([i])
            width, filled = lengths[i], fans[i]
    return groups
