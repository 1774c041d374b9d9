"""Files of rows that cannot be meant."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cli.places import Arguments, Case, Place
from tests.cli.scenes import ROWS, as_csv, as_json_lines, chats, reviews

CSV = as_csv(reviews())
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in.</body></html>\n"
MARGHERITA = "Die Pizza war köstlich,good\n".encode("latin-1")


def rows_with(change: dict[str, Any], every: int = 1) -> list[dict[str, Any]]:
    return [{**row, **(change if i % every == 0 else {})} for i, row in enumerate(reviews())]


def roles(*names: str) -> list[dict[str, Any]]:
    """Conversations whose turns have these roles."""
    return [{"messages": [{"role": name, "content": f"{name} {i}"} for name in names]} for i in range(ROWS)]


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.csv", CSV)
    return out.getvalue()


def test_file(place: Place, rows: Sequence[dict[str, Any]]) -> Arguments:
    return place.train("--test", place.put("test.csv", rows))


def copied_rows(place: Place) -> Arguments:
    return test_file(place, [{**row, "text": row["text"].upper()} for row in reviews()[:8]])


def folder(place: Place) -> Path:
    return place.put("folder/rows.csv", CSV).parent


def without_template(place: Place) -> Path:
    model = place.model()
    (model / "chat_template.jinja").unlink()
    return model


BYTES = (
    Case("gzip cut short", lambda p: p.train_on("a.csv.gz", gzip.compress(CSV.encode())[:-30]), ("whole gzip",)),
    Case("gzip in name only", lambda p: p.train_on("a.csv.gz", CSV), ("must be gzip-compressed", "Try without `.gz`")),
    Case("gzip not in name", lambda p: p.train_on("a.csv", gzip.compress(CSV.encode())), ("add `.gz`",)),
    Case("gzip damaged", lambda p: p.train_on("a.csv.gz", gzip.compress(CSV.encode())[:40] + bytes(80)), ("gzip -t",)),
    Case("utf-16 with its mark", lambda p: p.train_on("a.csv", CSV.encode("utf-16")), ("UTF-16", "iconv")),
    Case("utf-16 without a mark", lambda p: p.train_on("a.csv", CSV.encode("utf-16-le")), ("NUL bytes", "iconv")),
    Case(
        "latin-1",
        lambda p: p.train_on("a.csv", CSV.encode() + MARGHERITA),
        ("0xf6", "line 26", "iconv", "> converted.csv"),
    ),
    Case("empty", lambda p: p.train_on("a.csv", ""), ("empty file (0 bytes)",)),
    Case("blank", lambda p: p.train_on("a.csv", "\n \n\n"), ("without any text",)),
    Case("binary", lambda p: p.train_on("a.csv", bytes(range(1, 256)) * 9), ("must be text", "binary data")),
    Case("a zip archive", lambda p: p.train_on("a.csv", zipped()), ("zip archive", "unpack")),
    Case("a pointer of git lfs", lambda p: p.train_on("a.csv", "version https://git-lfs.com\n"), ("git lfs pull",)),
    Case("xlsx in name only", lambda p: p.train_on("a.xlsx", CSV), ("must be an .xlsx workbook",)),
    Case("xlsx that is a bare zip", lambda p: p.train_on("a.xlsx", zipped()), ("must be an .xlsx workbook",)),
    Case("parquet in name only", lambda p: p.train_on("a.parquet", CSV), ("must be a Parquet file",)),
    Case("parquet cut short", lambda p: p.train_on("a.parquet", b"PAR1" + bytes(40)), ("must be a Parquet file",)),
)

TEXT = (
    Case("header only", lambda p: p.train_on("a.csv", "text,label\n"), ("only a header", "`text`, `label`")),
    Case("no header", lambda p: p.train_on("a.csv", CSV.split("\n", 1)[1]), ("looked in", "--label-field")),
    Case("header names one twice", lambda p: p.train_on("a.csv", "text,text,label\na,b,good\n"), ("columns 1 and 2",)),
    Case("ragged rows", lambda p: p.train_on("a.csv", CSV + "one,two,three\n" * 4), ("3 fields", "a.csv:26")),
    Case("no row as wide as the header", lambda p: p.train_on("a.csv", "text,label\na\nb\nc\n"), ("1 field",)),
    Case("quote never closed", lambda p: p.train_on("a.csv", CSV + '"The end,good\n'), ("a.csv:26", "never closed")),
    Case("web page for csv", lambda p: p.train_on("a.csv", PAGE), ("web page",)),
    Case("web page for json", lambda p: p.train_on("a.json", PAGE), ("web page",)),
    Case("web page for jsonl", lambda p: p.train_on("a.jsonl", PAGE), ("web page",)),
    Case("json broken", lambda p: p.train_on("a.json", '[{"text": "a", "label": }]'), ("line 1, column 25",)),
    Case("json is a number", lambda p: p.train_on("a.json", "42"), ("array of objects", "int")),
    Case("json is an empty array", lambda p: p.train_on("a.json", "[]"), ("empty array",)),
    Case("json is one object", lambda p: p.train_on("a.json", '{"rows": []}'), ("with the keys `rows`",)),
    Case("json array named jsonl", lambda p: p.train_on("a.jsonl", "[{}]"), ("starts with `[`", ".json")),
    Case("jsonl of numbers", lambda p: p.train_on("a.jsonl", "1\n2\n"), ("none of them a JSON object",)),
    Case("jsonl lines broken", lambda p: p.train_on("a.jsonl", as_json_lines(reviews()) + "{oops\n"), ("a.jsonl:25",)),
)

LABELS = (
    Case(
        "text and label swapped",
        lambda p: p.train_on("a.csv", [{"text": r["label"], "label": r["text"]} for r in reviews()]),
        ("24 rows carry 24 different labels", "Are text and label swapped"),
    ),
    Case(
        "labels that are amounts",
        lambda p: p.train_on("a.csv", [{**r, "label": 1.37 * i} for i, r in enumerate(reviews())]),
        ("24 different labels", "an amount rather than a class"),
    ),
    Case("field misspelt", lambda p: p.train("--set", "data.fields={txt: text}"), ("'txt'", "Did you mean `text`?")),
    Case(
        "labels empty",
        lambda p: p.train_on("a.csv", rows_with({"label": ""})),
        ("two different labels", "`label` is empty"),
    ),
    Case("some labels empty", lambda p: p.train_on("a.csv", rows_with({"label": ""}, 4)), ("6 rows", "max_unusable")),
    Case(
        "labels NaN",
        lambda p: p.train_on("a.json", "[" + '{"text": "a", "label": NaN},' * 9 + "{}]"),
        ("`label` is empty (or NaN)",),
    ),
    Case(
        "text without width", lambda p: p.train_on("a.csv", CSV + "\u200b,good\n" * 9), ("the text must not be empty",)
    ),
    Case("one label", lambda p: p.train_on("a.csv", reviews(labels=["good"])), ("two different labels", "'good'")),
    Case("label only in test", lambda p: test_file(p, [{"text": "Odd.", "label": "fine"}]), ("'fine'",)),
    Case(
        "label not named",
        lambda p: p.train("--labels", "good=yes,baad=no"),
        ("`bad`, `good`", "Received `baad`", "Did you mean `bad`?"),
    ),
    Case(
        "label column misspelt",
        lambda p: p.train("--text-field", "text", "--label-field", "lable"),
        ("`lable`", "Did you mean `label`?"),
    ),
    Case("text column misspelt", lambda p: p.train("--text-field", "txt"), ("`txt`", "Did you mean `text`?")),
    Case(
        "texts empty",
        lambda p: p.train_on("a.csv", rows_with({"text": " "}, 3)),
        ("6 rows", "the text must not be empty"),
    ),
    Case(
        "contradictory labels",
        lambda p: p.train_on("a.csv", rows_with({"text": "The same."}, 3)),
        ("another label", "no model can learn both"),
    ),
    Case("test rows seen in train", copied_rows, ("rows of test", "also in train", "but for case")),
    Case("too few rows", lambda p: p.train_on("a.csv", reviews(2)), ("enough rows", "Received 2 rows")),
    Case("no such group column", lambda p: p.train("--set", "data.group_field=user"), ("column `user`",)),
    Case("scores not whole", lambda p: p.train("--task", "scoring"), ("whole numbers", "'bad'", "classification")),
    Case(
        "choices missing",
        lambda p: p.train("--task", "choice"),
        ("must list the choices", "task.choices"),
    ),
)

PATHS = (
    Case("no such file", lambda p: p.train("--train", "rwos.csv"), ("`rwos.csv`", "Did you mean `rows.csv`?")),
    Case("no such folder", lambda p: p.train("--train", "dta/rows.csv"), ("there is no folder `dta`",)),
    Case("a folder", lambda p: p.train("--train", folder(p)), ("Received the folder", "`rows.csv`")),
    Case("unknown extension", lambda p: p.train_on("a.doc", CSV), ("Received `.doc`", "parquet")),
    Case("no extension", lambda p: p.train_on("rows", CSV), ("no extension",)),
    Case("train again as test", lambda p: p.train("--test", p.folder / "rows.csv"), ("must be different rows",)),
    Case("no train file", lambda p: ["train", "--task", "sst2", "--json"], ("`data.train`", "--train rows.csv")),
    Case("hub name malformed", lambda p: p.train("--train", "hub:a b"), ("hub:owner/name",)),
    Case("hub out of reach", lambda p: p.train("--train", "hub:nobody/nothing"), ("hub:nobody/nothing", "Try")),
    Case("a device", lambda p: p.train("--train", "/dev/null"), ("a pipe or device",)),
)

CHATS = (
    Case("roles swapped", lambda p: p.chat(roles("assistant", "user")), ("roles look swapped",)),
    Case("role unknown", lambda p: p.chat(roles("user", "asistant")), ("`asistant`", "Did you mean `assistant`?")),
    Case("role of sharegpt", lambda p: p.chat(roles("human", "gpt"), "--layout", "openai"), ("data.layout=sharegpt",)),
    Case("weight 2", lambda p: p.chat(chats(weight=2)), ("`weight` of message 2 is 2", "0 or 1")),
    Case("all of weight 0", lambda p: p.chat(chats(weight=0)), ("no reply to learn from",)),
    Case("no assistant", lambda p: p.chat(roles("user", "user")), ("no reply to learn from",)),
    Case("messages not a list", lambda p: p.chat([{"messages": "Hello"}] * 9), ("list `messages`",)),
    Case("a table of texts", lambda p: p.train("--task", "chat"), ("`messages`", "label, text", "or another --task")),
    Case(
        "prompts for a chat",
        lambda p: p.chat([{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(ROWS)]),
        ("`messages`", "Try --task generation"),
    ),
    Case(
        "two layouts in one file",
        lambda p: p.chat([*chats(), {"prompt": "a", "completion": "b"}]),
        ("share one layout", "chats.jsonl:25"),
    ),
    Case("no chat template", lambda p: p.good_chat("--model", without_template(p)), ("chat template",)),
    Case("a masked model", lambda p: p.good_chat("--model", p.tiny("bert")), ("needs a causal model", "masked")),
)

CASES = (*BYTES, *TEXT, *LABELS, *PATHS, *CHATS)
