"""The trajectory: what is in the file, what it survives, and that replaying it gives the same bits."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from tunefork.zo.directions.base import Term
from tunefork.zo.kernels import Signs, accumulate_many_
from tunefork.zo.noise import NOISE_VERSION, make_terms
from tunefork.zo.trajectory import (
    Header,
    Reader,
    Trajectory,
    TrajectoryError,
    digest,
    replay,
)

RACES = 30
HEADER = Header(queries=2, window=3, run={"base": "b1", "seed": 7}, environment={"threads": 2, "torch": "2.8"})


def made_up(header: Header, step: int) -> tuple[float, np.ndarray, list[Term]]:
    """A step's loss, gradients and terms, as any function of its number."""
    generator = np.random.Generator(np.random.PCG64(step))
    gradients = generator.standard_normal(header.queries).astype(np.float32)
    ages = min(step + 1, header.window)
    coefficients = generator.standard_normal((ages, header.queries)).astype(np.float32).tolist()
    terms = [Term(step - age, query, c) for age, row in enumerate(coefficients) for query, c in enumerate(row)]
    terms[0] = terms[0]._replace(decay=float(np.float32(1 - 1e-3 * (step % 2))))
    return float(np.float32(generator.random())), gradients, terms


def written(path: Path, header: Header, steps: int) -> bytes:
    """The bytes of a trajectory of so many made-up steps."""
    with Trajectory(path, header) as log:
        for step in range(log.steps, steps):
            log.append(*made_up(header, step))
    return path.read_bytes()


def check(reader: Reader, steps: int) -> None:
    records = list(reader.records())
    assert [r.step for r in records] == list(range(steps))
    for record in records:
        loss, gradients, terms = made_up(reader.header, record.step)
        assert (record.loss, record.gradients.tolist(), record.terms) == (loss, gradients.tolist(), terms)


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    """Read with nothing but struct, json and zlib."""
    data = written(tmp_path / "t", HEADER, 4)
    magic, version, length = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"TFZOTRAJ", 1)
    assert json.loads(data[16 : 16 + length]) == {
        "queries": 2,
        "window": 3,
        "start": 0,
        "steps": 0,
        "about": {},
        "noise": NOISE_VERSION,
        "run": {"base": "b1", "seed": 7},
        "environment": {"threads": 2, "torch": "2.8"},
    }
    at = 16 + length
    assert struct.unpack_from("<I", data, at)[0] == zlib.crc32(data[:at])
    seal, at = data[at : at + 4], at + 4
    for step in range(4):
        loss, gradients, terms = made_up(HEADER, step)
        body = struct.pack("<ff", loss, terms[0].decay) + struct.pack("<2f", *gradients)
        body += b"".join(struct.pack("<f", term.coefficient) for term in terms)
        crc = zlib.crc32(seal + struct.pack("<Q", step) + body)
        assert data[at : at + len(body) + 4] == body + struct.pack("<I", crc), step
        at += len(body) + 4
    assert at == len(data)


def test_weights_it_begins_with_lie_between_header_and_records(tmp_path: Path) -> None:
    path, start = tmp_path / "t", {"head": torch.arange(6.0).view(2, 3).t(), "half": torch.ones(3).bfloat16()}
    for _ in range(2):  # and when it is opened again
        with Trajectory(path, HEADER, start) as log:
            log.append(*made_up(HEADER, log.steps))
    data, reader = path.read_bytes(), Reader(path)
    length = struct.unpack_from("<I", data, 12)[0]
    kept = load(data[20 + length : 20 + length + reader.header.start])
    assert all(torch.equal(kept[name], tensor) for name, tensor in start.items())
    assert digest(reader.start()) == digest(start) == reader.header.run["start"]
    check(reader, 2)
    with pytest.raises(TrajectoryError, match="`start` '"):
        Trajectory(path, HEADER, {**start, "head": torch.zeros(3, 2)})
    for at in range(20 + length, 20 + length + reader.header.start):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(TrajectoryError, match="first weights must be whole"):
            Reader(path).start()
    path.write_bytes(data[: 20 + length + reader.header.start - 1])
    with pytest.raises(TrajectoryError, match="ends within them"):
        Reader(path)


def test_a_copy_is_a_trajectory_of_the_first_steps(tmp_path: Path) -> None:
    written(tmp_path / "t", HEADER, 9)
    for steps in (0, 2, 9):
        Reader(tmp_path / "t").copy(tmp_path / "copy", steps)
        found = Reader(tmp_path / "copy")
        assert (found.steps, found.torn, found.header) == (steps, 0, replace(HEADER, steps=steps))
        check(found, steps)


