"""Splits: exact partitions, stratified, in whole groups, the same every time; and what is said about them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_text_files import found, written
from tunefork.data import Row, Splits, label_text, load_splits, normalised_form
from tunefork.data.split import draw, draw_groups, shuffled
from tunefork.errors import DataError
from tunefork.recipe import DataSection

LABELS = st.lists(st.sampled_from("aaabbc"), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**31 - 1)


@given(LABELS, st.floats(0, 1), SEEDS)
def test_a_draw_is_exact_and_within_one_row_of_each_share(labels: list[str], share: float, seed: int) -> None:
    size = round(share * len(labels))
    taken = draw(labels, size, seed, "test")
    assert len(taken) == size == len(set(taken))
    assert taken == sorted(taken) == draw(labels, size, seed, "test")
    counts = Counter(labels[i] for i in taken)
    for label, count in Counter(labels).items():
        assert abs(counts[label] - size * count / len(labels)) < 1


@given(st.lists(st.tuples(st.sampled_from("aab"), st.integers(0, 30)), min_size=8, max_size=60), SEEDS)
def test_a_draw_of_sets_parts_none_and_is_near(pairs: list[tuple[str, int]], seed: int) -> None:
    together = [number for _, number in pairs]
    labels = [dict(reversed([(n, label) for label, n in pairs]))[number] for number in together]  # the first one's
    size = round(0.3 * len(pairs))
    taken = draw(labels, size, seed, "test", together=together)
    inside, outside = ({together[i] for i in part} for part in (taken, set(range(len(pairs))) - set(taken)))
    assert not inside & outside
    largest = max(Counter(together).values())
    assert abs(len(taken) - size) <= largest * len(set(labels))


@given(LABELS, st.floats(0, 1), SEEDS)
def test_a_draw_that_leaves_one_leaves_one(labels: list[str], share: float, seed: int) -> None:
    size = round(share * len(labels))
    taken = draw(labels, size, seed, "test", leave_one=True)
    left = Counter(labels) - Counter(labels[i] for i in taken)
    assert set(left) == set(labels)
    counts = Counter(labels[i] for i in taken)
    assert all(abs(counts[c] - size * n / len(labels)) <= 1 for c, n in Counter(labels).items())


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 8)), min_size=1, max_size=60), st.floats(0, 0.8), SEEDS)
def test_groups_are_never_parted(pairs: list[tuple[str, int]], share: float, seed: int) -> None:
    labels, groups = [p[0] for p in pairs], [p[1] for p in pairs]
    taken = set(draw_groups(labels, groups, round(share * len(pairs)), seed, "test"))
    inside, outside = {groups[i] for i in taken}, {g for i, g in enumerate(groups) if i not in taken}
    assert not inside & outside
    if len(set(groups)) > 1:
        assert inside
        assert outside


def test_groups_are_about_stratified() -> None:
    source = random.Random(1)
    sizes = [source.randint(1, 6) for _ in range(200)]
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    labels = [source.choice("aaab") for _ in groups]
    taken = draw_groups(labels, groups, round(0.2 * len(groups)), 0, "test")
    assert abs(len(taken) / len(groups) - 0.2) < 0.01
    share = Counter(labels)["b"] / len(labels)
    assert abs(sum(labels[i] == "b" for i in taken) / len(taken) - share) < 0.01


def test_the_order_is_known_and_leaves_the_global_generator_alone() -> None:
    random.seed(5)
    before = random.getstate()
    assert shuffled(range(8), 0, "test") == [4, 7, 0, 3, 5, 6, 2, 1]
    assert shuffled(range(8), 1, "test") != shuffled(range(8), 0, "test") != shuffled(range(8), 0, "dev")
    assert random.getstate() == before


def label_of(row: Row) -> str | None:
    return label_text(row.values.get("label"))


def table(folder: Path, count: int, name: str = "train.jsonl", **columns: Any) -> str:
    """`count` rows with a text, a label (three in four are 0) and what `columns` gives for each number."""
    lines = [
        json.dumps({"text": f"{name} {i}", "label": int(i % 4 == 3)} | {key: give(i) for key, give in columns.items()})
        for i in range(count)
    ]
    return str(written(folder, name, "\n".join(lines)))


def lines(splits: Splits) -> tuple[list[int], list[int], list[int]]:
    return tuple([r.line for r in part] for part in (splits.train, splits.dev, splits.test))  # type: ignore[return-value]


def test_dev_and_test_are_carved_from_train(tmp_path: Path) -> None:
    path = table(tmp_path, 100)
    splits, findings = load_splits(DataSection(train=path), 0, label_of)
    train, dev, test = lines(splits)
    assert (len(train), len(dev), len(test)) == (70, 10, 20)
    assert sorted(train + dev + test) == list(range(1, 101))
    assert Counter(label_of(r) for r in splits.test) == {"0": 15, "1": 5}
    assert splits.origin["test"].startswith(f"20 rows carved from {path} at random, stratified by label (seed 0")
    assert "100 rows, of which 20 rows to test and 10 rows to dev; 70 left" in splits.origin["train"]
    assert findings == []
    assert lines(load_splits(DataSection(train=path), 0, label_of)[0]) == (train, dev, test)
    assert lines(load_splits(DataSection(train=path), 1, label_of)[0]) != (train, dev, test)


def test_given_files_are_left_whole(tmp_path: Path) -> None:
    section = DataSection(
        train=table(tmp_path, 20), dev=table(tmp_path, 5, "dev.jsonl"), test=table(tmp_path, 6, "test.jsonl")
    )
    splits, _ = load_splits(section, 0, label_of)
    assert [len(part) for part in lines(splits)] == [20, 5, 6]


def test_no_test_is_carved_when_its_fraction_is_nought(tmp_path: Path) -> None:
    splits, _ = load_splits(DataSection(train=table(tmp_path, 20), test_fraction=0), 0, None)
    assert [len(part) for part in lines(splits)] == [18, 2, 0]
    assert splits.origin["test"].startswith("none")


def test_a_test_file_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    splits, _ = load_splits(DataSection(test=table(tmp_path, 6, "test.jsonl")), 0, None)
    assert [len(part) for part in lines(splits)] == [0, 0, 6]


def test_row_limits_are_stratified_and_said(tmp_path: Path) -> None:
    splits, _ = load_splits(DataSection(train=table(tmp_path, 200), train_rows=16, test_rows=8), 0, label_of)
    assert Counter(label_of(r) for r in splits.train) == {"0": 12, "1": 4}
    assert Counter(label_of(r) for r in splits.test) == {"0": 6, "1": 2}
    assert "16 of them drawn (data.train_rows)" in splits.origin["train"]
    more, _ = load_splits(DataSection(train=table(tmp_path, 200), train_rows=1000), 0, label_of)
    assert len(more.train) == 140


def test_groups_stay_together_when_carved(tmp_path: Path) -> None:
    path = table(tmp_path, 120, who=lambda i: f"author {i // 5}")
    splits, findings = load_splits(DataSection(train=path, group_field="who"), 3, label_of)
    authors = [{r.values["who"] for r in part} for part in (splits.train, splits.dev, splits.test)]
    assert not (authors[0] & authors[1] or authors[0] & authors[2] or authors[1] & authors[2])
    assert all(authors)
    assert "in whole groups of `who`" in splits.origin["test"]
    assert findings == []


def test_rows_without_a_group_are_said(tmp_path: Path) -> None:
    path = table(tmp_path, 40, who=lambda i: None if i < 3 else i // 4)
    _, findings = load_splits(DataSection(train=path, group_field="who"), 0, None)
    assert found(findings, "no-group").count == 3


def test_a_group_in_two_files_is_an_error(tmp_path: Path) -> None:
    train, test = table(tmp_path, 20, who=lambda i: i // 4), table(tmp_path, 4, "test.jsonl", who=lambda i: i + 3)
    _, findings = load_splits(DataSection(train=train, test=test, group_field="who"), 0, None)
    crossing = found(findings, "group-in-two-splits")
    assert (crossing.level, crossing.count, crossing.split) == ("error", 2, "test")


def test_a_group_field_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column `lable` \(data\.group_field\).*Did you mean `label`"):
        load_splits(DataSection(train=table(tmp_path, 20), group_field="lable"), 0, None)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rows_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=rf"enough rows to carve .* Received {count} row.*Try more rows"):
        load_splits(DataSection(train=table(tmp_path, count)), 0, None)


def test_three_rows_are_enough(tmp_path: Path) -> None:
    splits, _ = load_splits(DataSection(train=table(tmp_path, 3)), 0, None)
    assert [len(part) for part in lines(splits)] == [1, 1, 1]


def test_one_row_a_label_cannot_be_stratified(tmp_path: Path) -> None:
    path = table(tmp_path, 30, label=lambda i: i)
    with pytest.raises(DataError, match=r"30 rows carry 30 different labels.*text and label swapped"):
        load_splits(DataSection(train=path), 0, label_of)


def texts_of(row: Row) -> list[str]:
    return [row.values["text"]]


@pytest.mark.parametrize("group", [None, "who"])
def test_equal_texts_are_never_parted(tmp_path: Path, group: str | None) -> None:
    """Every eighth text stands there three times, written a little otherwise; the groups alone would part them."""
    forms = [str, str.upper, lambda text: f"{text}!"]
    text = lambda i: forms[i // 50 % 3](f"row {i % 50 if i % 8 == 0 else i}")  # noqa: E731
    path = table(tmp_path, 150, text=text, who=lambda i: i // 2)
    splits, _ = load_splits(DataSection(train=path, group_field=group), 0, label_of, texts_of)
    inside = [{normalised_form(row.values["text"]) for row in part} for part in (splits.train, splits.dev, splits.test)]
    assert not (inside[0] & inside[1] or inside[0] & inside[2] or inside[1] & inside[2])
    assert sum(map(len, lines(splits))) == 150
    assert 10 <= len(splits.dev) <= 20
    assert 25 <= len(splits.test) <= 35
    assert "equal texts together" in splits.origin["test"]


def test_where_all_texts_are_one_the_rows_are_split_all_the_same(tmp_path: Path) -> None:
    splits, _ = load_splits(DataSection(train=table(tmp_path, 20, text=lambda i: "a")), 0, None, texts_of)
    assert [len(part) for part in lines(splits)] == [14, 2, 4]


def test_one_group_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fall into 1 group of `who`"):
        load_splits(DataSection(train=table(tmp_path, 30, who=lambda i: "me"), group_field="who"), 0, None)


def test_fractions_must_leave_something(tmp_path: Path) -> None:
    section = DataSection(train=table(tmp_path, 30), test_fraction=0.7, dev_fraction=0.4)
    with pytest.raises(DataError, match="must leave rows to train on"):
        load_splits(section, 0, None)


def test_a_fraction_of_nothing_leaves_every_row_to_train(tmp_path: Path) -> None:
    section = DataSection(train=table(tmp_path, 30), test_fraction=0, dev_fraction=0)
    splits, _ = load_splits(section, 0, None)
    assert [len(part) for part in lines(splits)] == [30, 0, 0]
    assert splits.origin["dev"] == "none: data.dev_fraction is 0 and no dev file is given"


def test_one_file_for_two_uses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path, 30)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in (path, "train.jsonl", "./train.jsonl", "link.jsonl"):
        with pytest.raises(DataError, match=r"`data\.train` and `data\.test` must be different rows"):
            load_splits(DataSection(train=path, test=other), 0, None)
    with pytest.raises(DataError, match=r"`data\.dev` and `data\.test`"):
        load_splits(DataSection(train=path, dev="hub:a/b@test", test="hub:a/b@test"), 0, None)


def test_no_file_at_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"`data\.train` must name a file"):
        load_splits(DataSection(), 0, None)


def test_few_unusable_rows_are_a_warning_many_an_error(tmp_path: Path) -> None:
    good = "".join(f'{{"text": "row {i}"}}\n' for i in range(98))
    path = str(written(tmp_path, "a.jsonl", good + '{"text": ""}\n{"text":\n'))
    for limit, level in ((0.02, "warning"), (0.019, "error")):
        _, findings = load_splits(DataSection(train=path, max_unusable=limit), 0, None)
        assert {(f.code, f.level, f.split) for f in findings} == {
            ("unreadable-row", level, "train"),
            ("empty-field", level, "train"),
        }
    assert "That is 2.0% of 100 rows; `data.max_unusable` allows 1.9%." in findings[0].advice


def test_a_file_without_a_usable_row_says_why(tmp_path: Path) -> None:
    path = str(written(tmp_path, "a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}'))
    with pytest.raises(DataError, match=r"must hold usable rows. Received none. 1 row left out: no reply.*a\.jsonl:1"):
        load_splits(DataSection(train=path), 0, None)


def test_the_layout_of_train_holds_for_the_other_files(tmp_path: Path) -> None:
    train = written(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b"}\n' * 9)
    test = written(tmp_path, "b.jsonl", '{"instruction": "a", "output": "b"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl` must hold usable rows.*no `prompt`"):
        load_splits(DataSection(train=str(train), test=str(test)), 0, None)
