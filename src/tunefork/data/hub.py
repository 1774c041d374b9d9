"""Data sets of the Hugging Face hub, through `datasets` (extra `hub`): `hub:owner/name[:config][@split]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from tunefork.data.rows import Finding, Row
from tunefork.data.tables import plain_rows
from tunefork.data.values import listed
from tunefork.errors import DataError, MissingExtraError, did_you_mean

PREFIX = "hub:"
Role = Literal["train", "dev", "test"]
_USUAL = {"train": ("train",), "dev": ("validation", "dev", "valid", "val"), "test": ("test",)}
_FORM = re.compile(r"hub:(?P<name>[^:@\s]+)(:(?P<config>[^:@\s]+))?(@(?P<split>\S+))?")


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set's name, and the configuration and split where they were given."""

    name: str
    config: str | None = None
    split: str | None = None


def parse_hub_name(path: str) -> HubName:
    """Takes `hub:owner/name[:config][@split]` apart; `name` may also be a folder in the hub's form.

    Raises DataError when it is not of this form.
    """
    match = _FORM.fullmatch(path.strip())
    if match is None:
        raise DataError(
            f"A hub data set must be written hub:owner/name[:config][@split]. Received `{path}`. "
            "Try hub:stanfordnlp/imdb@train."
        )
    return HubName(match["name"], match["config"], match["split"])


def read_hub(path: str, role: Role) -> tuple[list[Row], list[Finding]]:
    """Rows of one split: the one named, else the usual one for the role; `line` is the place in it, from 1.

    Raises MissingExtraError without `datasets`, DataError when the hub, the data set, the configuration or the
    split cannot be had.
    """
    wanted = parse_hub_name(path)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
        from datasets import exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("datasets", "hub", f"Reading `{path}`") from error
    try:
        split = wanted.split or _usual_split(
            list(datasets.get_dataset_split_names(wanted.name, wanted.config)), path, role
        )
        table: Any = datasets.load_dataset(wanted.name, wanted.config, split=split)
    except (OSError, ValueError, exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        detail = " ".join(str(error).split())[:300]
        raise DataError(
            f"The data set `{path}` must be readable. Received from the hub: {detail} "
            "Try checking the name, the configuration, the network, or `hf auth login` for private data."
        ) from error
    source = f"{PREFIX}{wanted.name}{':' + wanted.config if wanted.config else ''}@{split}"
    if not len(table):
        raise DataError(f"`{source}` must hold rows. Received a split without any.")
    rows, findings = plain_rows(table, source)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            meaning = ",".join(f"{i}={name}" for i, name in enumerate(feature.names))
            message = f"`{column}` of `{source}` holds numbers that stand for names; the numbers were kept."
            findings.append(Finding("info", "class-names", message, advice=f'Try --labels "{meaning}".'))
    return rows, findings


def _usual_split(there: list[str], path: str, role: Role) -> str:
    for name in _USUAL[role]:
        if name in there:
            return name
    usual = _USUAL[role][0]
    raise DataError(
        f"`{path}` must say which split to use for {role}. Received none, and the data set has {listed(there)}."
        f"{did_you_mean(usual, there)} Try {path}@{there[0] if there else usual}."
    )
