"""How the engine reads a batch as rows."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch


class Rows(Protocol):
    """How the engine reads a batch as rows."""

    def count(self, batch: Any) -> int: ...

    def select(self, batch: Any, rows: torch.Tensor) -> Any:
        """The batch of these rows (int64, in this order; a row may come more than once)."""
        ...

    def weights(self, batch: Any) -> torch.Tensor:
        """[rows]: the step's loss is sum(losses) / sum(weights)."""
        ...

    def entries(self, batch: Any) -> torch.Tensor | None:
        """[rows]: places of the leading dimension that belong to each row, in order; None: all rows have as many."""
        ...


class TensorRows:
    """Batches that are a tensor, or a mapping, list, tuple or dataclass of them; tensors as long as the first hold the
    rows."""

    def count(self, batch: Any) -> int:
        tensors = [t for t in tensors_in(batch) if t.ndim]
        if not tensors:
            raise ValueError(f"A batch must hold tensors. Received {type(batch).__name__}. Try giving `rows`.")
        return len(tensors[0])

    def select(self, batch: Any, rows: torch.Tensor) -> Any:
        return _selected(batch, rows, self.count(batch))

    def weights(self, batch: Any) -> torch.Tensor:
        return torch.ones(self.count(batch))

    def entries(self, batch: Any) -> torch.Tensor | None:
        return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name))


def _selected(value: Any, rows: torch.Tensor, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows.to(value.device)) if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        items = {key: _selected(item, rows, count) for key, item in value.items()}
        if not isinstance(value, UserDict):
            return items
        same = copy.copy(value)  # a tokenizer's, which is asked by attributes too
        same.data = items
        return same
    if isinstance(value, (list, tuple)):
        items = [_selected(item, rows, count) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: _selected(getattr(value, f.name), rows, count) for f in fields(value) if f.init}
        )
    return value
