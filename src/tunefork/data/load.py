"""From a recipe's data section to three splits: reads, lays out, carves, limits, and says how each came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from tunefork.data.check import normalised_form
from tunefork.data.findings import LEFT_OUT, about_rows, refuse_above
from tunefork.data.hub import PREFIX, Role
from tunefork.data.layouts import apply_layout, detect_layout
from tunefork.data.read import read_rows
from tunefork.data.rows import Finding, Row, Splits
from tunefork.data.split import draw, draw_groups, draw_per_label
from tunefork.data.values import counted, label_text, listed, shorten
from tunefork.errors import DataError, did_you_mean
from tunefork.recipe.schema import DataSection, Layout

LabelOf = Callable[[Row], str | None]
TextsOf = Callable[[Row], Sequence[str]]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Files:
    """The rows of every file that is named, by use, in the layout that they share."""

    rows: Mapping[Role, Sequence[Row]]
    layout: Layout
    origin: Mapping[str, str]
    findings: Sequence[Finding]


def load_splits(
    section: DataSection, seed: int, label_of: LabelOf | None, texts_of: TextsOf | None = None
) -> tuple[Splits, list[Finding]]:
    """`read_files`, then `split_files`."""
    return split_files(read_files(section), section, seed, label_of, texts_of)


def read_files(section: DataSection) -> Files:
    """Reads and lays out the files that are named; without a train file the others alone (for evaluation).

    Rows that were left out become errors where they exceed `section.max_unusable`. Raises MissingFileError,
    MissingExtraError, or DataError: no file at all, one file for two uses, files of different layouts.
    """
    files: dict[Role, str] = {role: path for role in ROLES if (path := getattr(section, role)) is not None}
    if not files:
        raise DataError("`data.train` must name a file of rows. Received none. Try --train rows.csv.")
    _refuse_shared_files(files)
    findings: list[Finding] = []
    rows: dict[Role, Sequence[Row]] = {role: [] for role in ROLES}
    layout = section.layout
    for role, path in files.items():
        read, found = read_rows(path, role=role)
        total = len(read) + sum(f.count for f in found if f.code in LEFT_OUT)
        if layout == "auto":
            layout = detect_layout(read, section.fields)
        rows[role], more = apply_layout(read, layout, section.fields)
        judged = refuse_above([*found, *more], LEFT_OUT, total, section.max_unusable, "max_unusable")
        if not rows[role]:
            raise DataError(_nothing_usable(path, judged))
        findings += [replace(f, split=role) for f in judged]
    origin = {role: f"{files[role]}: {counted(len(rows[role]), 'row')}" for role in files}
    return Files(rows, layout, origin, findings)


def split_files(
    files: Files, section: DataSection, seed: int, label_of: LabelOf | None, texts_of: TextsOf | None = None
) -> tuple[Splits, list[Finding]]:
    """The rows by use. Dev and test, unless their fraction is 0, are carved from train where they have no file.

    Carving and row limits are stratified by `label_of` and depend on seed and order only; rows of one group of
    `group_field`, and rows that have one of `texts_of` in common (normalised), stay together.

    Raises DataError: no such `group_field`, too few rows to split.
    """
    rows: dict[str, Sequence[Row]] = {str(role): found for role, found in files.rows.items()}
    findings, origin = list(files.findings), dict(files.origin)
    if section.group_field:
        findings += _check_groups(section.group_field, rows)
    if section.train is not None:
        _carve(rows, origin, section, seed, label_of, texts_of)
    shots = section.rows_per_label
    for role in ("train", "dev"):
        if shots is None or label_of is None:
            break
        taken = draw_per_label(_labels(rows[role], label_of), shots, seed, f"{role}_shots")
        origin[role] += f"; {shots:,} of each label drawn (data.rows_per_label)"
        rows[role] = [rows[role][i] for i in taken]
    for role in ROLES:
        limit: int | None = getattr(section, f"{role}_rows")
        if limit is not None and limit < len(rows[role]):
            taken = draw(_labels(rows[role], label_of), limit, seed, f"{role}_rows")
            origin[role] += f"; {limit:,} of them drawn (data.{role}_rows)"
            rows[role] = [rows[role][i] for i in taken]
    return Splits(rows["train"], rows["dev"], rows["test"], files.layout, origin), findings


def _refuse_shared_files(files: Mapping[Role, str]) -> None:
    """One file must not serve two uses; a hub data set may, where each use names or implies its own split."""
    seen: dict[str, Role] = {}
    for role, path in files.items():
        hub = path.startswith(PREFIX)
        key = path if hub and "@" in path else f"{path}@{role}" if hub else str(Path(path).expanduser().resolve())
        if key in seen:
            raise DataError(
                f"`data.{seen[key]}` and `data.{role}` must be different rows. Received `{path}` for both. "
                f"Try leaving out data.{role}: it is then carved from train."
            )
        seen[key] = role


def _nothing_usable(path: str, findings: Sequence[Finding]) -> str:
    left_out = [f for f in findings if f.code in LEFT_OUT or f.level == "error"]
    why = " ".join(f"{f.message} {f.advice}" for f in left_out)
    first = next((f" The first: {f.examples[0]}." for f in left_out if f.examples), "")
    return f"`{path}` must hold usable rows. Received none. {why}{first}"


def _carve(
    rows: dict[str, Sequence[Row]],
    origin: dict[str, str],
    section: DataSection,
    seed: int,
    label_of: LabelOf | None,
    texts_of: TextsOf | None,
) -> None:
    """Moves dev and test rows out of train, in place. Both fractions are of the whole train file."""
    path, total = str(section.train), len(rows["train"])
    wanted = [("test", section.test_fraction), ("dev", section.dev_fraction)]
    wanted = [(role, fraction) for role, fraction in wanted if getattr(section, role) is None and fraction > 0]
    if sum(fraction for _, fraction in wanted) >= 1:
        raise DataError(
            "`data.dev_fraction` and `data.test_fraction` must leave rows to train on. Received "
            f"{section.dev_fraction} and {section.test_fraction}, which together are 1 or more. Try 0.1 and 0.2."
        )
    for role in ("dev", "test"):
        if getattr(section, role) is None and not getattr(section, f"{role}_fraction"):
            origin[role] = f"none: data.{role}_fraction is 0 and no {role} file is given"
    how = []
    alone = _together(rows["train"], section.group_field, None)
    sets = _together(rows["train"], section.group_field, texts_of) if wanted and texts_of else alone
    for role, fraction in wanted:
        train, size = rows["train"], max(1, round(fraction * total))
        labels = _labels(train, label_of)
        taken = _held_out(labels, sets, size, role, seed, section.group_field)
        if not taken:  # where equal texts leave nothing to choose, the check says that they are in two splits
            taken = _held_out(labels, alone, size, role, seed, section.group_field)
        if not taken or len(taken) == len(train) or (len(taken) * 2 < size and _mostly_different(labels)):
            raise DataError(_too_few(path, labels, alone, total, role, section))
        chosen = set(taken)
        rows[role] = [train[i] for i in taken]
        left = [i for i in range(len(train)) if i not in chosen]
        kind = f"in whole groups of `{section.group_field}`" if section.group_field else "at random"
        kind += ", stratified by label" * bool(label_of) + ", equal texts together" * (sets != alone)
        rows["train"] = [train[i] for i in left]
        sets, alone = [sets[i] for i in left], [alone[i] for i in left]
        count = counted(len(taken), "row")
        origin[role] = f"{count} carved from {path} {kind} (seed {seed}, data.{role}_fraction {fraction:g})"
        how.append(f"{count} to {role}")
    if how:
        origin["train"] += f", of which {' and '.join(how)}; {len(rows['train']):,} left"


def _held_out(
    labels: Sequence[str | None], sets: Sequence[int], size: int, role: str, seed: int, group_field: str | None
) -> list[int]:
    if group_field:
        return draw_groups(labels, sets, size, seed, role)
    if size >= len(labels):
        return []
    return draw(labels, size, seed, role, leave_one=any(label is not None for label in labels), together=sets)


def _mostly_different(labels: Sequence[str | None]) -> bool:
    """Whether most rows carry a label that no other row carries."""
    once = [label for label, count in Counter(labels).items() if count == 1 and label is not None]
    return len(once) * 2 > len(labels)


def _too_few(
    path: str, labels: Sequence[str | None], groups: Sequence[int], total: int, role: str, section: DataSection
) -> str:
    if _mostly_different(labels) and len(labels) > 2:
        return (
            f"Labels must repeat: a model learns what rows of one label have in common. Received `{path}`, where "
            f"{counted(len(labels), 'row')} carry {len(set(labels))} different labels, {shorten(labels[0], 40)!r} "
            "among them. Are text and label swapped, or is the label an amount rather than a class? "
            "Try --text-field and --label-field."
        )
    received = counted(total, "row")
    if section.group_field:
        received += f", of which those left fall into {counted(len(set(groups)), 'group')} of `{section.group_field}`"
    advice = f"Try more rows, or a file of its own as data.{role}"
    advice += ", or data.test_fraction=0." if role == "test" else "."
    must = f"`{path}` must hold enough rows to carve {role} from, with some of each label left."
    return f"{must} Received {received}. {advice}"


def _labels(rows: Sequence[Row], label_of: LabelOf | None) -> list[str | None]:
    return [label_of(row) if label_of else None for row in rows]


def _together(rows: Sequence[Row], field: str | None, texts_of: TextsOf | None) -> list[int]:
    """A number a row, the same for rows of one group of `field` and for rows that have a text in common."""
    parent, first = list(range(len(rows))), dict[Hashable, int]()

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, row in enumerate(rows):
        group = label_text(row.values.get(field)) if field else None
        forms = {normalised_form(text) for text in texts_of(row)} if texts_of else set[str]()
        for key in [("text", form) for form in forms if form] + [("group", group)] * (group is not None):
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(rows))]


def _check_groups(field: str, rows: Mapping[str, Sequence[Row]]) -> list[Finding]:
    findings: list[Finding] = []
    seen: dict[str, str] = {}
    for role, part in rows.items():
        named = [(row, label_text(row.values.get(field))) for row in part]
        if part and not any(name for _, name in named):
            columns = list(part[0].values)
            raise DataError(
                f"`{part[0].file}` must have the column `{field}` (data.group_field). Received the columns "
                f"{listed(columns)}.{did_you_mean(field, columns)} Try naming one of them."
            )
        without = [(row.source, f"no `{field}`") for row, name in named if name is None]
        what = f"without a value of `{field}`, each kept as a group by itself."
        advice = "Fill in the column where rows belong together."
        findings += about_rows("warning", "no-group", without, what, advice, role)
        crossing = [
            (row.source, f"group {name} is also in {seen[name]}")
            for row, name in named
            if name is not None and name in seen
        ]
        what = f"of {role} in groups of `{field}` that another file has too."
        advice = "Move each group into one file, or give one file and let it be split."
        findings += about_rows("error", "group-in-two-splits", crossing, what, advice, role)
        seen.update({name: role for _, name in named if name is not None and name not in seen})
    return findings
