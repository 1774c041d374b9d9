"""The check over rows as a set: planted faults are found, with their count, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_text_files import found
from tunefork.data import Finding, Item, check_items, label_text, normalised_form
from tunefork.recipe import DataSection

LENIENT = DataSection(max_unusable=1, max_conflicts=1, max_leaked=1)


def items(split: str, *pairs: tuple[str, str | None]) -> list[Item]:
    return [Item(f"{split}.csv:{i}", text, label) for i, (text, label) in enumerate(pairs, 2)]


def varied(split: str, count: int) -> list[tuple[str, str | None]]:
    return [(f"{split} text number {i}", "ab"[i % 2]) for i in range(count)]


def faults(findings: list[Finding]) -> dict[tuple[str, str], int]:
    return {(f.split, f.code): f.count for f in findings if f.level != "info"}


def test_clean_rows_give_only_histograms() -> None:
    findings = check_items(
        items("train", *varied("train", 30)),
        items("dev", *varied("dev", 5)),
        items("test", *varied("test", 6)),
        DataSection(),
        labels_expected=True,
    )
    assert [(f.level, f.code, f.split) for f in findings] == [("info", "labels", s) for s in ("train", "dev", "test")]
    assert findings[1].message == "Labels: a 3 (60.0%), b 2 (40.0%). Always answering `a` is right in 60.0%."


def test_each_planted_fault_is_found() -> None:
    train = items(
        "train", *varied("train", 20), (" ", "a"), ("no label", None), ("Same text", "a"), ("Same  text", "b")
    )
    dev = items("dev", ("train text number 0", "a"), ("dev text", "b"))
    test = items("test", ("TRAIN text, number 1!", "b"), ("dev text", "b"), ("test text", "b"), ("test text", "b"))
    findings = check_items(train, dev, test, LENIENT, labels_expected=True)
    assert faults(findings) == {
        ("train", "empty-text"): 1,
        ("train", "missing-label"): 1,
        ("train", "conflicting-labels"): 2,
        ("dev", "leaked-exact"): 1,
        ("test", "leaked-normalised"): 1,
        ("test", "shared-dev-test"): 1,
        ("test", "duplicate-text"): 1,
        ("test", "one-label"): 4,
    }
    assert found(findings, "conflicting-labels").examples == ("train.csv:24: Same text is a, but b at train.csv:25",)
    assert found(findings, "leaked-normalised").examples == ("test.csv:2: as train.csv:3: TRAIN text, number 1!",)


@pytest.mark.parametrize(
    ("section", "code", "level"),
    [
        (DataSection(max_unusable=0.1), "empty-text", "warning"),
        (DataSection(max_unusable=0.09), "empty-text", "error"),
        (DataSection(max_conflicts=0.2), "conflicting-labels", "warning"),
        (DataSection(max_conflicts=0.19), "conflicting-labels", "error"),
        (DataSection(max_leaked=0.5), "leaked-exact", "warning"),
        (DataSection(max_leaked=0.49), "leaked-exact", "error"),
        (DataSection(max_leaked=0.49), "leaked-normalised", "error"),
    ],
)
def test_thresholds_turn_warnings_into_errors(section: DataSection, code: str, level: str) -> None:
    train = items("train", *varied("train", 7), ("", "a"), ("same", "a"), ("same", "b"))
    test = items("test", ("train text number 0", "a"), ("train text number 1.", "b"), ("c", "a"), ("d", "b"))
    section = section.model_copy(update={"test": "test.csv"})
    finding = found(check_items(train, [], test, section, labels_expected=True), code)
    assert finding.level == level
    assert ("allows" in finding.advice) == (level == "error")


def test_splits_carved_from_one_file_are_judged_as_one() -> None:
    """One bad row of 400 is one of 400, also where it falls into a test split of 80."""
    train, dev = items("train", *varied("train", 280)), items("dev", *varied("dev", 40))
    test = items("test", ("", "a"), *varied("test", 79))
    carved = check_items(train, dev, test, DataSection(train="a.csv"), labels_expected=True)
    assert (found(carved, "empty-text").level, found(carved, "empty-text").split) == ("warning", "test")
    given = check_items(train, dev, test, DataSection(train="a.csv", test="b.csv"), labels_expected=True)
    assert found(given, "empty-text").level == "error"
    assert "1.2% of 80 rows" in found(given, "empty-text").advice


def test_doubtful_labels_are_said() -> None:
    names = ("good", "Good", "GOOD", "bad", "None", "n/a")
    train = items("train", *((f"text {i}", names[i % 6]) for i in range(60)))
    findings = check_items(train, [], [], DataSection(), labels_expected=True)
    similar = found(findings, "similar-labels")
    assert (similar.level, similar.count) == ("warning", 30)
    assert "`GOOD`, `Good`, `good`" in similar.message
    assert "--labels 'GOOD=good,Good=good,good=good,…'" in similar.advice
    assert [f.count for f in findings if f.code == "empty-label"] == [10, 10]
    named = DataSection(labels={name: name for name in (*names, "other")})
    findings = check_items(train, [], [], named, labels_expected=True)
    assert faults(findings) == {("", "absent-label"): 1}
    assert "`other`, which no row carries" in found(findings, "absent-label").message


def test_without_labels_only_texts_are_compared() -> None:
    train = items("train", ("a", None), ("a", None), ("b", "0"), ("b", "1"))
    findings = check_items(train, [], items("test", ("c", "2")), LENIENT, labels_expected=False)
    assert faults(findings) == {("train", "duplicate-text"): 1}


@pytest.mark.parametrize(
    ("section", "level"),
    [(DataSection(), "error"), (DataSection(train_rows=8), "warning"), (DataSection(labels={"2": "c"}), "warning")],
)
def test_a_label_only_in_test(section: DataSection, level: str) -> None:
    train, test = items("train", *varied("train", 8)), items("test", ("x", "a"), ("y", "c"))
    finding = found(check_items(train, [], test, section, labels_expected=True), "unseen-label")
    assert (finding.level, finding.split, finding.count) == (level, "test", 1)
    assert finding.examples == ("test.csv:3: c",)


def test_many_labels_are_shown_in_part() -> None:
    train = items("train", *((f"t{i}", f"label {i % 30:02}") for i in range(90)))
    message = found(check_items(train, [], [], DataSection(), labels_expected=True), "labels").message
    assert "label 09 3 (3.3%), 20 more labels 60 (66.7%)" in message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("ﬁne — café", "Fine - cafe\u0301"),
        ("Straße", "STRASSE"),
        ("zero\u200bwidth", "zerowidth"),
        ("cafe\u00ad\u0301", "café"),
        ("a\u00a0b", "A B."),
    ],
)
def test_same_when_normalised(one: str, other: str) -> None:
    assert normalised_form(one) == normalised_form(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("great 😀", "great 😡"), ("a + b", "a = b"), ("!!!", "???"), ("किताब", "कतब"), ("resume", "résumé")],
)
def test_different_when_normalised(one: str, other: str) -> None:
    assert normalised_form(one) != normalised_form(other)


WORDS = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), min_size=2, max_size=4)
DISGUISES = [str.upper, lambda t: t.replace(" ", ", "), lambda t: f"«{t}»!", lambda t: t.replace(" ", "\u00a0 ")]


@given(st.lists(WORDS, max_size=6), st.lists(st.tuples(st.integers(0, 19), st.sampled_from(DISGUISES)), max_size=6))
def test_planted_leaks_are_found_and_nothing_else(fresh: list[list[str]], planted: list) -> None:
    train = [f"train {i} alpha" for i in range(20)]
    own = [f"test {' '.join(words)}" for words in fresh]
    leaked = [(train[i], disguise(train[i])) for i, disguise in planted]
    test = items("test", *((text, "a") for text in own), *((text, "a") for _, text in leaked))
    findings = check_items(items("train", *((t, "a") for t in train)), [], test, LENIENT, labels_expected=False)
    by_code = {f.code: f.count for f in findings if f.code.startswith("leaked")}
    exact = sum(" ".join(text.split()) == original for original, text in leaked)
    assert by_code.get("leaked-exact", 0) == exact
    assert by_code.get("leaked-normalised", 0) == len(leaked) - exact


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, None),
        (float("nan"), None),
        ("", None),
        (" \t", None),
        ("NaN", None),
        ("#N/A", None),
        (["a"], None),
        ({}, None),
        (1, "1"),
        (1.0, "1"),
        ("1", "1"),
        (" 1.0 ", "1"),
        ("-2.00", "-2"),
        (1.5, "1.5"),
        ("1.5", "1.5"),
        (True, "true"),
        ("TRUE", "true"),
        ("False", "false"),
        (0, "0"),
        (-0.0, "0"),
        ("01", "01"),
        ("None", "None"),
        ("Positive ", "Positive"),
        (float("inf"), "inf"),
    ],
)
def test_label_text(value: object, label: str | None) -> None:
    assert label_text(value) == label
