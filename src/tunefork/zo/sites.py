"""Which parameters of a model are trained, where they are used, and which rule covers each: or a refusal by name."""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Train = str | Sequence[str]
"""`auto`, `blocks`, `trainable`, or names and patterns of parameters and modules."""


@dataclass(frozen=True, slots=True)
class Place:
    """One attribute of one module under which a parameter is found."""

    module: torch.nn.Module
    attribute: str


@dataclass(frozen=True, slots=True)
class Site:
    """A parameter under its first name, with every place and name it is found at (more than one where it is tied)."""

    name: str
    parameter: torch.nn.Parameter
    places: tuple[Place, ...]
    names: tuple[str, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it is only ever the weight of linear layers, so that its change can be added to their outputs."""
        return all(is_linear(p.module) and p.attribute == "weight" for p in self.places)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a matrix, whatever its storage: packed 4-bit weights have another shape than they stand for."""
        return linear_shape(self.places[0].module)


@dataclass(frozen=True, slots=True)
class Uses:
    """What one pass through the model showed."""

    called: frozenset[int]  # ids of the modules whose forward ran
    readers: dict[int, tuple[torch.nn.Module | None, ...]]  # parameter id -> modules in whose own code it was read


def is_linear(module: torch.nn.Module) -> bool:
    """Linear (quantised subclasses too), or transformers' Conv1D, which keeps its weight transposed."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def is_conv1d(module: torch.nn.Module) -> bool:
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and isinstance(module, found.Conv1D)


def linear_shape(module: torch.nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.get_parameter("weight").shape
    return columns, rows


def all_sites(model: torch.nn.Module) -> dict[str, Site]:
    """Every parameter once, in the order of `named_parameters`."""
    names: dict[int, list[str]] = {}
    places: dict[int, list[Place]] = {}
    parameters: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            parameters[id(parameter)] = parameter
            names.setdefault(id(parameter), []).append(f"{prefix}.{attribute}" if prefix else attribute)
            places.setdefault(id(parameter), []).append(Place(module, attribute))
    return {n[0]: Site(n[0], parameters[key], tuple(places[key]), tuple(n)) for key, n in names.items()}


def choose(model: torch.nn.Module, train: Train, also: Sequence[str], *, matrices: bool) -> list[Site]:
    """The parameters to train.

    Args:
        train: `blocks`, the matrices of linear layers in the repeated blocks and of a classification head;
            `trainable`, all that require a gradient; or names of parameters or modules, `*` allowed.
            `auto` is `blocks` for low-rank directions (`matrices`) on a model without PEFT's wrapper, else `trainable`.
        also: names added to that: embeddings, norms, biases, an output layer.

    Raises ValueError where a name means nothing or nothing is left to train, TypeError for what is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"The model itself must be given, a torch.nn.Module: it is run. Received {type(model).__name__}. "
            "Try ZO(model)."
        )
    sites = all_sites(model)
    if train == "auto":
        train = "blocks" if matrices and not type(model).__module__.startswith("peft.") else "trainable"
    if train == "blocks":
        chosen = _block_matrices(model, sites)
    elif train == "trainable":
        chosen = {name for name, site in sites.items() if site.parameter.requires_grad}
    else:
        chosen = _named(sites, [train] if isinstance(train, str) else train, "train")
    chosen |= _named(sites, also, "also")
    if not chosen:
        raise ValueError(
            f"There must be parameters to train. Received {type(model).__name__}, where `train={train!r}` means none. "
            "Try train=['*'] for all, or names of modules."
        )
    return [site for name, site in sites.items() if name in chosen]


def _named(sites: dict[str, Site], patterns: Sequence[str], option: str) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = {n for n in sites if _means(pattern, n)}
        found = found or {n for n, site in sites.items() if any(_means(pattern, alias) for alias in site.names)}
        if not found:
            near = get_close_matches(pattern, [*sites, *{n.rpartition(".")[0] for n in sites}], 1, 0.5)
            raise ValueError(
                f"`{option}` must name parameters or modules of the model, or be auto, blocks or trainable. Received "
                f"{pattern!r}.{f' Did you mean {near[0]!r}?' if near else ''}"
            )
        chosen |= found
    return chosen


def _means(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _block_matrices(model: torch.nn.Module, sites: dict[str, Site]) -> set[str]:
    matrices = {n: s for n, s in sites.items() if s.is_matrix}
    output, head = _ends(model)
    inside = {n for n in matrices if any(part.isdigit() for part in n.split("."))}
    if not inside:  # not a stack of blocks: every linear layer but the one over the vocabulary
        return {n for n, s in matrices.items() if all(p.module is not output for p in s.places)}
    return inside | {n for n, s in matrices.items() if any(p.module in head for p in s.places)}


def _pretrained(model: torch.nn.Module) -> Any:
    """The model, if it is one of transformers'."""
    found = sys.modules.get("transformers.modeling_utils")
    return model if found is not None and isinstance(model, found.PreTrainedModel) else None


def _ends(model: torch.nn.Module) -> tuple[torch.nn.Module | None, set[torch.nn.Module]]:
    """A transformers model's output layer over the vocabulary, and the modules of a head that stands in its place."""
    known = _pretrained(model)
    output = None if known is None else known.get_output_embeddings()
    return output, {module for name in head_names(model) for module in model.get_submodule(name).modules()}


def output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """A transformers model's layer over the vocabulary."""
    return _ends(model)[0]


def head_names(model: torch.nn.Module) -> list[str]:
    """Names of the children that a transformers model without output embeddings puts on its backbone: a fresh head."""
    known = _pretrained(model)
    if known is None or known.base_model is model or known.get_output_embeddings() is not None:
        return []
    added = [(name, child) for name, child in model.named_children() if child is not known.base_model]
    return [name for name, child in added if any(True for _ in child.parameters())]


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of every tensor's name, shape, dtype and the CRC-32 of its bytes: a gigabyte takes about a second."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.numel() and isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            flat = tensor.detach().reshape(-1).contiguous().cpu()
            digest.update(zlib.crc32(flat.view(torch.uint8).numpy().data).to_bytes(4, "little"))
    return digest.hexdigest()


def trace(model: torch.nn.Module, run: Callable[[], Any]) -> Uses:
    """Runs the model once and sees which modules are called, and in whose code each parameter is read."""
    running: list[torch.nn.Module] = []
    called: set[int] = set()
    readers: dict[int, dict[int, torch.nn.Module | None]] = {}

    def enter(module: torch.nn.Module, _: Any) -> None:
        running.append(module)
        called.add(id(module))

    def leave(*_: Any) -> None:
        running.pop()

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") not in _LOOKS:
                reader = running[-1] if running else None
                for parameter in _parameters((args, kwargs)):
                    readers.setdefault(id(parameter), {})[id(reader)] = reader
            return func(*args, **(kwargs or {}))

    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        with Reads():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return Uses(frozenset(called), {key: tuple(found.values()) for key, found in readers.items()})


_LOOKS = {"__get__", "size", "dim", "numel", "element_size", "stride", "is_floating_point", "data_ptr", "__len__"}
"""Looking at a parameter without reading its numbers."""


def _parameters(value: Any) -> Iterator[torch.nn.Parameter]:
    if isinstance(value, torch.nn.Parameter):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parameters(item)
    elif isinstance(value, dict):
        yield from _parameters(list(value.values()))
