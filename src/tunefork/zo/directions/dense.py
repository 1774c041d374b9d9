"""Dense directions for any parameter: one random number an element, in a scratch buffer while the module runs.

A probe puts W + scale * z in the parameter's place before its module's forward and takes it out after; the weight
itself is written by updates only. A parameter that other code reads (an attention's out-projection read by its parent,
a list of experts) is put in place while that module runs; a tied one has one noise and is perturbed at every use.

fp32 weights are updated with one rounding. A 16-bit weight keeps what rounding leaves out of its fp32 value in a second
tensor of 16 bits, so small updates add up; the probe rounds value + scale * z once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tunefork.zo.directions.base import Hook, Pass, Term, warn_unused
from tunefork.zo.kernels import accumulate_many_, exact, perturbed
from tunefork.zo.noise import Kind, Stream, make_terms, stream_key
from tunefork.zo.sites import Place, Site, Uses


@dataclass(slots=True)
class Parameter:
    """A trained parameter, its noise's key, and what 16-bit rounding has cut off it so far."""

    site: Site
    key: int
    remainder: torch.Tensor | None = None

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.site.parameter


class _Swap(NamedTuple):
    place: Place
    weight: torch.nn.Parameter
    buffer: torch.Tensor


class Dense:
    """Dense directions over `sites`; one side of one query at a time."""

    stackable = False

    def __init__(self, sites: Sequence[Site], *, kind: Kind, seed: int) -> None:
        for site in sites:
            if site.parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"A dense direction needs weights in fp32, bf16 or fp16. Received {site.name} in "
                    f"{site.parameter.dtype}. Try leaving it out, or low-rank directions where it is a matrix."
                )
        self.kind: Kind = kind
        self.parameters = [Parameter(s, stream_key(seed, s.name, "direction")) for s in sites]
        for parameter in self.parameters:
            weight = parameter.weight
            if weight.dtype != torch.float32:
                parameter.remainder = torch.zeros_like(weight, dtype=torch.int16)
        self.passing: Pass | None = None
        self.handles: list[Any] = []
        self.frames: list[list[_Swap]] = []  # a running module's, inner ones last
        self.free: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []

    @property
    def sites(self) -> list[Site]:
        return [parameter.site for parameter in self.parameters]

    def attach(self) -> None:
        """Nothing: what is learned is in the weights."""

    def bind(self, uses: Uses) -> None:
        by_module: dict[torch.nn.Module, list[tuple[Parameter, list[Place]]]] = {}
        unused: list[str] = []
        for parameter in self.parameters:
            site = parameter.site
            readers = uses.readers.get(id(site.parameter), ())
            if None in readers:
                raise ValueError(
                    f"A parameter must be read by a module's forward. Received {site.name}, which the loss reads "
                    "itself. Try leaving it out of `train`."
                )
            own = {place.module for place in site.places}
            unused += [] if readers else [site.name]
            for reader in {r: None for r in readers if r is not None} or own:
                # a module that is read from outside has the new value under every name it may be read by
                places = [p for p in site.places if p.module is reader] or list(site.places)
                by_module.setdefault(reader, []).append((parameter, places))
        warn_unused(unused)
        for module, parameters in by_module.items():
            self.handles.append(module.register_forward_pre_hook(Hook(self._placer(parameters))))
            self.handles.append(module.register_forward_hook(Hook(self._remove)))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def draw(self, step: int, queries: int) -> None:
        """Nothing: noise is made where it is used."""

    def show(self, passing: Pass | None) -> None:
        while self.frames:  # a pass that was broken off has left weights in place
            self._take_out()
        while self.kept:
            self.free.append(self.kept.pop())  # a signal in between loses a buffer; one held twice would be shared
        self.passing = passing

    def _placer(self, parameters: Sequence[tuple[Parameter, list[Place]]]) -> Any:
        def place(*_: Any) -> None:
            passing = self.passing
            if passing is None or passing.scale == 0.0:
                return
            if not isinstance(passing.scale, float):
                raise TypeError("a dense direction takes one side of one query at a time")
            self.frames.append([])
            for parameter, places in parameters:
                weight = parameter.weight
                buffer = self._buffer(weight)
                scratch = buffer[: weight.numel()].view(weight.shape)
                stream = Stream(parameter.key, passing.step, passing.groups[0].query)
                perturbed(weight, stream, passing.scale, kind=self.kind, out=scratch, remainder=parameter.remainder)
                # a linear layer over some places copies a weight that asks for no gradient once a row
                swapped = torch.nn.Parameter(scratch, requires_grad=weight.requires_grad)
                for spot in places:
                    self.frames[-1].append(_Swap(spot, getattr(spot.module, spot.attribute), buffer))
                    setattr(spot.module, spot.attribute, swapped)

        return place

    def _remove(self, _: torch.nn.Module, args: Any, output: Any) -> None:
        if self.passing is None or self.passing.scale == 0.0:
            return
        shown = {t.untyped_storage()._cdata for t in _tensors(output)}
        for buffer in self._take_out():
            # a module may hand out (a view of) its weight: then the buffer is in use until the pass ends
            (self.kept if buffer.untyped_storage()._cdata in shown else self.free).append(buffer)

    def _take_out(self) -> list[torch.Tensor]:
        """Puts the innermost running module's own weights back; the buffers that stood in their place."""
        frame, buffers = self.frames[-1], {}
        while frame:
            place, weight, buffer = frame[-1]
            setattr(place.module, place.attribute, weight)
            buffers[id(buffer)] = buffer
            frame.pop()
        self.frames.pop()
        return list(buffers.values())

    def _buffer(self, weight: torch.Tensor) -> torch.Tensor:
        """Flat memory for at least the weight's elements, in its dtype, on its device; used again and again."""
        for i, buffer in enumerate(self.free):
            if buffer.dtype == weight.dtype and buffer.device == weight.device:
                del self.free[i]
                if buffer.numel() >= weight.numel():
                    return buffer
                break  # too small: a larger one takes its place
        with torch.inference_mode(False):  # what is made inside could not be used again outside
            return weight.detach().new_empty(weight.numel())

    def apply(self, terms: Sequence[Term]) -> None:
        for parameter in self.parameters:
            weight = parameter.weight
            decays = weight.ndim >= 2  # as usual, biases and norms are not decayed
            array = make_terms((t.step, t.query, t.coefficient, t.decay if decays else 1.0, 0) for t in terms)
            accumulate_many_(weight, parameter.key, array, kind=self.kind, remainder=parameter.remainder)

    def state(self, *, weights: bool = True) -> dict[str, torch.Tensor]:
        held = {f"weight/{p.site.name}": p.weight.detach() for p in self.parameters} if weights else {}
        return held | {f"remainder/{p.site.name}": p.remainder for p in self.parameters if p.remainder is not None}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            if name in state:
                tensor.copy_(state[name])

    def values(self) -> Iterator[tuple[Site, torch.Tensor]]:
        for parameter in self.parameters:
            yield parameter.site, exact(parameter.weight.detach(), parameter.remainder)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]
