"""Runs, folders and commands that cannot go on."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from tests.cli.places import Arguments, Case, Place
from tests.cli.scenes import reviews
from tests.recovery.watched_os import WatchedOs
from tunefork import files


def flip(path: Path) -> None:
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(run: Path, step: int) -> Path:
    flip(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")
    return run


def locked(place: Place, *arguments: object) -> Arguments:
    """Another process holds the lock of this run (a lock belongs to an open file, so this one's will do)."""
    descriptor = os.open(place.folder / "kept" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return list(arguments)


def refusing(place: Place, call: str, code: int, after: int = 0) -> Arguments:
    """From the call number `after` on, the system refuses this call inside tunefork.files."""
    watched = WatchedOs(errno=code)
    watched.fail = lambda _, name: name == call and watched.calls.count(name) > after
    place.patch.setattr(files, "os", watched)
    return place.train()


def damaged_all(place: Place) -> Arguments:
    again = place.resume()
    damage(damage(place.folder / "kept", 1), 2)
    return again


def damaged_recipe(place: Place) -> Arguments:
    again = place.resume()
    (place.folder / "kept" / "recipe.yaml").write_text("task: [")
    return again


def predict(place: Place, rows: object, *more: object) -> Arguments:
    return ["predict", place.run(), rows, "--json", *more]


def evaluate(place: Place, *more: object) -> Arguments:
    return ["evaluate", place.run(), "--json", *more]


def partly_bad(place: Place) -> Arguments:
    return evaluate(place, "--test", place.put("a.csv", [*reviews(), {"text": "Fine.", "label": "so so"}]))


def mostly_cut(place: Place) -> Arguments:
    long = [{**row, "text": row["text"] * 400} for row in reviews(2)]
    return evaluate(place, "--test", place.put("a.csv", [*long, *reviews(4)]))


def show(place: Place, *more: object) -> Arguments:
    return ["data", "show", *place.train()[1:-4], *more]


def compare(place: Place, *more: object) -> Arguments:
    return ["compare", *place.train()[1:], *more]


def moved_data(place: Place) -> Arguments:
    """The run's rows have been deleted since."""
    again = place.resume()
    recipe = place.folder / "kept" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("train.csv", "gone.csv"))
    return again


def below_a_file(place: Place) -> Path:
    return place.rows() / "run"


FOLDERS = (
    Case("folder not empty", lambda p: p.train("--out", p.put("full/notes.txt", "mine").parent), ("notes.txt",)),
    Case("folder of a finished run", lambda p: p.train("--out", p.run()), ("finished", "--resume")),
    Case("folder of a run that can go on", lambda p: p.train("--out", p.run(finished=False)), ("step 2", "--resume")),
    Case(
        "folder that another process writes",
        lambda p: locked(p, *p.resume()),
        ("Only one process", "Try again when it has ended"),
    ),
    Case("folder is a file", lambda p: p.train("--out", p.rows()), ("which is a file",)),
    Case("folder below a file", lambda p: p.train("--out", below_a_file(p)), ("Not a directory",)),
    Case("folder not writable", lambda p: refusing(p, "makedirs", errno.EROFS), ("Read-only file system",)),
    Case("folder of another owner", lambda p: refusing(p, "open", errno.EACCES), ("must be writable",), writes=True),
    Case("disk full", lambda p: refusing(p, "write", errno.ENOSPC, 40), ("room", "No space left"), 1, writes=True),
)

RESUMING = (
    Case("resume of nothing", lambda p: ["train", "--json", "--resume", "--out", "none"], ("none", "without --resume")),
    Case(
        "resume with a task, of nothing",
        lambda p: p.train("--resume"),
        ("must be a folder that is there", "without --resume"),
    ),
    Case("resume of what is no run", lambda p: p.train("--resume", "--out", p.folder), ("recipe.yaml",)),
    Case("resume without anything", lambda p: ["train", "--resume", "--json"], ("which run", "train RUN --resume")),
    Case("resume without a folder", lambda p: ["train", "--task", "sst2", "--resume", "--json"], ("--out",)),
    Case(
        "resume with another recipe",
        lambda p: p.resume("--learning-rate", 0.5),
        ("train.learning_rate", "given: 0.5"),
    ),
    Case("resume with a default again", lambda p: p.resume("--seed", 0), ("seed (kept: 3, given: 0)",)),
    Case("resume with every checkpoint damaged", damaged_all, ("All in", "damaged", "step-00000002")),
    Case("resume with a damaged recipe", damaged_recipe, ("valid YAML",)),
    Case("resume after the rows are gone", moved_data, ("gone.csv",)),
)

USING = (
    Case("predict without a model", lambda p: ["predict", p.run(finished=False), p.rows()], ("--resume",)),
    Case("chat without a model", lambda p: ["chat", p.run(finished=False)], ("--resume",)),
    Case(
        "chat of a run that is not there", lambda p: ["chat", "runs/none"], ("the folder `runs` has none of that name",)
    ),
    Case("predict without a run", lambda p: ["predict", "none", p.rows(), "--json"], ("'none'", "not there")),
    Case("predict of no file", lambda p: predict(p, "none.csv"), ("`none.csv`",)),
    Case("predict of other columns", lambda p: predict(p, p.put("a.csv", "opinion\nFine.\n")), ("`text`", "`opinion`")),
    Case("predict into no folder", lambda p: predict(p, p.rows(), "--out", "no/a.csv"), ("mkdir -p no",)),
    Case("predict into a format unknown", lambda p: predict(p, p.rows(), "--out", "a.doc"), ("a.doc",)),
    Case("predict over its own rows", lambda p: predict(p, p.rows(), "--out", p.folder / "rows.csv"), ("replace",)),
    Case("predict of the folder one is in", lambda p: predict(p, "."), ("must come from a file", "the folder `.`")),
    Case("predict of every folder", lambda p: predict(p, "/"), ("must come from a file", "the folder `/`")),
    Case("predict with half its arguments", lambda p: ["predict", p.run(), "--json"], ("Missing argument",)),
    Case("evaluate of unlabelled rows", lambda p: evaluate(p, "--test", p.put("a.csv", "text\nFine.\n")), ("label",)),
    Case(
        "evaluate with settings of training",
        lambda p: evaluate(p, "--test", p.rows(), "--set", "train.epochs=3"),
        ("`train.epochs` is not read",),
    ),
    Case(
        "evaluate with demonstrations",
        lambda p: evaluate(p, "--test", p.rows(), "--set", "evaluate.demonstrations=8"),
        ("`evaluate.demonstrations` is not read: a run knows its own task", "Read are data.test"),
    ),
    Case(
        "evaluate of a model with an adapter",
        lambda p: ["evaluate", "--model", p.tiny("llama"), "--task", "sst2", "--test", p.rows(), "--adapter", "lora"],
        ("`adapter.name` is not read", "Read are model, task, data,"),
    ),
    Case("evaluate of other labels", lambda p: evaluate(p, "--test", p.put("a.csv", "text,label\na,b\n")), ("'b'",)),
    Case(
        "evaluate of an unfinished run",
        lambda p: ["evaluate", p.run(finished=False), "--test", p.rows(), "--json"],
        ("must hold a trained model", "--resume"),
    ),
    Case("evaluate of rows of which many are bad", partly_bad, ("test: 1 row left out", "'so so'", "allows 1.0%")),
    Case("evaluate of rows of which most are cut", mostly_cut, ("test: 2 rows cut to fit", "allows 20.0%")),
    Case("evaluate without a task", lambda p: ["evaluate", "--json", "--model", p.tiny("llama")], ("`task`",)),
    Case("evaluate of nothing", lambda p: ["evaluate", "none", "--json"], ("none",)),
    Case("export of nothing", lambda p: ["export", "none", "--json"], ("'none'", "folder that is there")),
    Case("export of an unfinished run", lambda p: ["export", p.run(finished=False), "--json"], ("finished run",)),
    Case("export to a form unknown", lambda p: ["export", p.run(), "--to", "merge", "--json"], ("`merged`?",)),
    Case("export of what has no adapter", lambda p: ["export", p.run(), "--to", "adapter", "--json"], ("merged",)),
    Case("export over other things", lambda p: ["export", p.run(), "--out", p.rows().parent, "--json"], ("own",)),
    Case("export in a format unknown", lambda p: ["export", p.run(), "--dtype", "int8", "--json"], ("'int8'",)),
    Case("report of nothing", lambda p: ["report", "none"], ("'none'", "folder that is there")),
    Case("report of an unfinished run", lambda p: ["report", p.run(finished=False)], ("finished run",)),
    Case("row out of range", lambda p: show(p, "--row", 99), ("`row`", "Received 99")),
    Case("row negative", lambda p: show(p, "--row", -1), ("--row",)),
    Case("split unknown", lambda p: show(p, "--split", "tset"), ("Did you mean `test`?",)),
    Case(
        "compare of an adapter unknown",
        lambda p: compare(p, "--methods", "lora,lroa"),
        ("'lroa'", "Did you mean `lora`?"),
    ),
    Case("compare of a method unknown", lambda p: compare(p, "--methods", "mezzo/lora"), ("'mezzo'", "backprop")),
    Case("compare of nothing", lambda p: compare(p, "--methods", ","), ("`methods` must name at least one",)),
    Case("compare of no method", lambda p: compare(p, "--methods", ""), ("`methods` must name at least one",)),
    Case("compare in a full folder", lambda p: compare(p, "--out", p.rows().parent), ("empty folder",)),
    Case("chat with nothing", lambda p: ["chat", "none/at/all"], ("none/at/all",)),
    Case("chat with a masked model", lambda p: ["chat", p.tiny("bert")], ("causal model",)),
    Case("chat with a classifier", lambda p: ["chat", p.run()], ("chat",)),
)

CASES = (*FOLDERS, *RESUMING, *USING)
