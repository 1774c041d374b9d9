"""Low-rank directions for the matrices of linear layers, applied where activations pass: weights are never written.

A matrix W [out, in] learns the change U^T A, with A [R, in] fixed signs and U [R, out] fp32, both kept transposed.
A is a pool of K = R / r bases of r rows, drawn from counters; step t's query j of q visits base k = (t q + j) mod K,
and its direction is z = u^T A_k / sqrt(r), with u [r, out] fresh signs (LOZO, arXiv 2410.07698, without its lazy
redrawing; EGGROLL, arXiv 2511.16652). An update adds c / sqrt(r) * u to the base's rows of U, which is exact but for
one rounding, so rank, memory and cost stay what they are from the first step, and U, A are a LoRA file's B^T, A.

The U of all matrices on a device are columns of one tensor, so that an update is one call. A matrix of which one side
is not larger than r learns a full change instead: A is the identity, and u one sign an element.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tunefork.zo.directions.base import Hook, Pass, Term, warn_unused
from tunefork.zo.kernels import Signs, accumulate_many_, draw, draw_many
from tunefork.zo.noise import Stream, make_counters, make_terms, stream_key
from tunefork.zo.sites import Site, Uses, is_conv1d

GROUP_BY_GROUP = ("cpu",)
"""Devices on which groups are perturbed one after the other; elsewhere a launch costs more than a product."""

_HOLDERS: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[LowRank]] = weakref.WeakKeyDictionary()
"""Which directions a layer's hooks, that keep them alive, are of."""


