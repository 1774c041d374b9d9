"""Kinds of direction: how a random change of the parameters looks, is applied in a probe, and is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tunefork.zo.directions.base import Directions, Term
from tunefork.zo.directions.dense import Dense
from tunefork.zo.directions.low_rank import LowRank, release
from tunefork.zo.sites import Site

__all__ = ["DIRECTIONS", "Dense", "Directions", "LowRank", "Term", "build", "release"]


def build(
    sites: Sequence[Site], direction: str, *, rank: int, max_rank: int, queries: int, seed: int
) -> list[Directions]:
    """The parts that together move `sites`: one for the matrices of each device, one for all that is dense."""
    with torch.inference_mode(False):  # what is made inside could not be written outside
        return DIRECTIONS[direction](sites, rank, max_rank, queries, seed)


def _low_rank(sites: Sequence[Site], rank: int, max_rank: int, queries: int, seed: int) -> list[Directions]:
    devices: dict[torch.device, list[Site]] = {}
    for site in sites:
        if site.is_matrix:
            devices.setdefault(site.parameter.device, []).append(site)
    parts: list[Directions] = [
        LowRank(found, rank=rank, max_rank=max_rank, queries=queries, seed=seed) for found in devices.values()
    ]
    others = [site for site in sites if not site.is_matrix]
    return parts + ([Dense(others, kind="rademacher", seed=seed)] if others else [])


def _rademacher(sites: Sequence[Site], rank: int, max_rank: int, queries: int, seed: int) -> list[Directions]:
    return [Dense(sites, kind="rademacher", seed=seed)]


def _gaussian(sites: Sequence[Site], rank: int, max_rank: int, queries: int, seed: int) -> list[Directions]:
    return [Dense(sites, kind="gaussian", seed=seed)]


DIRECTIONS: dict[str, Callable[[Sequence[Site], int, int, int, int], list[Directions]]] = {
    "low_rank": _low_rank,
    "rademacher": _rademacher,
    "gaussian": _gaussian,
}
