"""The kernels: one meaning on every path, any number of threads, and rounding that is what it says."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import tunefork
from tunefork.zo import kernels
from tunefork.zo.kernels import Signs, accumulate_, accumulate_many_, draw, draw_many, exact, perturbed, reference
from tunefork.zo.noise import KINDS, Kind, Stream, make_counters, make_terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (31,), (33, 5), (4096,), (3, 1367), (257, 129))
TERMS = make_terms([(1, 0, 0.3, 1, 0), (2, 0, -0.03, 0.99, 1), (2, 1, -1e-5, 1, 1), (9, 4, 1e-4, 0.5, 0)])


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of many magnitudes, subnormal fp16 ones included."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.empty(shape).uniform_(-7, 3, generator=generator)
    return (torch.randn(shape, generator=generator) * size).clamp(-6e4, 6e4).to(dtype)


def value(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight and its remainder after one update."""
    weight = random_values(shape, dtype, seed)
    low = None if dtype == torch.float32 else torch.zeros(shape, dtype=torch.int16)
    return accumulate_(weight, Stream(seed), 1e-3, kind="gaussian", remainder=low), low


@pytest.fixture
def fast() -> ModuleType:
    pytest.importorskip("numba")
    from tunefork.zo.kernels import cpu

    return cpu


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where numba is not installed."""
    monkeypatch.setattr(kernels, "have_numba", lambda: False)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def everything(kind: Kind, dtype: torch.dtype, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Bit patterns of all that the kernels do to a tensor."""
    stream = Stream(2**63 + 11, 3, 2**32 - 1)
    weight, low = value(shape, dtype, 1)
    found = [draw(stream, shape, kind=kind, dtype=dtype, scale=0.3)]
    found.append(draw_many(5, make_counters([(0, 1), (7, 0), (2**32 - 1, 2)]), shape, kind=kind, dtype=dtype))
    found.append(perturbed(weight, stream, -1e-3, kind=kind, out=torch.empty_like(weight)))
    if low is None:
        found.append(accumulate_many_(weight.clone(), 17, TERMS, kind=kind))
    else:
        found.append(perturbed(weight, stream, 1e-3, kind=kind, out=torch.empty_like(weight), remainder=low))
        found += [weight.clone(), low.clone()]
        accumulate_many_(found[-2], 17, TERMS, kind=kind, remainder=found[-1])
    return [bits(tensor) for tensor in found]


@pytest.mark.parametrize(("kind", "dtype", "shape"), itertools.product(KINDS, DTYPES, SHAPES))
def test_numba_and_torch_give_the_same_bits(
    kind: Kind, dtype: torch.dtype, shape: tuple[int, ...], fast: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = everything(kind, dtype, shape)
    monkeypatch.setattr(kernels, "have_numba", lambda: False)
    monkeypatch.setattr(reference, "_CHUNK", 1024)  # and in pieces
    for ours, theirs in zip(found, everything(kind, dtype, shape), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "dtype"), itertools.product(KINDS, DTYPES))
def test_any_number_of_threads_gives_the_same_bits(
    kind: Kind, dtype: torch.dtype, fast: ModuleType, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (5 * 4096 + 77,)
    threads(1)
    one = everything(kind, dtype, shape)
    monkeypatch.setattr(fast, "_SERIAL", 0)
    for number in (2, 3, 8):
        threads(number)
        for ours, theirs in zip(one, everything(kind, dtype, shape), strict=True):
            assert torch.equal(ours, theirs), number


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_patterns_are_read_and_rounded_as_torch_does(dtype: torch.dtype, fast: ModuleType) -> None:
    """Every 16-bit number, and fp32 numbers at and beside every rounding border."""
    zero = Stream(0)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    every = every[torch.isfinite(every)]
    assert torch.equal(bits(perturbed(every, zero, 0.0, out=torch.empty_like(every)).abs()), bits(every.abs()))
    wide = every.float().sort().values
    border = (wide[1:] + wide[:-1]) / 2
    values = torch.cat([border, border * (1 + 2**-23), border * (1 - 2**-23)])
    for value in (*values[::4001].tolist(), 2**-24, 2**-25, 3 * 2**-26, 65519.0, 65520.0, 1e38):
        drawn = draw(zero, (1,), dtype=dtype, scale=value)
        assert torch.equal(bits(drawn), bits((draw(zero, (1,)) * value).to(dtype))), value


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_is_the_fp32_sum_and_leaves_the_weight(kind: Kind) -> None:
    weight, stream = random_values((40, 50), torch.float32, 3), Stream(4, 5, 6)
    before = weight.clone()
    probe = perturbed(weight, stream, 1e-3, kind=kind, out=torch.empty_like(weight))
    noise = draw(stream, (40, 50), kind=kind)
    assert torch.equal(weight, before)
    assert torch.equal(probe, weight + noise * torch.tensor(1e-3))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(0, 3),
            st.floats(-1, 1, width=32),
            st.sampled_from((1.0, 0.75, 0.999)),
            st.integers(0, 2),
        ),
        max_size=6,
    ),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
)
def test_one_sweep_equals_one_by_one(
    terms: list[tuple[int, int, float, float, int]], kind: Kind, dtype: torch.dtype
) -> None:
    target, low = value((7, 61), dtype, 4)
    one, one_low = target.clone(), None if low is None else low.clone()
    accumulate_many_(target, 9, make_terms(terms), kind=kind, remainder=low)
    for step, query, coefficient, decay, _ in terms:
        accumulate_(one, Stream(9, step, query), coefficient, kind=kind, remainder=one_low, decay=decay)
    assert torch.equal(bits(target), bits(one))
    if low is not None and one_low is not None:
        assert torch.equal(bits(low), bits(one_low))