def test_a_copy_that_is_cut_or_changed_anywhere_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "t", HEADER, 3)
    Reader(tmp_path / "t").copy(tmp_path / "copy", 3)
    data = (tmp_path / "copy").read_bytes()
    first = len(data) - sum(HEADER.size(step) for step in range(3))
    for at in range(first, len(data)):
        (tmp_path / "cut").write_bytes(data[:at])
        (tmp_path / "changed").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for damaged in ("cut", "changed"):
            with pytest.raises(TrajectoryError, match=r"must have the 3 steps|must be whole"):
                Reader(tmp_path / damaged)


def test_a_step_takes_eight_bytes_a_query_and_twelve() -> None:
    assert Header(queries=8).size(1000) == 12 + 8 * 8


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 12), st.integers(0, 12))
def test_what_is_appended_is_read(
    tmp_path_factory: pytest.TempPathFactory, queries: int, window: int, steps: int, stop: int
) -> None:
    header = Header(queries=queries, window=window)
    path = tmp_path_factory.mktemp("t") / "t"
    written(path, header, steps)
    written(path, header, steps + 3)  # and after it was opened again
    reader = Reader(path)
    assert (reader.header, reader.steps, reader.torn) == (header, steps + 3, 0)
    check(reader, steps + 3)
    assert [r.step for r in reader.records(stop, stop + 2)] == [s for s in (stop, stop + 1) if s < steps + 3]


def test_cut_at_every_byte_it_goes_on_to_the_same_file(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", HEADER, 9)
    ends = [len(written(tmp_path / f"{steps}", HEADER, steps)) for steps in range(10)]
    for cut in range(ends[5], len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        left = sum(end <= cut for end in ends) - 1
        reader = Reader(path)
        assert (reader.steps, reader.torn) == (left, cut - ends[left])
        check(reader, left)
        assert path.stat().st_size == cut, "a reader changes nothing"
        assert written(path, HEADER, 9) == whole


def test_a_torn_end_of_zeros_or_garbage_is_cut_off(tmp_path: Path) -> None:
    """What a power cut can leave: the file's length without its contents."""
    path = tmp_path / "t"
    whole = written(path, HEADER, 5)
    for torn in (bytes(HEADER.size(5) * 3), os.urandom(1000)):
        path.write_bytes(whole + torn)
        with Trajectory(path, HEADER) as log:
            assert (log.steps, log.torn) == (5, len(torn))
        assert path.read_bytes() == whole


def test_damage_before_a_good_record_is_refused_with_its_step(tmp_path: Path) -> None:
    path = tmp_path / "t"
    whole = written(path, HEADER, 6)
    start, stop = (len(written(tmp_path / f"{steps}", HEADER, steps)) for steps in (3, 4))
    for at in range(start, stop):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(TrajectoryError, match="that of step 3 is damaged"):
            Reader(path)
        with pytest.raises(TrajectoryError, match="that of step 3 is damaged"):
            Trajectory(path, HEADER)
        assert len(path.read_bytes()) == len(whole)


def test_records_of_another_place_or_file_do_not_pass(tmp_path: Path) -> None:
    whole = written(tmp_path / "t", HEADER, 7)
    starts = [len(written(tmp_path / f"{steps}", HEADER, steps)) for steps in range(8)]
    swapped = whole[: starts[4]] + whole[starts[5] : starts[6]] + whole[starts[4] : starts[5]] + whole[starts[6] :]
    (tmp_path / "swapped").write_bytes(swapped)
    with pytest.raises(TrajectoryError, match="step 4 is damaged"):
        Reader(tmp_path / "swapped")
    other = written(tmp_path / "other", Header(2, 3, {"base": "b2", "seed": 7}, HEADER.environment), 7)
    assert len(other) == len(whole)
    (tmp_path / "mixed").write_bytes(whole[: starts[6]] + other[starts[6] :])
    assert Reader(tmp_path / "mixed").steps == 6


def test_what_is_not_a_trajectory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    whole = written(path, HEADER, 0)

    def refusal(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(TrajectoryError) as caught:
            Trajectory(path, HEADER)
        assert path.read_bytes() == data
        return str(caught.value)

    assert "must begin with TFZOTRAJ" in refusal(b"")
    assert "must begin with TFZOTRAJ" in refusal(b"PK\x03\x04" + bytes(100))
    assert "Try a newer Tunefork" in refusal(whole[:8] + struct.pack("<I", 2) + whole[12:])
    for cut in range(16, len(whole)):
        assert "header must be whole" in refusal(whole[:cut])
    for at in range(12, len(whole)):
        assert "header must be whole" in refusal(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    later = Header(queries=2, noise=NOISE_VERSION + 1).encode()
    assert f"has version {NOISE_VERSION + 1}" in refusal(later)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Header(2, 3, {"base": "b2", "seed": 7}), "`base` 'b1' there, 'b2' here"),
        (Header(2, 3, {"base": "b1"}), "`seed` 7 there, None here"),
        (Header(3, 3, HEADER.run), "`queries` 2 there, 3 here"),
        (Header(2, 1, HEADER.run), "`window` 3 there, 1 here"),
    ],
)
def test_another_runs_trajectory_is_refused(tmp_path: Path, other: Header, words: str) -> None:
    whole = written(tmp_path / "t", HEADER, 2)
    with pytest.raises(TrajectoryError, match="must go on in its own trajectory") as caught:
        Trajectory(tmp_path / "t", other)
    assert words in str(caught.value)
    assert (tmp_path / "t").read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '"queries"',
        '{"queries": 2, "colour": 1}',
        '{"queries": 0}',
        '{"queries": -1}',
        '{"queries": 65536}',
        '{"queries": "2"}',
        '{"queries": 2.0}',
        '{"queries": true}',
        '{"queries": 2, "window": 0}',
        '{"queries": 2, "start": -1}',
        '{"queries": 2, "steps": null}',
        '{"queries": 2, "noise": []}',
        '{"queries": 2, "run": []}',
        '{"queries": 2, "about": "x"}',
    ],
)
def test_a_header_that_is_whole_and_says_nonsense_is_refused(tmp_path: Path, text: str) -> None:
    start = struct.pack("<8sII", b"TFZOTRAJ", 1, len(text)) + text.encode()
    (tmp_path / "t").write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    with pytest.raises(TrajectoryError, match="header must say what this format asks"):
        Reader(tmp_path / "t")


