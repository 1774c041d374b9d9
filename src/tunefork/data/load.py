"""From a recipe's data section to three splits: reads, lays out, carves, limits, and says how each came about."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from tunefork.data.findings import LEFT_OUT, about_rows, refuse_above
from tunefork.data.hub import PREFIX, Role
from tunefork.data.layouts import apply_layout, detect_layout
from tunefork.data.read import read_rows
from tunefork.data.rows import Finding, Row, Splits
from tunefork.data.split import draw, draw_groups, draw_per_label
from tunefork.data.values import counted, label_text, listed
from tunefork.errors import DataError, did_you_mean
from tunefork.recipe.schema import DataSection

LabelOf = Callable[[Row], str | None]
ROLES: tuple[Role, ...] = get_args(Role)


def load_splits(section: DataSection, seed: int, label_of: LabelOf | None) -> tuple[Splits, list[Finding]]:
    """The rows of `section` by use. Dev, and test unless `test_fraction` is 0, are carved from train where absent.

    Carving and row limits are stratified by `label_of` and depend on seed and order only; with `group_field` rows of
    one group stay together. Without a train file only the files that are named are read (for evaluation).
    Rows that were left out become errors where they exceed `section.max_unusable`.

    Raises MissingFileError, MissingExtraError, or DataError: no file at all, one file for two uses, files of
    different layouts, no such `group_field`, too few rows to split.
    """
    files: dict[Role, str] = {role: path for role in ROLES if (path := getattr(section, role)) is not None}
    if not files:
        raise DataError("`data.train` must name a file of rows. Received none. Try --train rows.csv.")
    _refuse_shared_files(files)
    findings: list[Finding] = []
    rows: dict[str, list[Row]] = {role: [] for role in ROLES}
    layout = section.layout
    for role, path in files.items():
        read, found = read_rows(path, role=role)
        total = len(read) + sum(f.count for f in found if f.code in LEFT_OUT)
        if layout == "auto":
            layout = detect_layout(read) if not section.fields else "auto"
        rows[role], more = apply_layout(read, layout, section.fields)
        judged = refuse_above([*found, *more], LEFT_OUT, total, section.max_unusable, "max_unusable")
        if not rows[role]:
            raise DataError(_nothing_usable(path, judged))
        findings += [replace(f, split=role) for f in judged]
    origin = {role: f"{files[role]}: {counted(len(rows[role]), 'row')}" for role in files}
    if section.group_field:
        findings += _check_groups(section.group_field, rows)
    if "train" in files:
        _carve(rows, origin, files, section, seed, label_of)
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
    return Splits(rows["train"], rows["dev"], rows["test"], origin), findings


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
    rows: dict[str, list[Row]],
    origin: dict[str, str],
    files: Mapping[Role, str],
    section: DataSection,
    seed: int,
    label_of: LabelOf | None,
) -> None:
    """Moves dev and test rows out of train, in place. Both fractions are of the whole train file."""
    total = len(rows["train"])
    wanted = [("test", section.test_fraction), ("dev", section.dev_fraction)]
    wanted = [(role, fraction) for role, fraction in wanted if role not in files and fraction > 0]
    if sum(fraction for _, fraction in wanted) >= 1:
        raise DataError(
            "`data.dev_fraction` and `data.test_fraction` must leave rows to train on. Received "
            f"{section.dev_fraction} and {section.test_fraction}, which together are 1 or more. Try 0.1 and 0.2."
        )
    if not section.test_fraction and "test" not in files:
        origin["test"] = "none: data.test_fraction is 0 and no test file is given"
    how = []
    for role, fraction in wanted:
        taken = _held_out(rows["train"], max(1, round(fraction * total)), role, section, seed, label_of)
        if not taken or len(taken) == len(rows["train"]):
            raise DataError(_too_few(files["train"], rows["train"], total, role, section))
        chosen = set(taken)
        rows[role] = [rows["train"][i] for i in taken]
        rows["train"] = [row for i, row in enumerate(rows["train"]) if i not in chosen]
        kind = f"in whole groups of `{section.group_field}`" if section.group_field else "at random"
        kind += ", stratified by label" if label_of else ""
        count = counted(len(taken), "row")
        origin[role] = f"{count} carved from {files['train']} {kind} (seed {seed}, data.{role}_fraction {fraction:g})"
        how.append(f"{count} to {role}")
    if how:
        origin["train"] += f", of which {' and '.join(how)}; {len(rows['train']):,} left"


def _held_out(
    train: Sequence[Row], size: int, role: str, section: DataSection, seed: int, label_of: LabelOf | None
) -> list[int]:
    labels = _labels(train, label_of)
    if section.group_field:
        return draw_groups(labels, _groups(train, section.group_field), size, seed, role)
    if size >= len(train):
        return []
    return draw(labels, size, seed, role, leave_one=label_of is not None)


def _too_few(path: str, train: Sequence[Row], total: int, role: str, section: DataSection) -> str:
    received = counted(total, "row")
    if section.group_field:
        groups = len(set(_groups(train, section.group_field)))
        received += f", of which those left fall into {counted(groups, 'group')} of `{section.group_field}`"
    advice = f"Try more rows, or a file of its own as data.{role}"
    advice += ", or data.test_fraction=0." if role == "test" else "."
    must = f"`{path}` must hold enough rows to carve {role} from, with some of each label left."
    return f"{must} Received {received}. {advice}"


def _labels(rows: Sequence[Row], label_of: LabelOf | None) -> list[str | None]:
    return [label_of(row) if label_of else None for row in rows]


def _groups(rows: Sequence[Row], field: str) -> list[Hashable]:
    """The group of each row; a row without one is a group by itself."""
    named = [label_text(row.values.get(field)) for row in rows]
    return [i if name is None else name for i, name in enumerate(named)]


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
