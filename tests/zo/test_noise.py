"""What every bit of noise is: known answers, independence, and nothing that depends on the machine."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefork.zo.kernels import draw
from tunefork.zo.kernels.reference import philox
from tunefork.zo.noise import KINDS, PHILOX_MULTIPLIERS, PHILOX_WEYL, TABLE, Kind, Stream, normal_table, stream_key

TABLE_SHA256 = "87d2297bd6f503ad9b582cb87a6d8d21e20633747144ac688b90f4efcde6a2e8"


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    first = signed(counter[0] | counter[1] << 32)
    found = philox(key[0] | key[1] << 32, first, 1, counter[2], counter[3], torch.device("cpu"))
    assert tuple(found[0].tolist()) == words


def plain_words(stream: Stream, count: int) -> list[int]:
    """Philox4x32-10 in Python's integers, as the definition has it."""
    words: list[int] = []
    for block in range(-(-count // 4)):
        a, b, c, d = block % 2**32, block >> 32, stream.step, stream.query
        low, high = stream.key % 2**32, stream.key >> 32
        for _ in range(10):
            p, q = a * PHILOX_MULTIPLIERS[0], c * PHILOX_MULTIPLIERS[1]
            a, b, c, d = (q >> 32) ^ b ^ low, q % 2**32, (p >> 32) ^ d ^ high, p % 2**32
            low, high = (low + PHILOX_WEYL[0]) % 2**32, (high + PHILOX_WEYL[1]) % 2**32
        words += [a, b, c, d]
    return words[:count]


streams = st.builds(Stream, st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1), query=st.integers(0, 2**32 - 1))


@settings(deadline=None)
@given(streams, st.integers(1, 300))
def test_a_sign_is_a_bit_of_its_word(stream: Stream, size: int) -> None:
    words = plain_words(stream, -(-size // 32))
    expected = [1.0 if words[e // 32] >> (e % 32) & 1 else -1.0 for e in range(size)]
    assert draw(stream, (size,)).tolist() == expected


@settings(deadline=None)
@given(streams, st.integers(1, 40))
def test_a_gaussian_is_an_entry_of_the_table(stream: Stream, size: int) -> None:
    words, table = plain_words(stream, -(-size // 2)), normal_table()
    expected = [float(table[(words[e // 2] >> (16 * (e % 2)) & 0xFFFF) >> 4]) for e in range(size)]
    assert draw(stream, (size,), kind="gaussian").tolist() == expected


def test_our_draws_never_change() -> None:
    stream = Stream(stream_key(0, "model.layers.0.mlp.up_proj.weight", "direction"), step=5, query=2)
    assert stream.key == 0x1B9DB12F89C67C3C
    assert (
        "".join("+" if sign > 0 else "-" for sign in draw(stream, (32,)).tolist()) == "+--+++-++++--+---+++---+-++-+++-"
    )
    assert [value.hex() for value in draw(stream, (3,), kind="gaussian").tolist()] == [
        "-0x1.03c6a20000000p+0",
        "-0x1.7c5c600000000p-4",
        "-0x1.730c620000000p-7",
    ]


def test_the_normal_table() -> None:
    table = normal_table()
    assert table.dtype == np.float32
    assert table.shape == (TABLE,)
    assert hashlib.sha256(table.tobytes()).hexdigest() == TABLE_SHA256
    wide = table.astype(np.float64)
    assert (np.diff(wide) > 0).all()
    assert (table == -table[::-1]).all()
    assert wide.var() == pytest.approx(1, abs=1e-8)
    assert (wide**4).mean() == pytest.approx(2.9915, abs=1e-4)


def test_no_entry_of_the_table_hangs_on_the_last_bits_of_a_logarithm() -> None:
    """A relative change of 2e-13, thousands of times what libms differ by, moves no entry to another fp32 number."""
    from statistics import NormalDist

    upper = np.array([NormalDist().inv_cdf((i + 0.5) / TABLE) for i in range(TABLE // 2, TABLE)])
    exact = upper / math.sqrt(math.fsum(upper * upper) / len(upper))
    for change in (1 - 2e-13, 1 + 2e-13):
        assert ((exact * change).astype(np.float32) == normal_table()[TABLE // 2 :]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_independent(kind: Kind) -> None:
    """Names, purposes, steps, queries and seeds that differ by one: no two of the noises are correlated."""
    name = "model.layers.{}.self_attn.q_proj.weight"
    keys = [stream_key(s, name.format(i), p) for s in (0, 1) for i in (0, 1) for p in ("direction", "basis")]
    found = [Stream(key, step, query) for key in keys for step in (0, 1) for query in (0, 1)]
    size = 1 << 14
    noise = torch.stack([draw(stream, (128, 128), kind=kind).view(-1) for stream in found])
    correlation = (noise @ noise.T / size - torch.eye(len(found))).abs()
    assert correlation.max() < 5 / math.sqrt(size)
    assert noise.mean(1).abs().max() < 5 / math.sqrt(size)
    # nor is one a shifted copy of another: the first words are found nowhere else
    starts = {tuple(row[:64].tolist()) for row in noise}
    assert len(starts) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_elements_are_independent(kind: Kind) -> None:
    noise = draw(Stream(stream_key(3, "w", "direction"), 7), (1 << 16,), kind=kind)
    for lag in (1, 2, 4, 8, 31, 32, 33, 128, 256):
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < 5 / 256, lag


def test_a_key_depends_on_every_part_and_on_where_it_ends() -> None:
    keys = {
        stream_key(seed, name, purpose)
        for seed in (0, 1, -1, 2**70)
        for name, purpose in (("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("a,1:b", "c"))
    }
    assert len(keys) == 20
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_not_touched(kind: Kind) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())
    draw(Stream(1), (1000,), kind=kind)
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == str(np.random.get_state())
