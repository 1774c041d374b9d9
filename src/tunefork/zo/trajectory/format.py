"""The trajectory file: what a run is, then one record a step. All numbers are little-endian.

    8 bytes  magic `TFZOTRAJ`
    u32      version of this format
    u32      length of the header
    n bytes  header: a JSON object, UTF-8
    u32      CRC-32 of everything before it
    m bytes  a safetensors file, m the header's `start`: weights that training began with and the base does not have, a
             fresh head or adapter; the header's `run.start` is their digest
    records  one a step, in order

The record of step s (from 0), with q queries and w = min(s + 1, window):

    f32      loss
    f32      decay: what the learned change is multiplied by before anything is added
    f32 [q]  projected gradients, one a query
    f32 [w, q]  final coefficients: row a has those on the directions of step s - a, after learning rate, clipping,
             normalisation and momentum
    u32      CRC-32 of header CRC (u32), s (u64) and the record so far: a record holds at its place in its file only

A record's size follows from the header and its number, so a broken one does not hide those behind it. The learned
change is, record by record: times the decay, then plus coefficient times direction, rows and queries in order.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from tunefork import __version__
from tunefork.zo.directions.base import Term
from tunefork.zo.noise import NOISE_VERSION

MAGIC = b"TFZOTRAJ"
VERSION = 1
_PREAMBLE = struct.Struct("<8sII")
_MOST_HEADER = 1 << 24
_F32 = np.dtype("<f4")


class TrajectoryError(ValueError):
    """A trajectory that cannot be used: not one, of a newer version, of another run, or damaged."""


@dataclass(frozen=True)
class Header:
    """What a trajectory belongs to.

    queries, window: see the file's format; `window` is the number of steps whose directions an update contains.
    start: bytes of the weights that follow the header.
    run: what decides the run's numbers: hashes of base model, recipe and start, options, seed, trained parameters.
    environment: what the same bits in further training depend on besides: threads, CPU capability, versions, stacking.
    about: what whoever rebuilds the model needs besides: the recipe, how it is asked. It is never compared.
    steps: that a copy was made with; one of fewer is damaged. 0 in a run's own, which grows.
    """

    queries: int
    window: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    noise: int = NOISE_VERSION
    about: Mapping[str, Any] = field(default_factory=dict)
    start: int = 0
    steps: int = 0

    def size(self, step: int) -> int:
        """Bytes of the record of `step`."""
        return 4 * (3 + self.queries * (1 + min(step + 1, self.window)))

    def encode(self) -> bytes:
        try:
            text = json.dumps(asdict(self), sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise TrajectoryError(
                f"What a trajectory says of its run must be JSON. Received what is not: {error}. Try text and numbers."
            ) from None
        start = _PREAMBLE.pack(MAGIC, VERSION, len(text)) + text
        return start + zlib.crc32(start).to_bytes(4, "little")

    def difference(self, other: Header) -> str | None:
        """The first thing that makes `other` another run, in words; None where there is none."""
        mine, theirs = ({**vars(h), **h.run} for h in (self, other))
        for name in ("noise", "queries", "window", *sorted({*self.run, *other.run})):
            if mine.get(name) != theirs.get(name):
                return f"`{name}` {_short(mine.get(name))} there, {_short(theirs.get(name))} here"
        return None


def environment(device: str, stack: int | str) -> dict[str, Any]:
    """Of this process, for `Header.environment`. `stack`: how many sides share a pass."""
    return {
        "tunefork": __version__,  # of which the padding of batches is a part: to the longest row
        "torch": torch.__version__,
        "device": device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "stack": stack,
        "transformers": getattr(sys.modules.get("transformers"), "__version__", None),
    }


class Record(NamedTuple):
    """One finished step: fp32 `gradients` [queries], and the terms that were applied, in order."""

    step: int
    loss: float
    gradients: np.ndarray
    terms: list[Term]


def read_header(file: BinaryIO, source: object) -> tuple[Header, bytes]:
    """The header that `file` begins with, and its bytes as they stand there; `source` names the file in errors."""
    start = file.read(_PREAMBLE.size)
    if len(start) < _PREAMBLE.size or start[:8] != MAGIC:
        raise TrajectoryError(f"A trajectory must begin with {MAGIC.decode()}. {source} does not. Try another file.")
    _, written, length = _PREAMBLE.unpack(start)
    if written > VERSION:
        raise TrajectoryError(
            f"A trajectory's version must be {VERSION} or below. {source} has version {written}. Try a newer Tunefork."
        )
    text = file.read(length) if length <= _MOST_HEADER else b""
    seal = file.read(4)
    if len(seal) < 4 or zlib.crc32(start + text).to_bytes(4, "little") != seal:
        raise TrajectoryError(f"A trajectory's header must be whole. The one of {source} is damaged. Try a copy of it.")
    header = _parsed(text)
    if header is None:
        raise TrajectoryError(
            f"A trajectory's header must say what this format asks. The one of {source} does not. Try the file that "
            "Tunefork wrote."
        )
    if header.noise != NOISE_VERSION:
        raise TrajectoryError(
            f"A trajectory's noise must be of version {NOISE_VERSION}. {source} has version {header.noise}. "
            "Try the Tunefork that wrote it."
        )
    return header, start + text + seal


def _parsed(text: bytes) -> Header | None:
    try:
        header = Header(**json.loads(text))
    except (ValueError, TypeError, RecursionError):  # no JSON, no object, or other keys
        return None
    counts = (header.queries, header.window, header.start, header.steps, header.noise)
    if not all(type(count) is int for count in counts):
        return None
    right = 1 <= header.queries < 1 << 16 and 1 <= header.window < 1 << 16 and header.start >= 0 and header.steps >= 0
    return (
        header if right and all(isinstance(m, dict) for m in (header.run, header.environment, header.about)) else None
    )


def encode_record(
    header: Header, seal: bytes, step: int, loss: float, gradients: np.ndarray, terms: Sequence[Term]
) -> bytes:
    """A step's record; `seal` is the CRC at the end of the header.

    Raises ValueError for terms that are not those of the last steps' queries in order, with one decay in front.
    """
    ages = min(step + 1, header.window)
    order = [(step - age, query) for age in range(ages) for query in range(header.queries)]
    decays = [term.decay for term in terms]
    if [(t.step, t.query) for t in terms] != order or decays[1:] != [1.0] * (len(order) - 1):
        raise ValueError(
            f"Step {step} must apply the {header.queries} directions of each of its last {ages} steps in order, newest "
            f"first, with one decay before the first. Received {_short(list(terms))}."
        )
    numbers = [loss, decays[0], *gradients.tolist(), *(term.coefficient for term in terms)]
    body = np.array(numbers, dtype=_F32).tobytes()
    return body + _crc(seal, step, body)


def decode_record(header: Header, seal: bytes, step: int, data: bytes) -> Record | None:
    """The record that `data`, of `header.size(step)` bytes, holds; None where it is damaged."""
    if data[-4:] != _crc(seal, step, data[:-4]):
        return None
    numbers = np.frombuffer(data[:-4], dtype=_F32)
    queries = header.queries
    coefficients = numbers[2 + queries :].reshape(-1, queries).tolist()
    terms = [Term(step - age, query, c) for age, row in enumerate(coefficients) for query, c in enumerate(row)]
    terms[0] = terms[0]._replace(decay=float(numbers[1]))
    return Record(step, float(numbers[0]), numbers[2 : 2 + queries].astype(np.float32), terms)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hex, of tensors by name: names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _crc(seal: bytes, step: int, body: bytes) -> bytes:
    return zlib.crc32(seal + step.to_bytes(8, "little") + body).to_bytes(4, "little")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
