"""What can be wrong with rows as a set: duplicates, contradictions, leakage, labels that cannot be learned."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from tunefork.data.findings import about_rows, refuse_above, refuse_shares
from tunefork.data.rows import Finding, Item
from tunefork.data.values import counted, listed, shorten
from tunefork.recipe.schema import DataSection

_SHOWN_LABELS = 10
_NO_LABEL = {"none", "null", "nil", "na", "n/a", "<na>", "nat", "undefined", "missing", "-", "?"}


class _Collapse(dict[int, str]):
    """A table for `str.translate`, filled as characters are met: spaces and punctuation to a space.

    Symbols (emoji, +, =) and combining marks stay: they carry meaning.
    """

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        kept = " " if category[0] in "PZ" or category == "Cc" else chr(code)
        self[code] = kept
        return kept


class _Unseen(dict[int, str | None]):
    """The same for characters that show nothing (zero-width spaces, soft hyphens, marks of direction): left out."""

    def __missing__(self, code: int) -> str | None:
        self[code] = kept = None if unicodedata.category(chr(code)) == "Cf" else chr(code)
        return kept


_COLLAPSE, _UNSEEN = _Collapse(), _Unseen()


def plain_form(text: str) -> str:
    """The text with outer spaces taken off and inner ones made one: two rows with one form have the same text."""
    return " ".join(text.split())


def normalised_form(text: str) -> str:
    """NFKC, case folded, runs of spaces and punctuation made one space; the bare text where nothing else is left."""
    if text.isascii():
        folded = text.casefold()
    else:  # the unseen goes first, for it keeps accents from joining their letters; folding may part them again
        seen = text.translate(_UNSEEN)
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())
    return " ".join(folded.translate(_COLLAPSE).split()) or plain_form(folded)


def check_items(
    train: Sequence[Item], dev: Sequence[Item], test: Sequence[Item], section: DataSection, *, labels_expected: bool
) -> list[Finding]:
    """Findings about rows as a set; those beyond the thresholds of `section` are errors.

    Codes: empty-text, missing-label (max_unusable); duplicate-text; conflicting-labels (max_conflicts); leaked-exact,
    leaked-normalised (max_leaked); shared-dev-test; unseen-label, one-label, labels, similar-labels, empty-label,
    absent-label. Those about labels need `labels_expected`. Texts are compared with spacing aside, or normalised
    (`normalised_form`) where that is said.
    """
    splits = {"train": train, "dev": dev, "test": test}
    plain = {name: [plain_form(item.text) for item in items] for name, items in splits.items()}
    findings: list[Finding] = []
    for name, items in splits.items():
        if not items:
            continue
        found = _unusable(items, plain[name], labels_expected)
        if labels_expected:
            found += [*_conflicts(items, plain[name]), *_histogram(items)]
        found += _duplicates(items, plain[name])
        findings += [replace(finding, split=name) for finding in found]
    counts = {name: len(items) for name, items in splits.items()}
    findings = refuse_shares(findings, {"empty-text", "missing-label"}, counts, section, "max_unusable")
    findings = refuse_shares(findings, {"conflicting-labels"}, counts, section, "max_conflicts")
    if labels_expected:
        findings += [*_doubtful_labels([*train, *dev, *test], section), *_unseen(splits, section)]
    return findings + _leakage(splits, plain, section)


def overlap(train: Sequence[Item], test: Sequence[Item]) -> list[Finding]:
    """Warnings about rows of `test` with a text that `train` has too: leaked-exact, leaked-normalised."""
    splits = {"train": train, "test": test}
    plain = {name: [plain_form(item.text) for item in items] for name, items in splits.items()}
    normal = {name: [normalised_form(text) for text in texts] for name, texts in plain.items()}
    return _shared(splits, plain, normal, "train", "test")


def _unusable(items: Sequence[Item], texts: Sequence[str], labels_expected: bool) -> list[Finding]:
    empty = [(item.source, "empty text") for item, text in zip(items, texts, strict=True) if not text]
    bare = [(item.source, item.text) for item in items if item.label is None and labels_expected]
    return [
        *about_rows("warning", "empty-text", empty, "with an empty text.", "Fill in the text, or remove these rows."),
        *about_rows("warning", "missing-label", bare, "without a label.", "Fill in the label, or remove these rows."),
    ]


def _conflicts(items: Sequence[Item], texts: Sequence[str]) -> list[Finding]:
    by_text: dict[str, list[Item]] = defaultdict(list)
    for item, text in zip(items, texts, strict=True):
        if text and item.label is not None:
            by_text[text].append(item)
    contradictory: list[tuple[str, str]] = []
    rows = 0
    for group in by_text.values():
        labels = {item.label for item in group}
        if len(labels) > 1:
            rows += len(group)
            other = next(item for item in group if item.label != group[0].label)
            what = f"{shorten(group[0].text, 50)} is {group[0].label}, but {other.label} at {other.source}"
            contradictory.append((group[0].source, what))
    what = f"with a text that also carries another label ({counted(len(contradictory), 'text')})."
    advice = "Decide on one label a text; no model can learn both."
    return about_rows("warning", "conflicting-labels", contradictory, what, advice, count=rows)


def _duplicates(items: Sequence[Item], texts: Sequence[str]) -> list[Finding]:
    first: dict[tuple[str, str | None], Item] = {}
    again: list[tuple[str, str]] = []
    for item, text in zip(items, texts, strict=True):
        if not text:
            continue
        earlier = first.setdefault((text, item.label), item)
        if earlier is not item:
            again.append((item.source, f"as {earlier.source}: {shorten(item.text, 50)}"))
    advice = "Remove them if they were not meant."
    return about_rows("warning", "duplicate-text", again, "with the text and label of an earlier one.", advice)


def _histogram(items: Sequence[Item]) -> list[Finding]:
    counts = Counter(item.label for item in items if item.label is not None)
    if not counts:
        return []
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{shorten(name, 30)} {count:,} ({count / total:.1%})" for name, count in ordered[:_SHOWN_LABELS])
    if len(ordered) > _SHOWN_LABELS:
        rest = sum(count for _, count in ordered[_SHOWN_LABELS:])
        shown += f", {len(ordered) - _SHOWN_LABELS} more labels {rest:,} ({rest / total:.1%})"
    top, most = ordered[0]
    message = f"Labels: {shown}. Always answering `{shorten(top, 30)}` is right in {most / total:.1%}."
    if len(ordered) == 1:
        advice = "A model cannot learn to choose, nor be measured, from one label."
        return [Finding("warning", "one-label", f"Every row is labelled `{shorten(top)}`.", total, advice=advice)]
    return [Finding("info", "labels", message, len(ordered))]


def _doubtful_labels(items: Sequence[Item], section: DataSection) -> list[Finding]:
    """Labels that are one but for case and spacing, and labels that say that there is none; not those given names.

    Of those, the ones that no row carries.
    """
    counts = Counter(item.label for item in items if item.label is not None)
    findings: list[Finding] = []
    absent = [name for name in dict.fromkeys((section.labels or {}).values()) if not counts.pop(name, 0)]
    if absent and items:
        message = f"`data.labels` names {listed(absent)}, which no row carries: a class that cannot be learned."
        findings.append(Finding("warning", "absent-label", message, len(absent), advice="Leave it out, or add rows."))
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(counts):
        alike[normalised_form(label)].append(label)
    for labels in alike.values():
        if len(labels) > 1:
            message = f"Labels that differ only in case, spacing or punctuation: {listed(labels)}, each its own class."
            merged = ",".join(f"{label}={labels[-1]}" for label in labels)
            advice = f"Write them alike, or --labels '{merged},…' if they are one."
            count = sum(counts[label] for label in labels)
            findings.append(Finding("warning", "similar-labels", message, count, advice=advice))
    for label in sorted(counts):
        if label.strip().lower() in _NO_LABEL:
            message = f"The label {listed([label])} is a class like any other, and may mean that there is none."
            advice = "Leave the field empty where no label is known, or remove these rows."
            findings.append(Finding("warning", "empty-label", message, counts[label], advice=advice))
    return findings


def _unseen(splits: dict[str, Sequence[Item]], section: DataSection) -> list[Finding]:
    """Labels of dev or test that no training row has. Only a warning where they were named, or train was cut down."""
    known = {item.label for item in splits["train"]}
    if not splits["train"]:
        return []
    named = set(section.labels or ()) | set((section.labels or {}).values())
    findings: list[Finding] = []
    for name in ("dev", "test"):
        unseen = [
            (item.source, item.label) for item in splits[name] if item.label is not None and item.label not in known
        ]
        labels = sorted({label for _, label in unseen})
        excused = section.train_rows is not None or all(label in named for label in labels)
        what = f"of {name} with a label that train does not have: {listed(labels, 5)}."
        advice = "Add such rows to train, remove them here, or check the spelling."
        findings += about_rows("warning" if excused else "error", "unseen-label", unseen, what, advice, name)
    return findings


def _leakage(splits: dict[str, Sequence[Item]], plain: dict[str, list[str]], section: DataSection) -> list[Finding]:
    normal = {name: [normalised_form(text) for text in texts] for name, texts in plain.items()}
    findings: list[Finding] = []
    for earlier, name in (("train", "dev"), ("train", "test"), ("dev", "test")):
        found = _shared(splits, plain, normal, earlier, name)
        if earlier == "train":
            codes = {"leaked-exact", "leaked-normalised"}
            findings += refuse_above(found, codes, len(splits[name]), section.max_leaked, "max_leaked")
        elif found:
            count = sum(f.count for f in found)
            message = f"{counted(count, 'row')} of test with a text that is also in dev."
            shown = tuple(example for f in found for example in f.examples)[:5]
            advice = "Remove them from dev: it chooses the checkpoint that test then measures."
            findings.append(Finding("warning", "shared-dev-test", message, count, shown, advice, "test"))
    return findings


def _shared(
    splits: dict[str, Sequence[Item]],
    plain: dict[str, list[str]],
    normal: dict[str, list[str]],
    earlier: str,
    name: str,
) -> list[Finding]:
    exact_at = dict(zip(reversed(plain[earlier]), reversed(splits[earlier]), strict=True))
    normal_at = dict(zip(reversed(normal[earlier]), reversed(splits[earlier]), strict=True))
    exact: list[tuple[str, str]] = []
    near: list[tuple[str, str]] = []
    for item, text, form in zip(splits[name], plain[name], normal[name], strict=True):
        if not text:
            continue
        if text in exact_at:
            exact.append((item.source, f"as {exact_at[text].source}: {shorten(text, 50)}"))
        elif form in normal_at:
            near.append((item.source, f"as {normal_at[form].source}: {shorten(text, 50)}"))
    what = f"of {name} with a text that is also in {earlier}"
    advice = f"Remove them from {earlier}: a model that has seen them is not measured on them."
    but = f"{what}, but for case, spacing and punctuation."
    return [
        *about_rows("warning", "leaked-exact", exact, f"{what}.", advice, name),
        *about_rows("warning", "leaked-normalised", near, but, advice, name),
    ]
