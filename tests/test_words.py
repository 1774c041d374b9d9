"""Numbers and texts as the report writes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefork import words
from tunefork.report.figures import smoothed


@pytest.mark.parametrize(
    ("value", "signed", "said"),
    [
        (0.8614, False, "0.861"),
        (-0.02, False, "−0.020"),
        (0.02, True, "+0.020"),
        (-0.0001, True, "0.000"),
        (None, False, "–"),
    ],
)
def test_decimals(value: float | None, signed: bool, said: str) -> None:
    assert words.decimal(value, signed) == said


@pytest.mark.parametrize(
    ("adapter", "method", "said"),
    [
        ("none", "backprop", "full fine-tuning"),
        ("none", "zo", "zeroth-order training"),
        ("lora", "zo", "LoRA with zo"),
        ("lora", "backprop", "LoRA"),
    ],
)
def test_what_was_trained_in_a_word(adapter: str, method: str, said: str) -> None:
    assert words.system_name({"adapter": {"name": adapter}, "train": {"method": method}}) == said


def test_a_dash_never_meets_a_minus() -> None:
    assert words.interval(0.1, 0.2) == "0.100–0.200"
    assert words.interval(-0.1, 0.2) == "−0.100 to 0.200"
    assert words.interval(-0.2, -0.1) == "−0.200 to −0.100"
    assert words.interval(None, 0.2) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.21, "4.2 s"), (42, "42 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_sizes() -> None:
    assert [words.size(n) for n in (512, 2048, 3 * 2**20, 1.5 * 2**30, None)] == [
        "512 B",
        "2 KiB",
        "3 MiB",
        "1.50 GiB",
        "not measured",
    ]


def test_probabilities() -> None:
    assert [words.probability(p) for p in (0.0005, 0.0123, 0.5, 1.0)] == [
        "p < 0.001",
        "p = 0.012",
        "p = 0.50",
        "p = 1.00",
    ]


@given(st.text(max_size=400), st.integers(20, 200))
def test_a_trimmed_text_is_short_and_begins_as_the_whole(text: str, most: int) -> None:
    trimmed = words.trimmed(text, most)
    assert len(trimmed) <= most + 1
    whole = words.trimmed(text, 10_000)
    assert whole == trimmed or (trimmed.endswith("\u00a0…") and whole.startswith(trimmed[:-2]))
    trimmed.encode("utf-8")  # no lone surrogate


def test_a_text_is_not_cut_inside_a_joined_emoji_or_an_accent() -> None:
    family = "👩\u200d👩\u200d👧"
    for most in range(20, 40):
        kept = words.trimmed(family * 20, most).removesuffix("\u00a0…")
        assert kept == family * (len(kept) // len(family))
        assert not words.trimmed("e\u0301" * 60, most).removesuffix("\u00a0…").endswith("e")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=60), st.integers(1, 9))
def test_smoothing_stays_within_the_values_and_keeps_a_line(values: list[float], radius: int) -> None:
    smooth = smoothed(np.array(values), radius)
    assert min(values) - 1e-9 <= smooth.min()
    assert smooth.max() <= max(values) + 1e-9
    line = np.arange(len(values), dtype=np.float64) * 0.5
    assert np.allclose(smoothed(line, radius), line)


def test_smoothing_leaves_out_what_is_not_known() -> None:
    smooth = smoothed(np.array([1.0, np.nan, 3.0]), 1)
    assert smooth.tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(smoothed(np.array([np.nan]), 3)).all()