def test_a_second_writer_is_refused_and_the_file_replays_to_the_first(tmp_path: Path) -> None:
    with Trajectory(tmp_path / "t", HEADER) as first, Trajectory(tmp_path / "t", HEADER) as second:
        for step in range(2):
            first.append(*made_up(HEADER, step))
        whole = (tmp_path / "t").read_bytes()
        with pytest.raises(TrajectoryError, match="must have one writer"):
            second.append(*made_up(HEADER, 0))
        assert (tmp_path / "t").read_bytes() == whole
        first.append(*made_up(HEADER, 2))
    check(Reader(tmp_path / "t"), 3)


def begin_many(folder: Path, together: Any, begun: Any) -> None:
    """Begins trajectories at the same moments as another process; says which it got."""
    for i in range(RACES):
        together.wait(600)
        log, got = None, False
        with contextlib.suppress(TrajectoryError):
            log = Trajectory(folder / f"{i}", HEADER)
            log.append(*made_up(HEADER, 0))
            got = True
        together.wait(600)
        if log is not None:
            log.close()
        begun.put((i, got))


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_of_two_processes_that_begin_at_once_one_writes(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    together, begun = spawn.Barrier(2), spawn.Queue()
    workers = [spawn.Process(target=begin_many, args=(tmp_path, together, begun)) for _ in range(2)]
    for worker in workers:
        worker.start()
    said = [begun.get(timeout=600) for _ in range(2 * RACES)]
    for worker in workers:
        worker.join()
    for i in range(RACES):
        assert sorted(got for j, got in said if j == i) == [False, True]
        check(Reader(tmp_path / f"{i}"), 1)


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_another_process_is_no_second_writer(tmp_path: Path) -> None:
    code = (
        "import sys; from tunefork.zo import Trajectory, Reader\n"
        "header = Reader(sys.argv[1]).header\n"
        "Trajectory(sys.argv[1], header)"
    )
    with Trajectory(tmp_path / "t", HEADER) as log:
        log.append(*made_up(HEADER, 0))
        whole = (tmp_path / "t").read_bytes()
        with (tmp_path / "t").open("ab") as file:
            file.write(b"half a record")  # that a second opener would cut off
        command = [sys.executable, "-c", code, str(tmp_path / "t")]
        said = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert said.returncode and "is another process's" in said.stderr
        assert (tmp_path / "t").read_bytes() == whole + b"half a record"
    assert subprocess.run(command, timeout=600, check=False).returncode == 0
    check(Reader(tmp_path / "t"), 1)


def test_a_changed_environment_is_told(tmp_path: Path) -> None:
    written(tmp_path / "t", HEADER, 2)
    now = Header(2, 3, HEADER.run, {"threads": 4, "torch": "2.8", "cpu": "AVX2"})
    with Trajectory(tmp_path / "t", now) as log:
        assert log.changes == [("cpu", None, "AVX2"), ("threads", 2, 4)]


@pytest.mark.parametrize(
    "change",
    [
        lambda terms: terms[:-1],
        lambda terms: [*terms, terms[0]],
        lambda terms: terms[::-1],
        lambda terms: [terms[0], terms[1]._replace(decay=0.5), *terms[2:]],
        lambda terms: [terms[0]._replace(step=9), *terms[1:]],
    ],
)
def test_terms_that_the_format_cannot_hold_are_refused(tmp_path: Path, change: Any) -> None:
    with Trajectory(tmp_path / "t", HEADER) as log:
        for step in range(3):
            loss, gradients, terms = made_up(HEADER, step)
            if step == 2:
                with pytest.raises(ValueError, match="Step 2 must apply the 2 directions of each of its last 3 steps"):
                    log.append(loss, gradients, change(terms))
            log.append(loss, gradients, terms)
    check(Reader(tmp_path / "t"), 3)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    import resource

    size = len(written(tmp_path / "t", HEADER, 4))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Trajectory(tmp_path / "t", HEADER) as log:
        try:
            for room in (0, 1, HEADER.size(4) - 1):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
                with pytest.raises(OSError, match=r"File too large|No space left"):
                    log.append(*made_up(HEADER, 4))
                assert (tmp_path / "t").stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        log.append(*made_up(HEADER, 4))
    check(Reader(tmp_path / "t"), 5)


def test_the_disk_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(os, "fsync", told.append)
    with Trajectory(tmp_path / "t", HEADER, sync_seconds=0) as log:
        told.clear()
        log.append(*made_up(HEADER, 0))
        assert len(told) == 1
        log.sync_seconds = 1e9
        log.append(*made_up(HEADER, 1))
        assert len(told) == 1
    assert len(told) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_instant_it_goes_on_to_the_same_file(tmp_path: Path) -> None:
    path, steps, kills, dice = tmp_path / "t", 0, 0, random.Random(0)
    while kills < 25 or (steps <= 25 and kills < 1000):  # on a crowded machine a child gets little done
        kills += 1
        child = os.fork()
        if child == 0:
            try:
                written(path, HEADER, 1 << 30)
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.002, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            reader = Reader(path)
            assert reader.steps >= steps
            steps = reader.steps
    assert steps > 25
    assert written(path, HEADER, steps + 1) == written(tmp_path / "never", HEADER, steps + 1)


class Small:
    """An engine with nothing but parameters: two matrices of low rank, a dense bf16 weight."""

    def __init__(self) -> None:
        self.steps, self.calls = 0, 0
        self.signs = Signs([1, 2], 2, [9, 5])
        self.factors, self.weight = torch.zeros(6, 14), torch.ones(3, 7, dtype=torch.bfloat16)
        self.low = torch.zeros(3, 7, dtype=torch.int16)
        self.seen = torch.zeros(2)

    def catch_up(self, records: Sequence[tuple[np.ndarray, Sequence[Term]]]) -> None:
        terms = [(t.step, t.query, t.coefficient, t.decay, t.step % 3) for _, step in records for t in step]
        self.signs.accumulate_many_(self.factors, make_terms(terms))
        accumulate_many_(self.weight, 3, make_terms(terms), kind="gaussian", remainder=self.low)
        for gradients, _ in records:
            self.seen = self.seen * 0.9 + torch.from_numpy(gradients)
        self.steps, self.calls = self.steps + len(records), self.calls + 1

    def state(self) -> dict[str, torch.Tensor]:
        return {"factors": self.factors, "weight": self.weight, "low": self.low, "seen": self.seen}

    def load(self, step: int, state: dict[str, torch.Tensor]) -> Small:
        self.steps = step
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        return self


def trained(steps: int) -> Small:
    engine = Small()
    for step in range(steps):
        _, gradients, terms = made_up(HEADER, step)
        engine.catch_up([(gradients, terms)])
    return engine


@pytest.mark.parametrize(("at_once", "calls"), [(1, 40), (50, 5), (1 << 16, 1)])
def test_replay_to_any_step_gives_the_same_bits(tmp_path: Path, at_once: int, calls: int) -> None:
    written(tmp_path / "t", HEADER, 40)
    reader = Reader(tmp_path / "t")
    for steps in (0, 1, 17, 40):
        engine = Small()
        replay(engine, reader.records(stop=steps), at_once=at_once)
        assert engine.steps == steps
        assert digest(engine.state()) == digest(trained(steps).state())
    assert engine.calls == calls


def test_replay_goes_on_from_where_the_engine_is(tmp_path: Path) -> None:
    written(tmp_path / "t", HEADER, 20)
    reader, engine = Reader(tmp_path / "t"), trained(8)
    replay(engine, reader.records())
    assert digest(engine.state()) == digest(trained(20).state())
    with pytest.raises(ValueError, match="Received step 9 after 8 finished steps"):
        replay(trained(8), reader.records(9))


def test_a_digest_sees_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3), "c": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.tensor(1.0)},
        {"a": -torch.zeros(2, 3), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({digest(tensors) for tensors in (base, *others)}) == 6
    assert digest(base) == digest({"b": torch.tensor(1.0), "a": torch.zeros(3, 2).t()})
