"""Real files: every one is read, and the check finds what is known about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunefork.data import Item, apply_layout, check_items, detect_layout, label_text, load_splits, read_rows
from tunefork.recipe import DataSection


@pytest.mark.slow
@pytest.mark.shared
def test_every_file_is_read_whole(shared: Path) -> None:
    for path in sorted((shared / "data").rglob("*.jsonl")):
        count = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        rows, findings = read_rows(path)
        assert (len(rows), findings) == (count, []), path
        laid_out, findings = apply_layout(rows, detect_layout(rows), {})
        assert len(laid_out) + sum(f.count for f in findings if f.level == "warning") == count, path
        json.dumps([dict(r.values) for r in laid_out[:3]])


@pytest.mark.shared
@pytest.mark.parametrize(("name", "shared_texts"), [("trec", 10), pytest.param("sst2", 1, marks=pytest.mark.slow)])
def test_known_leaks_are_found(shared: Path, name: str, shared_texts: int) -> None:
    """SST-2 shares 1 sentence between train and test; TREC 10 questions when all of train is looked at."""
    folder = shared / "data" / name
    section = DataSection(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"))
    whole = (
        section.model_copy(update={"dev": str(folder / "dev.jsonl")}) if (folder / "dev.jsonl").exists() else section
    )
    splits, _ = load_splits(whole, 0, lambda row: label_text(row.values["label"]))
    train, test = (
        [Item(r.source, r.values["text"], label_text(r.values["label"])) for r in part]
        for part in ([*splits.train, *([] if whole.dev else splits.dev)], splits.test)
    )
    findings = check_items(train, [], test, section, labels_expected=True)
    assert {f.code: f.count for f in findings if f.split == "test"}["leaked-exact"] == shared_texts
    assert not [f for f in findings if f.level == "error"]
