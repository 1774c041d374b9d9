"""Runs the true training code on weights that are not there, and keeps account of every byte and operation."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunefork.train.heap import LARGEST_THRESHOLD, Block, Heap

Matmul = tuple[torch.dtype, int, int, int, int]
"""number format, batch, m, k, n"""

_aten = torch.ops.aten
_device = torch.ops.prim.device.default
_ATTENTION = {  # multiplications of [T, D] x [D, S]; 2 forward, 5 backward
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,
    _aten._scaled_dot_product_flash_attention: 2,
    _aten._scaled_dot_product_efficient_attention: 2,
    _aten._scaled_dot_product_cudnn_attention: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
    _aten._scaled_dot_product_flash_attention_backward: 5,
    _aten._scaled_dot_product_efficient_attention_backward: 5,
    _aten._scaled_dot_product_cudnn_attention_backward: 5,
}


@dataclass
class Work:
    """What was computed: operations, the matrix products among them, bytes that the others read and wrote.

    `mapped` bytes are results in memory that comes fresh from the system each time, which takes time of its own.
    """

    operations: int = 0
    moved: int = 0
    mapped: int = 0
    matmuls: Counter[Matmul] = field(default_factory=Counter)

    def since(self, before: Work) -> Work:
        """The work done after `before`, an earlier copy of the same account."""
        matmuls = Counter({k: n - before.matmuls[k] for k, n in self.matmuls.items() if n > before.matmuls[k]})
        operations, moved = self.operations - before.operations, self.moved - before.moved
        return Work(operations, moved, self.mapped - before.mapped, matmuls)

    def add(self, more: Work) -> None:
        """The same work once more."""
        self.operations, self.moved = self.operations + more.operations, self.moved + more.moved
        self.mapped += more.mapped
        self.matmuls.update(more.matmuls)

    def copy(self) -> Work:
        return Work(self.operations, self.moved, self.mapped, self.matmuls.copy())


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory a phase held at once: tag -> bytes, "" for none, "allocator" for what is freed and kept."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def rank(self) -> tuple[int, int]:
        """Orders peaks by what was held, then by what was used."""
        return self.total, self.total - self.parts["allocator"]


class Simulation(TorchDispatchMode):
    """While active, every storage that operations create is counted from its creation until it is freed.

    Meant for fake tensors, which have shapes and no memory; it counts real ones too, so that both can be compared.
    A number read off a fake tensor (`item`, a branch) is 1: a finite loss, a true condition. On a CPU, memory is what
    the C library's heap holds, elsewhere the bytes of live storages, as the device's own meter counts them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.work = Work()
        self.phases: dict[str, Peak] = {}
        self._heap = Heap() if device.type == "cpu" else None
        self._blocks: dict[int, tuple[int, Block | None]] = {}  # storage -> bytes, place in the heap
        self._tags: dict[int, str] = {}
        self._tagged: Counter[str] = Counter()
        self._written: set[int] = set()
        self._events: list[int] = []
        self._recorded: dict[int, int] = {}  # storage -> where in the events it is made
        self._live = 0
        self._peak, self._peak_parts = (-1, -1), {"": 0}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block whose peak is kept in `phases`; of blocks of one name the highest."""
        self._peak = -1, -1
        self._note_peak()
        yield
        held, used = self._peak
        self._peak = held, used - 1  # so that tags given meanwhile are seen, where the peak is now
        self._note_peak()
        peak = Peak(self._peak_parts)
        if name not in self.phases or peak.rank > self.phases[name].rank:
            self.phases[name] = peak

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[int]]:
        """A block whose allocations are kept as sizes, and the release of the one at place i of the list as ~i."""
        self._events, self._recorded = [], {}
        yield self._events
        self._events, self._recorded = [], {}

    def replay(self, light: Sequence[int], heavy: Sequence[int], shares: Iterable[float]) -> None:
        """Puts recorded steps through the heap once a share: 0 is `light`, 1 is `heavy`, others lie on their line.

        Holes that steps of one shape leave do not fit those of the next: over hundreds of steps the heap grows.
        Does nothing where the two did not do the same in the same order.
        """
        alike = len(light) == len(heavy) and all(a == b or min(a, b) >= 0 for a, b in zip(light, heavy, strict=True))
        if self._heap is None or not alike:
            return
        for share in shares:
            made: dict[int, Block] = {}
            for place, (a, b) in enumerate(zip(light, heavy, strict=True)):
                if a < 0:
                    self._heap.release(made.pop(~a))
                else:
                    made[place] = self._heap.allocate(max(0, round(a + share * (b - a))))
            for block in made.values():
                self._heap.release(block)

    def wrote(self, tensor: torch.Tensor) -> bool:
        """Whether an operation has put its result where the tensor's values were."""
        return tensor.untyped_storage()._cdata in self._written

    def tag(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Puts storages that are counted already under a name."""
        for tensor in tensors:
            self._tag(tensor.untyped_storage()._cdata, name)

    def tag_rest(self, name: str) -> None:
        """The same for everything that is alive and under no name."""
        for key in list(self._blocks):
            self._tag(key, name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _device and isinstance(args[0], FakeTensor):  # asked more often than everything else together
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype == torch.bool or 1
        if func is _aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out = _grouped(*args, **(kwargs or {}))
        elif kwargs and isinstance(kwargs.get("out"), FakeTensor):
            out = kwargs["out"]  # it is there already, and the stand-ins are slow here
        else:
            out = func(*args, **(kwargs or {}))
        if func.namespace == "prim" or func.is_view:
            return out
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in results:
            self._count(tensor)
        self._log(func.overloadpacket, args, results)
        return out

    def _log(self, packet: Any, args: tuple[Any, ...], results: list[torch.Tensor]) -> None:
        self.work.operations += 1
        if packet in (_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm):
            a, b = args[-2:] if packet in (_aten.mm, _aten.bmm) else args[1:3]
            batch = a.shape[0] if a.ndim == 3 else 1
            self.work.matmuls[(a.dtype, batch, a.shape[-2], a.shape[-1], b.shape[-1])] += 1
        elif packet is _aten._grouped_mm:
            a, b = args[:2]
            self.work.matmuls[(a.dtype, 1, a.shape[-2], a.shape[-1], b.shape[-1])] += 1
        elif packet in _ATTENTION:
            query, key = args[1:3] if _ATTENTION[packet] == 5 else args[:2]
            batch = query.shape[0] * query.shape[1]
            shape = (query.dtype, batch, query.shape[2], query.shape[3], key.shape[2])
            self.work.matmuls[shape] += _ATTENTION[packet]
        elif packet is not _aten.empty:
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.work.moved += sum(t.numel() * t.element_size() for t in (*tensors, *results))

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            self._written.add(key)
            return
        size = storage.nbytes()
        block = self._heap.allocate(size) if self._heap is not None else None
        if block is not None and size >= LARGEST_THRESHOLD:
            self.work.mapped += size
        self._blocks[key] = size, block
        self._recorded[key] = len(self._events)
        self._events.append(size)
        self._live += size
        weakref.finalize(storage, self._forget, key).atexit = False
        self._note_peak()

    def _forget(self, key: int) -> None:
        size, block = self._blocks.pop(key)
        self._written.discard(key)
        self._live -= size
        if (place := self._recorded.pop(key, None)) is not None:
            self._events.append(~place)
        if (name := self._tags.pop(key, None)) is not None:
            self._tagged[name] -= size
        if self._heap is not None and block is not None:
            self._heap.release(block)

    def _tag(self, key: int, name: str) -> None:
        if key in self._blocks and key not in self._tags:
            self._tags[key] = name
            self._tagged[name] += self._blocks[key][0]

    def _note_peak(self) -> None:
        held = self._live if self._heap is None else max(self._live, self._heap.resident)
        if (held, self._live) > self._peak:
            self._peak = held, self._live
            rest = self._live - sum(self._tagged.values())
            self._peak_parts = {**self._tagged, "": rest, "allocator": held - self._live}


def _grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The result's shape of a product in groups (mixtures of experts): PyTorch's own stand-in refuses fp32."""
    if a.ndim == 2 and b.ndim == 2:
        return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])
    if a.ndim == 3 and b.ndim == 3:
        return a.new_empty(*a.shape[:2], b.shape[-1])
    return a.new_empty(a.shape[-2], b.shape[-1])