def test_the_order_of_decay_and_addition() -> None:
    """The value decays first: what a step adds is not decayed by that step."""
    value = accumulate_(torch.full((64,), 2.0), Stream(1), 0.25, decay=0.5)
    assert torch.equal(value, 1 + 0.25 * draw(Stream(1), (64,)))


def test_a_bf16_weight_and_its_remainder_are_an_fp32_number() -> None:
    """1,000 steps that bf16 alone would round away, and decay: bit for bit what an fp32 weight learns."""
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    wide, low = weight.float(), torch.zeros((64, 64), dtype=torch.int16)
    terms = make_terms((step, 0, 1e-7, 1 - 1e-6, 0) for step in range(1000))
    before = wide.clone()
    accumulate_many_(wide, 5, terms)
    accumulate_many_(weight, 5, terms, remainder=low)
    assert not torch.equal(before, wide)
    assert torch.equal(exact(weight, low), wide)
    assert torch.equal(weight, wide.bfloat16())
    probe = perturbed(weight, Stream(5), 1e-3, out=torch.empty_like(weight), remainder=low)
    assert torch.equal(probe, (wide + 1e-3 * draw(Stream(5), (64, 64))).bfloat16())


def test_an_fp16_weight_and_its_remainder_learn_what_fp32_learns() -> None:
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    wide, low = weight.float(), torch.zeros((64, 64), dtype=torch.int16)
    before = wide.clone()
    terms = make_terms((step, 0, 1e-7, 1.0, 0) for step in range(1000))
    accumulate_many_(wide, 5, terms)
    accumulate_many_(weight, 5, terms, remainder=low)
    value = exact(weight, low)
    large = before.abs() > 1e-4
    assert torch.equal(value[large], wide[large])
    assert torch.nn.functional.cosine_similarity((value - before).view(-1), (wide - before).view(-1), dim=0) > 0.99
    assert torch.equal(weight, value.half())


def test_tensors_that_are_not_contiguous() -> None:
    wide = random_values((30, 20), torch.float32, 6)
    plain = wide.t().contiguous()
    accumulate_many_(wide.t(), 3, TERMS)
    assert torch.equal(accumulate_many_(plain, 3, TERMS), wide.t())
    out = torch.empty_like(plain)
    assert torch.equal(perturbed(wide.t(), Stream(3), 0.1, out=out), perturbed(plain, Stream(3), 0.1, out=out.clone()))


def test_a_parameter_that_asks_for_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10))
    accumulate_(parameter, Stream(1), 1.0)
    assert torch.equal(parameter.detach(), draw(Stream(1), (10,)))