class Matrix:
    """One matrix's factors, as views of the tensors that hold all matrices'."""

    __slots__ = ("basis", "columns", "factor", "noise", "rank", "rows", "site")

    def __init__(self, site: Site, factor: torch.Tensor, noise: torch.Tensor, basis: torch.Tensor | None) -> None:
        self.site, self.factor, self.noise, self.basis = site, factor, noise, basis
        self.rows, self.columns = site.shape
        self.rank = noise.shape[1]

    def lora(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 A [rank, in] and B [out, rank], of which the change is B A; a full change is padded with zeros."""
        if self.basis is not None:
            return self.basis.float(), self.factor.T
        a, b = self.factor.new_zeros(rank, self.columns), self.factor.new_zeros(self.rows, rank)
        if self.columns <= rank:
            a[: self.columns].fill_diagonal_(1.0)
            b[:, : self.columns] = self.change
        else:
            a[: self.rows] = self.change
            b[:, : self.rows].fill_diagonal_(1.0)
        return a, b

    @property
    def change(self) -> torch.Tensor:
        """fp32 [out, in]: what was learned."""
        return self.factor.T.clone() if self.basis is None else self.factor.T @ self.basis.float()


class _Parts(NamedTuple):
    """int64 [parts]: queries and bases of the equal parts of a pass, and 0, 1, 2 ..."""

    queries: torch.Tensor
    bases: torch.Tensor
    places: torch.Tensor


class LowRank:
    """The low-rank directions of all matrices of one device.

    Args:
        rank: r, the rank of one step's direction.
        max_rank: R, the rank of all that can be learned; a multiple of r.
        queries: directions a step, which decide the base that a query visits.
    """

    stackable = True

    def __init__(self, sites: Sequence[Site], *, rank: int, max_rank: int, queries: int, seed: int) -> None:
        self.rank, self.max_rank, self.bases, self.queries = rank, max_rank, max_rank // rank, queries
        self.device = sites[0].parameter.device
        self.learned = False
        self.passing: Pass | None = None
        self.parts: _Parts | None = None
        self.handles: list[Any] = []
        wide = [s for s in sites if min(s.shape) > rank]
        self.small = [self._full(s, seed) for s in sites if min(s.shape) <= rank]
        total = sum(s.shape[0] for s in wide)
        like = sites[0].parameter.detach()  # without memory where that has none
        self.factor = like.new_zeros((max_rank, total), dtype=torch.float32)
        self.noise = like.new_empty((queries, rank, total), dtype=torch.int8)
        self.signs = Signs([stream_key(seed, s.name, "direction") for s in wide], rank, [s.shape[0] for s in wide])
        self.keys = [stream_key(seed, m.site.name, "direction") for m in self.small]
        self.wide, start = [], 0
        for site in wide:
            columns = slice(start, start + site.shape[0])
            start = columns.stop
            key = stream_key(seed, site.name, "basis")
            counters = make_counters((k, 0) for k in range(self.bases))
            signs = like.new_empty((self.bases, rank, site.shape[1]), dtype=torch.float32)
            basis = draw_many(key, counters, signs.shape[1:], out=signs).to(torch.int8)
            self.wide.append(
                Matrix(site, self.factor[:, columns], self.noise[:, :, columns], basis.view(max_rank, site.shape[1]))
            )

    def _full(self, site: Site, seed: int) -> Matrix:
        rows, columns = site.shape
        like = site.parameter.detach()
        noise = like.new_empty((self.queries, columns, rows), dtype=torch.float32)
        return Matrix(site, like.new_zeros((columns, rows), dtype=torch.float32), noise, None)

    @property
    def sites(self) -> list[Site]:
        return [matrix.site for matrix in self.matrices]

    @property
    def matrices(self) -> list[Matrix]:
        return self.wide + self.small

    def attach(self) -> None:
        if self.handles:
            return
        for matrix in self.matrices:
            for module in dict.fromkeys(place.module for place in matrix.site.places):
                holder = _HOLDERS.get(module, lambda: None)()
                if holder not in (None, self):
                    self.detach()
                    raise ValueError(
                        f"A layer takes one optimizer at a time: steps of a second would build on what the first has "
                        f"learned. Received {matrix.site.name}, where another is. Try its finish() or detach() first; "
                        "where it is lost, tunefork.zo.release(model)."
                    )
                _HOLDERS[module] = weakref.ref(self)
                self.handles.append(module.register_forward_hook(Hook(self._hook(matrix)), with_kwargs=True))

    def bind(self, uses: Uses) -> None:
        for site in self.sites:
            modules = [place.module for place in site.places]
            if any(all(reader is not m for m in modules) for reader in uses.readers.get(id(site.parameter), ())):
                raise ValueError(
                    f"A low-rank direction needs a weight that only its own layer reads. Received {site.name}, which "
                    "other code reads too. Try direction='rademacher' for it, or leave it out of `train`."
                )
        warn_unused([s.name for s in self.sites if all(id(place.module) not in uses.called for place in s.places)])

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for place in (place for site in self.sites for place in site.places):
            if _HOLDERS.get(place.module, lambda: None)() is self:
                del _HOLDERS[place.module]

    def draw(self, step: int, queries: int) -> None:
        self.signs.draw_(step, self.noise[:queries])
        for query in range(queries):
            for matrix, key in zip(self.small, self.keys, strict=True):
                draw(Stream(key, step, query), matrix.noise[query].shape, out=matrix.noise[query])

    def show(self, passing: Pass | None) -> None:
        self.passing, self.parts = passing, None
        if passing is not None and len(passing.groups) > 1 and self.device.type not in GROUP_BY_GROUP:
            queries = passing.parts(self.device)
            bases = (passing.step * self.queries + queries) % self.bases
            self.parts = _Parts(queries, bases, torch.arange(len(queries), device=self.device))

    def _columns(self, matrix: Matrix, passing: Pass, query: int) -> slice:
        """Where the direction of a query lies among the basis's products."""
        first = 0 if matrix.basis is None else self.base(passing.step, query) * matrix.rank
        return slice(first, first + matrix.rank)

    def base(self, step: int, query: int) -> int:
        """Which base the direction of a query belongs to."""
        return (step * self.queries + query) % self.bases

    def _hook(self, matrix: Matrix) -> Any:
        factor, noise, basis, rank = matrix.factor, matrix.noise, matrix.basis, matrix.rank
        rows, columns, name = matrix.rows, matrix.columns, matrix.site.name
        size, root = len(factor), rank**-0.5 if basis is not None else 1.0
        kind = self.device.type

        def add_change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
            passing = self.passing
            if passing is None and not self.learned:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(output, torch.Tensor):
                raise TypeError(
                    f"A low-rank direction needs a layer that returns one tensor. {name} returns "
                    f"{type(output).__name__}. Try direction='rademacher', or leave it out of `train`."
                )
            if not torch.is_autocast_enabled(kind):
                return change(x, output, passing)
            with torch.autocast(kind, enabled=False):
                return change(x, output, passing)

        def change(x: torch.Tensor, output: torch.Tensor, passing: Pass | None) -> torch.Tensor:
            dtype = product_dtype(kind, output.dtype)
            flat = x.reshape(-1, columns)
            if flat.dtype != dtype:
                flat = flat.to(dtype)
            sides = None if basis is None else basis.to(dtype).t()
            if passing is None:
                return add(output, flat if sides is None else flat @ sides, factor)
            if self.parts is not None:
                return together(flat if sides is None else flat @ sides, output.contiguous(), passing, self.parts)
            places, groups = len(flat), passing.groups
            if passing.mapped:
                h, scale = flat if sides is None else flat @ sides, torch.as_tensor(passing.scale) * root
                probes = [h[:, self._columns(matrix, passing, g.query)] * scale[i] for i, g in enumerate(groups)]
                right = torch.cat([factor, *(noise[g.query] for g in groups)]).to(h.dtype)
                return (output + (torch.cat([h, *probes], 1) @ right).view(output.shape)).to(output.dtype)
            right = flat.new_empty((size + rank, rows))
            right[:size].copy_(factor)
            h = flat.new_empty((places, size + rank))
            if sides is None:
                h[:, :size].copy_(flat)
            else:
                torch.mm(flat, sides, out=h[:, :size])
            scale, output = passing.scaled(places, root, h, name), output.contiguous()
            probe, sizes = right[size:], [(stop - start) * (places // passing.entries) for _, start, stop in groups]
            scales = [scale] if isinstance(scale, float) else scale.split(sizes)
            for (query, *_), line, part, by in zip(
                groups, output.view(-1, rows).split(sizes), h.split(sizes), scales, strict=True
            ):
                probe.copy_(noise[query])
                torch.mul(part[:, self._columns(matrix, passing, query)], by, out=part[:, size:])
                add(line, part, right)
            return output

        def together(products: torch.Tensor, output: torch.Tensor, passing: Pass, parts: _Parts) -> torch.Tensor:
            count, scale = len(parts.places), passing.scaled(len(products), root, products, name)
            add(output, products, factor)
            by_part = products.view(count, -1, size // rank, rank)
            probed = by_part[:, :, 0] if basis is None else by_part[parts.places, :, parts.bases]
            signs = noise.index_select(0, parts.queries).to(products.dtype)
            return add(output.view(count, -1, rows), probed * scale.view(count, -1, 1), signs).view(output.shape)

        return add_change

    def apply(self, terms: Sequence[Term]) -> None:
        root = np.float32(self.rank**-0.5)
        wide = make_terms(
            (t.step, t.query, float(np.float32(t.coefficient) * root), t.decay, self.base(t.step, t.query))
            for t in terms
        )
        self.signs.accumulate_many_(self.factor, wide)
        full = make_terms((t.step, t.query, t.coefficient, t.decay, 0) for t in terms)
        for matrix, key in zip(self.small, self.keys, strict=True):
            accumulate_many_(matrix.factor, key, full)
        self.learned = self.learned or bool(terms)

    def state(self, *, weights: bool = True) -> dict[str, torch.Tensor]:
        return {"factors": self.factor, **{m.site.name: m.factor for m in self.small}}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.learned = any(bool(tensor.any()) for tensor in self.state().values())

    def values(self) -> Iterator[tuple[Site, torch.Tensor]]:
        for matrix in self.matrices:
            site = matrix.site
            if not site.parameter.is_floating_point():
                raise ValueError(
                    f"A change can be written into floating-point weights only. Received {site.name}, which is "
                    "quantised. Try finish(folder), which writes an adapter."
                )
            conv = is_conv1d(site.places[0].module)
            value = site.parameter.detach()
            wide = value if value.dtype == torch.float64 else value.float()
            yield site, wide + (matrix.change.T if conv else matrix.change)


def release(model: torch.nn.Module) -> None:
    """Takes off whatever `ZO` trains low-rank directions of this model, as its `detach` does: for where the optimizer
    itself is lost, in a function that raised."""
    for module in model.modules():
        if (holder := _HOLDERS.get(module, lambda: None)()) is not None:
            holder.detach()


@cache
def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """What the change of an output of `dtype` is computed in: fp32 on a CPU without 16-bit products, else the same.

    In bf16 it costs a third to a sixth of fp32 where the layer's own product is in bf16 too. The factors' columns stay
    apart from the probe's, so that rounding moves where the slope is taken by 2^-9 of what was learned, as it does the
    weights, and not the direction.
    """
    native = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if device == "cpu" and not native else dtype


def add(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """output + left @ right in place, the product in left's dtype; of many matrices [n, ...] at once too."""
    right = right.to(left.dtype)
    if right.ndim == 3 and output.dtype == left.dtype:
        return output.baddbmm_(left, right)
    if output.dtype == left.dtype and output.is_contiguous():
        output.view(-1, output.shape[-1]).addmm_(left, right)
        return output
    return output.add_((left @ right).view(output.shape))
