"""Which rows go where: seeded, stratified, whole groups. A pure function of seed, labels and order."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shuffled(items: Iterable[int], seed: int, purpose: str) -> list[int]:
    """The numbers in an order that depends on nothing but themselves, the seed and the purpose.

    Ordered by a hash, not by a random generator: the same on every version and platform, and no state is touched.
    """

    def place(item: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{purpose}:{item}".encode(), digest_size=8).digest()

    return sorted(items, key=place)


def draw(
    labels: Sequence[Hashable],
    size: int,
    seed: int,
    purpose: str,
    *,
    leave_one: bool = False,
    together: Sequence[Hashable] | None = None,
) -> list[int]:
    """Indices of `size` rows, sorted, each label's share within one row of its share in `labels`.

    With `leave_one` no label is taken whole, so that none is known only outside training; then it may be fewer rows.
    Rows of one value in `together` are drawn together or not at all, which may be a few rows more or fewer.
    """
    total = len(labels)
    if size >= total and not leave_one:
        return list(range(total))
    sets: dict[Hashable, list[int]] = defaultdict(list)
    for index, name in enumerate(range(total) if together is None else together):
        sets[name].append(index)
    by_label: dict[Hashable, dict[int, list[int]]] = defaultdict(dict)
    for indices in sets.values():
        by_label[labels[indices[0]]][indices[0]] = indices
    counts = {label: sum(map(len, inside.values())) for label, inside in by_label.items()}
    exact = {label: size * count / total for label, count in counts.items()}
    most = {label: count - leave_one for label, count in counts.items()}
    quota = {label: min(int(share), most[label]) for label, share in exact.items()}
    short = size - sum(quota.values())
    # the largest remainders get the rows left over; a hash decides between equal ones, not the order in the file
    tie = {label: place for place, label in enumerate(_mixed(list(by_label), seed, purpose))}
    for label in sorted(exact, key=lambda name: (-(exact[name] % 1), tie[name])):
        if short > 0 and quota[label] < most[label] and exact[label] % 1:
            quota[label] += 1
            short -= 1
    taken: list[int] = []
    for label, inside in by_label.items():
        held = 0
        for first in shuffled(inside, seed, purpose):
            count = len(inside[first])
            if count <= 2 * (quota[label] - held) and held + count <= most[label]:  # nearer to the quota with it
                taken += inside[first]
                held += count
    return sorted(taken)


def draw_per_label(labels: Sequence[Hashable], size: int, seed: int, purpose: str) -> list[int]:
    """Indices of `size` rows of each label (k-shot), sorted; all rows of a label that has fewer."""
    by_label: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_label[label].append(index)
    return sorted(i for indices in by_label.values() for i in shuffled(indices, seed, purpose)[:size])


def draw_groups(
    labels: Sequence[Hashable], groups: Sequence[Hashable], size: int, seed: int, purpose: str
) -> list[int]:
    """Indices of whole groups, sorted: about `size` rows, with the labels about as in all rows.

    Groups are met in a seeded order, and one is taken when it brings the counts by label nearer to what is wanted.
    At least one group is taken and at least one left; an empty list when there are fewer than two.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(members) < 2:
        return []
    counts = {group: Counter(labels[i] for i in indices) for group, indices in members.items()}
    wanted = {label: size * count / len(labels) for label, count in Counter(labels).items()}
    held: Counter[Hashable] = Counter()
    order = _mixed(list(members), seed, purpose)

    def gain(group: Hashable) -> float:
        """By how much the squared distance to the wanted counts falls."""
        return sum(c * (2 * (wanted[label] - held[label]) - c) for label, c in counts[group].items())

    taken: list[Hashable] = []
    for group in order:
        if gain(group) > 0 and len(taken) < len(order) - 1:
            taken.append(group)
            held.update(counts[group])
    if not taken:
        taken.append(max(order, key=gain))
    return sorted(index for group in taken for index in members[group])


def _mixed(names: list[T], seed: int, purpose: str) -> list[T]:
    return [names[i] for i in shuffled(range(len(names)), seed, purpose)]