@pytest.mark.parametrize("numba", (True, False))
def test_signs_of_many_matrices(numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if numba:
        pytest.importorskip("numba")
    monkeypatch.setattr(kernels, "have_numba", lambda: numba)
    keys, sizes, rank = [7, 2**64 - 1, 9], [33, 8, 130], 4
    signs = Signs(keys, rank, sizes)
    monkeypatch.setattr(reference, "_SIGNS", 1024)
    drawn = signs.draw_(5, torch.empty((3, rank, sum(sizes)), dtype=torch.int8))
    for query, found in enumerate(drawn):
        expected = [draw(Stream(key, 5, query), (rank, size)) for key, size in zip(keys, sizes, strict=True)]
        assert torch.equal(found.float(), torch.cat(expected, 1))

    factors = random_values((2 * rank, sum(sizes)), torch.float32, 7)
    one = factors.clone()
    signs.accumulate_many_(factors, TERMS)
    for step, query, coefficient, decay, block in TERMS.tolist():
        one *= decay
        drawn = signs.draw_(step, torch.empty((query + 1, rank, sum(sizes)), dtype=torch.int8))
        one[block * rank : (block + 1) * rank] += drawn[query] * torch.tensor(coefficient)
    assert torch.equal(bits(factors), bits(one))


def test_signs_on_threads(fast: ModuleType, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_SERIAL", 0)
    signs = Signs(list(range(5)), 4, [8, 100, 3, 64, 40])
    found = []
    for number in (1, 2, 4):
        threads(number)
        drawn = signs.draw_(1, torch.empty((2, 4, 215), dtype=torch.int8))
        found.append((drawn, signs.accumulate_many_(torch.zeros(8, 215), TERMS)))
    for drawn, factors in found[1:]:
        assert torch.equal(drawn, found[0][0])
        assert torch.equal(factors, found[0][1])


def test_tensors_without_memory_are_left_alone() -> None:
    """A forecast runs the training code on them."""
    with FakeTensorMode():
        weight, low = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.int16)
        assert draw(Stream(1), (3, 4)).shape == (3, 4)
        assert perturbed(weight, Stream(1), 1.0, out=torch.empty_like(weight)).dtype == torch.bfloat16
        assert accumulate_many_(weight.t(), 1, TERMS, remainder=low.t()).shape == (4, 3)
        signs = Signs([1], 3, [4])
        assert signs.draw_(0, torch.empty((2, 3, 4), dtype=torch.int8)).shape == (2, 3, 4)
        assert signs.accumulate_many_(torch.zeros(6, 4), TERMS).shape == (6, 4)


def test_a_fork_can_use_the_kernels(fast: ModuleType, threads: Callable[[int], None]) -> None:
    """The parent's threads do not exist in a fork."""
    if sys.platform != "linux":
        pytest.skip("forks")
    threads(2)
    target = accumulate_(torch.zeros(1 << 18), Stream(1), 1.0)
    child = os.fork()
    if child == 0:
        right = False
        try:
            accumulate_(target, Stream(1), 1.0)
            right = bool((np.abs(target.numpy()) == 2).all())  # in numpy: torch's own threads do not survive a fork
        finally:
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_kernels_work_where_nothing_can_be_written(fast: ModuleType, tmp_path: Path) -> None:
    """numba then has no folder for what it compiled."""
    copy = tmp_path / "site" / "tunefork"
    shutil.copytree(Path(tunefork.__file__).parent, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (copy / "zo" / "kernels" / "__pycache__").write_text("a file where the folder would be")
    script = (
        "from tunefork.zo import kernels; from tunefork.zo.noise import Stream;"
        f"assert kernels.__file__.startswith('{tmp_path}'); print(int(kernels.draw(Stream(1), (99,)).abs().sum()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "99", done.stderr


REFUSED = [
    (lambda: draw(Stream(1), (2,), kind="uniform"), "`kind` must be one of"),  # pyright: ignore[reportArgumentType]
    (lambda: draw(Stream(1), (2,), dtype=torch.float64), "fp32, bf16 or fp16"),
    (lambda: draw(Stream(1), (2,), out=torch.zeros(3)), "`out` must have the shape"),
    (lambda: perturbed(torch.zeros(2), Stream(1), 1, out=torch.zeros(2).half()), "`out` must have the shape, dtype"),
    (lambda: accumulate_(torch.zeros(2).half(), Stream(1), 1), "`remainder` must be given for a target"),
    (
        lambda: accumulate_(torch.zeros(2), Stream(1), 1, remainder=torch.zeros(2)),
        "must be int16, beside a bf16 or fp16",
    ),
    (
        lambda: accumulate_(torch.zeros(2).half(), Stream(1), 1, remainder=torch.zeros(3, dtype=torch.int16)),
        "must have the tensor's shape",
    ),
    (lambda: accumulate_many_(torch.zeros(2), 1, np.zeros(2)), "`noise.TERM`"),
    (lambda: Signs([1], 4, [8]).draw_(0, torch.zeros(1, 4, 8)), "contiguous int8"),
    (lambda: Signs([1], 4, [8]).accumulate_many_(torch.zeros(6, 8), TERMS), "a multiple of 4 rows"),
    (lambda: Signs([1], 4, [8]).accumulate_many_(torch.zeros(4, 8), TERMS), "block must be below 1"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_what_cannot_be_meant_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
