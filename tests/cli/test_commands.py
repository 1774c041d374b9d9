"""Every command on its good path: what it prints, what it writes, and its JSON alone on stdout."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from tests.cli.places import Place, tree
from tests.cli.scenes import Command, Said, as_csv, chats, put, reviews
from tunefork.data import read_rows
from tunefork.run import RunFolder
from tunefork.train.checkpoint import load_newest, save_checkpoint

RESULT_KEYS = {"schema", "recipe", "data", "steps", "forwards", "seconds", "peak_memory_bytes", "baselines", "test"}
FIGURE_KEYS = {"value", "low", "high", "n"}


def document(said: Said) -> Any:
    """stdout, which must be JSON and nothing else."""
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_train_from_flags(place: Place, tunefork: Command) -> None:
    said = tunefork(*place.train("--set", "evaluate.baselines=[majority, tfidf]"))
    found = document(said)
    assert found.keys() >= RESULT_KEYS
    assert found["schema"] == 1
    assert found["steps"] == 2
    assert found["forwards"] == 17  # a batch of 16, and what was left of the epoch
    assert found["data"]["counts"]["train"]["rows"] == 17
    assert found["seconds"].keys() == {"train", "evaluate"}
    assert found["peak_memory_bytes"].keys() == {"kind", "value", "forecast"}
    assert found["baselines"].keys() == {"majority", "tfidf"}
    assert found["test"]["accuracy"].keys() == FIGURE_KEYS
    assert found["recipe"]["train"]["max_steps"] == 2
    assert "auto" not in json.dumps(found["recipe"])
    assert "auto" not in (place.folder / "out" / "recipe.yaml").read_text()
    why = {reason["path"]: (reason["value"], reason["why"]) for reason in found["reasons"]}
    assert why["task.form"] == ("verbalizer", "a causal model can answer in words")
    assert why["data.layout"][0] == "columns"
    assert (why["data.fields.text"][0], why["data.fields.label"][0]) == ("text", "label")
    out = place.folder / "out"
    assert found["path"] == str(out)
    assert json.loads((out / "result.json").read_text()).items() <= found.items()
    assert (out / "report.html").read_text().startswith("<!")
    for shown in ("Recipe, as it will run", "2 steps", "forecast", "this run", "majority", "the best baseline"):
        assert shown in said.err


def test_free_completion_from_train_to_prediction(place: Place, tunefork: Command) -> None:
    """Rows that are only texts: the loss is on every token of them, also of those that are longer than the model."""
    long = " ".join(f"The soup of visit {i} was lovely." for i in range(60))
    rows = [{"text": long if i == 3 else row["text"]} for i, row in enumerate(reviews())]
    found = document(tunefork(*place.train_on("texts.jsonl", rows, "--task", "generation")))
    assert found["recipe"]["data"]["layout"] == "text"
    assert found["test"].keys() == {"loss"}
    counts = found["data"]["counts"]["train"]
    assert counts["trained_tokens"] > counts["tokens"] - 2 * counts["rows"] - 20
    assert "text-in-pieces" in {finding["code"] for finding in found["data"]["findings"]}
    asked = place.put("begun.jsonl", [{"text": "The soup"}])
    assert document(tunefork("predict", place.folder / "out", asked, "--json"))["predicted"] == 1
    (row,) = [row.values for row in read_rows(place.folder / "begun.predicted.jsonl")[0]]
    assert isinstance(row["prediction"], str)
    kept = tunefork("train", place.folder / "out" / "recipe.yaml", "--out", "again", "--json")
    assert document(kept)["test"] == found["test"]  # a kept recipe does the same again
    bare = ["evaluate", "--model", place.tiny("llama"), "--task", "generation", "--test", "texts.jsonl", "--json"]
    assert document(tunefork(*bare))["test"].keys() == {"loss"}


def test_a_file_with_every_row_twice_is_split_and_trained_on(place: Place, tunefork: Command) -> None:
    twice = [*reviews(), *({**row, "text": row["text"].upper()} for row in reviews())]
    found = document(tunefork(*place.train_on("a.csv", twice)))
    assert [f["code"] for f in found["data"]["findings"] if f["code"].startswith("leaked")] == []
    assert "equal texts together" in found["data"]["origin"]["test"]


def test_rows_give_no_commands_to_the_terminal(place: Place, tunefork: Command) -> None:
    """Escape sequences, marks that turn the order of letters, and what Rich would take for emoji or markup."""
    given = reviews(labels=[":100:", "b\x1b[2J"])
    rows = [{**row, "text": f":smile: \x1b[31m\x07\u202e {row['text']}"} for row in given]
    name = "a\x1b[1m:bug:.csv"
    said = tunefork(*place.train_on(name, [*rows, *rows[:1]], "--out", place.folder / "o\x1b[0m"))
    assert said.code == 0, said.err
    arguments = ["--task", "classification", "--train", name, "--model", place.tiny("llama")]
    everything = [said.err]
    everything += tunefork("data", "check", *arguments)[1:]
    everything += tunefork("data", "show", *arguments)[1:]
    everything += tunefork("data", "check", *arguments, "--label-field", "la\x1bbel")[1:]
    everything += tunefork("predict", place.folder / "o\x1b[0m", place.folder / name)[1:]
    for text in everything:
        assert not [c for c in text if c not in "\n\t" and unicodedata.category(c) == "Cc"]
        assert "\u202e" not in text
    assert re.search(r"Labels: .*:100: \d", said.err)
    assert re.search(r"b\\x1b\[2J \d", said.err)
    assert ":bug:.csv" in said.err
    assert ":smile: \\x1b[31m" in everything[1]


def test_the_plan_reads_at_80_columns(place: Place, tunefork: Command) -> None:
    place.patch.setenv("COLUMNS", "80")
    said = tunefork(*place.train("--adapter", "lora", "--dry-run"))
    table = said.err.split("\n\n")[0].split("\n")
    assert max(map(len, table)) <= 80
    assert all(re.match(r"Recipe, as|[a-z]+[.a-z_]*  +\S|  {20,}\S", line) for line in table)  # two columns
    shown = dict(line.split(maxsplit=1) for line in table[1:] if line[:1] != " ")
    assert shown["seed"].strip() == "0 · the default"
    assert shown["model.name"].startswith("/")
    assert shown["data.fields.text"].strip() == "text · found by its name"
    assert "adapter.prefix_tokens" not in shown
    full = tunefork(*place.train("--dry-run")).err
    assert "adapter.alpha" not in full


def test_train_from_yaml_is_train_from_flags(place: Place, tunefork: Command) -> None:
    first = document(tunefork(*place.train()))
    recipe = f"""
model: {place.tiny("llama")}
task: classification
data: {{train: rows.csv}}
train: {{max_steps: 2}}
evaluate: {{baselines: []}}
"""
    second = document(tunefork(*place.train_with(recipe, "r.yaml", "--train", place.rows(), "--out", "again")))
    same = ("steps", "forwards", "test", "data")
    assert {key: first[key] for key in same} == {key: second[key] for key in same}


def test_train_speaks_to_people_on_stdout(place: Place, tunefork: Command) -> None:
    said = tunefork(*[a for a in place.train() if a != "--json"])
    assert (said.code, said.err) == (0, "")
    assert "this run" in said.out
    assert str(place.folder / "out") in said.out


@pytest.mark.parametrize("task", ["dialogsum", "summary"])
def test_a_summary_beside_lead3_from_train_to_report(task: str, place: Place, tunefork: Command) -> None:
    text = "#A#: Is room {0} free? #B#: Yes. #A#: I take room {0}. #B#: Good."
    rows = [{"dialogue": text.format(i), "document": text.format(i), "summary": f"Room {i} goes."} for i in range(24)]
    arguments = place.train_on("rows.jsonl", rows, "--task", task, "--set", "evaluate.baselines=[lead3]")
    found = document(tunefork(*arguments, "--set", "task.max_new_tokens=4"))
    assert 0 < found["baselines"]["lead3"]["rougeL"]["value"] < 1
    page = place.folder / "out" / "report.html"
    assert "lead-3" in page.read_text()
    page.unlink()
    assert tunefork("train", place.folder / "out", "--resume").code == 0
    assert page.exists()


def test_a_report_that_fails_does_not_deny_the_run(place: Place, tunefork: Command) -> None:
    """Exit code 2 would say that nothing was written."""
    run = place.run()
    (run / "report.html").unlink()
    (run / "predictions" / "test-majority.jsonl").write_text("")
    said = tunefork("train", "--resume", "--out", run)
    assert said.code == 1
    assert "is trained and measured" in said.sentence
    assert f"tunefork report {run}" in said.sentence


def test_train_makes_up_a_folder(place: Place, tunefork: Command) -> None:
    arguments = place.train()
    at = arguments.index("--out")
    del arguments[at : at + 2]
    assert document(tunefork(*arguments))["path"].startswith("runs/classification-")
    assert len(list((place.folder / "runs").iterdir())) == 1


def test_dry_run_writes_nothing(place: Place, tunefork: Command) -> None:
    arguments = place.train("--dry-run")
    before = tree(place.folder)
    found = document(tunefork(*arguments))
    assert tree(place.folder) == before
    assert found.keys() == {"recipe", "reasons", "data", "steps", "forecast"}
    assert {"path", "value", "why"} == found["reasons"][0].keys()
    assert found["forecast"]["memory_bytes"] > 0


def test_dry_run_of_data_with_errors_is_refused_and_still_says_all(place: Place, tunefork: Command) -> None:
    rows = [{**row, "text": "The same."} for row in reviews()]
    said = tunefork(*place.train_on("a.csv", rows, "--dry-run"))
    assert said.code == 2
    errors = [f for f in json.loads(said.out)["data"]["findings"] if f["level"] == "error"]
    assert "conflicting-labels" in {f["code"] for f in errors}
    assert all(said.err.count(f"{f['split']}: {f['message']}") == 1 for f in errors)


def test_seeds(place: Place, tunefork: Command) -> None:
    arguments = place.train("--seeds", 2, "--seed", 5, "--set", "evaluate.baselines=[majority]")
    found = document(tunefork(*arguments))
    assert found["spread"]["accuracy"].keys() == {"mean", "sd", "min", "max", "n"}
    assert [Path(run["recipe"]["out"]).name for run in found["runs"]] == ["seed-5", "seed-6"]
    written = json.loads((place.folder / "out" / "seeds.json").read_text())
    assert written["seeds"] == [5, 6]
    assert written["spread"] == found["spread"]
    assert written["baselines"] == found["baselines"] == found["runs"][0]["baselines"] != {}
    again = document(tunefork(*arguments, "--resume"))
    assert (again["spread"], again["baselines"]) == (found["spread"], found["baselines"])


def test_seeds_are_resumed_where_they_lie(place: Place, tunefork: Command) -> None:
    arguments = place.train("--seeds", 2, "--resume")
    at = arguments.index("--out")
    del arguments[at : at + 2]
    said = tunefork(*arguments)
    assert (said.code, "`resume` needs the folder of the seeds" in said.sentence) == (2, True)
    assert not (place.folder / "runs").exists()


def test_patience_that_ends_is_said(place: Place, tunefork: Command) -> None:
    more = ("--max-steps", 30, "--learning-rate", 1e-9, "--set", "train.evaluate_every=1", "--set", "train.patience=2")
    said = tunefork(*place.train(*more))
    assert document(said)["train"]["stopped_early"] is True
    assert "Stopped early after 3 of 30 steps: dev was best at step 1, and train.patience is 2." in said.err


def test_without_test_rows_there_is_no_empty_table(place: Place, tunefork: Command) -> None:
    said = tunefork(*place.train("--set", "data.test_fraction=0"))
    assert document(said)["test"] == {}
    assert "There were no test rows to measure on" in said.err
    assert "this run" not in said.err


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--dry-run", "--seeds", 2)], ids=["train", "dry", "seeds"])
def test_a_folder_that_is_taken_is_refused_before_anything_is_read(
    more: tuple[object, ...], place: Place, tunefork: Command
) -> None:
    taken = place.folder / "taken"
    put(taken / ("seed-0/mine.txt" if "--seeds" in more else "mine.txt"), "mine")
    said = tunefork(*place.train("--train", "nowhere.csv", "--out", taken, *more))
    assert said.code == 2
    assert "A new run needs an empty folder." in said.sentence


def test_one_is_one(place: Place, tunefork: Command) -> None:
    rows = place.put("dev.csv", [{"text": "A new one.", "label": "good"}])
    said = tunefork(*place.train("--dry-run", "--max-steps", 1, "--batch-size", 24, "--dev", rows))
    assert "1 step (1 epoch of 1)" in said.err
    assert "dev   1 row, " in said.err


def test_splits_of_a_few_rows_are_warned_of(place: Place, tunefork: Command) -> None:
    said = tunefork(*place.train("--dry-run"))
    few = [f for f in document(said)["data"]["findings"] if f["code"] == "few-rows"]
    assert [(f["split"], f["level"]) for f in few] == [("dev", "warning"), ("test", "warning")]
    assert "a share measured on so few is uncertain by up to" in said.err


@pytest.mark.parametrize("method", ["backprop", "zo"])
def test_a_checkpoint_of_another_form_is_refused_in_a_sentence(method: str, place: Place, tunefork: Command) -> None:
    """As earlier versions wrote them: the method zo with three numbers of its calibration, or a key that is no more."""
    document(tunefork(*place.train("--method", method, "--adapter", "none")))
    out = place.folder / "out"
    (out / "result.json").unlink()
    with RunFolder.open(out, write=True) as run:
        newest = load_newest(run)
        assert newest is not None
        tensors, state = newest.tensors, newest.state
        if method == "zo":
            tensors["method"]["calibration"] = tensors["method"]["calibration"][:3]
        else:
            state["progress"]["mood"] = "good"
        save_checkpoint(run, newest.step, tensors, state, keep=1)
    said = tunefork("train", "--resume", "--out", out)
    assert said.code == 2
    assert "tunefork: A checkpoint must hold what this version goes on from." in said.sentence
    assert "step-00000002, written in another form by Tunefork" in said.sentence


@pytest.mark.parametrize("how", ["--out", "folder"])
def test_resume(how: str, place: Place, tunefork: Command) -> None:
    """With the folder alone, named either way; it may have been moved."""
    folder = place.run(finished=False).rename(place.folder / "moved")
    arguments = ["--out", folder] if how == "--out" else [folder]
    said = tunefork("train", *arguments, "--resume", "--json")
    assert document(said)["path"] == str(folder)
    assert "resumed at step 2" in said.err
    kept, now = ((f / "model" / "model.safetensors").read_bytes() for f in (place.kept, folder))
    assert kept == now
    assert document(tunefork("train", *arguments, "--resume", "--json"))["steps"] == 2  # finished: read back


def test_evaluate_a_run_and_a_model(place: Place, tunefork: Command) -> None:
    rows = place.rows()
    run = document(tunefork("evaluate", place.run(), "--test", rows, "--json"))
    assert run["rows"] == 24
    assert run["test"]["accuracy"].keys() == FIGURE_KEYS
    model = place.tiny("llama")
    bare = document(tunefork("evaluate", "--model", model, "--task", "classification", "--test", rows, "--json"))
    assert bare["model"] == str(model)
    assert bare["test"]["accuracy"]["n"] == 24


def test_evaluate_does_not_call_a_figure_of_one_row_exact(place: Place, tunefork: Command) -> None:
    said = tunefork("evaluate", place.run(), "--test", place.put("a.csv", reviews(1)))
    assert re.search(r"(0|1)\.000 \(no spread\)", said.out)
    assert "macro_f1: no spread over resamples of 1 row, which does not make it exact." in said.out


def test_evaluate_says_what_it_found_in_the_rows(place: Place, tunefork: Command) -> None:
    long = {"text": "The soup was lovely. " * 400, "label": "good"}
    rows = place.put("a.csv", [*reviews(), long, {"text": "Fine.", "label": "so so"}])
    arguments = ["evaluate", place.run(), "--test", rows, "--set", "data.max_unusable=0.1"]
    found = document(tunefork(*arguments, "--json"))
    assert found["rows"] == 25
    levels = {f["code"]: (f["level"], f["count"]) for f in found["findings"]}
    assert (levels["unusable-row"], levels["cut-row"]) == (("warning", 1), ("warning", 1))
    said = tunefork(*arguments)
    assert "1 row cut to fit" in said.out
    assert "a.csv:26: " in said.out


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_prompts_that_are_cut_before_text_is_generated_are_said(command: str, place: Place, tunefork: Command) -> None:
    rows = [{"prompt": f"Is room {i} free?", "completion": "Yes, it is."} for i in range(24)]
    more = ("--task", "generation", "--set", "task.max_new_tokens=4")
    document(tunefork(*place.train_on("a.jsonl", rows, *more)))
    new = place.put("b.jsonl", [*rows[:5], {"prompt": "And this room? " * 400, "completion": "No."}])
    arguments = ["predict", "out", new] if command == "predict" else ["evaluate", "out", "--test", new]
    found = document(tunefork(*arguments, "--json"))
    (cut,) = (f for f in found["findings"] if f["code"] == "cut-prompt")
    assert cut["count"] == 1
    assert "b.jsonl:6: " in cut["examples"][0]


@pytest.mark.parametrize(
    "name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.csv.gz", "rows.xlsx", "#1rows.csv"]
)
def test_predict_keeps_the_columns_and_adds_its_own(name: str, place: Place, tunefork: Command) -> None:
    rows = [{"id": str(i), "text": row["text"]} for i, row in enumerate(reviews(5))]
    from tunefork.data import write_rows

    write_rows(place.folder / name, rows)
    found = document(tunefork("predict", place.run(), place.folder / name, "--json"))
    path = place.folder / name.replace("rows.", "rows.predicted.")
    columns = ["prediction", "probability_bad", "probability_good", "prediction_missing_because"]
    assert found == {"path": str(path), "rows": 5, "predicted": 5, "columns": columns, "findings": []}
    written = [row.values for row in read_rows(path)[0]]
    assert list(written[0]) == ["id", "text", "prediction", "probability_bad", "probability_good"]
    for given, row in zip(rows, written, strict=True):
        assert (str(row["id"]), row["text"]) == (given["id"], given["text"])
        assert row["prediction"] in ("good", "bad")
        assert float(row["probability_bad"]) + float(row["probability_good"]) == pytest.approx(1, abs=1e-5)


def test_predict_says_which_rows_it_could_not(place: Place, tunefork: Command) -> None:
    rows = place.put("new.csv", as_csv([*reviews(2), {"text": " ", "label": "good"}]))
    out = place.folder / "said.xlsx"
    said = tunefork("predict", place.run(), rows, "--out", out)
    assert said.code == 0
    assert "2 of 3 rows predicted" in said.out
    table = list(openpyxl.load_workbook(out).active.iter_rows(values_only=True))  # type: ignore[union-attr]
    assert table[0][-1] == "prediction_missing_because"
    assert table[3][-1] == "the text must not be empty."
    assert table[1][-1] is None


def test_predict_says_of_every_row_why_it_could_not(place: Place, tunefork: Command) -> None:
    """More of a kind than findings name; rows that no reader can read keep their place too."""
    blank = [f'{{"text": " ", "label": "{i}"}}' for i in range(9)]
    lines = ["{broken", *blank, '["no object"]', '{"text": "The soup was lovely."}', '{"label": "good"}']
    found = document(tunefork("predict", place.run(), place.put("new.jsonl", "\n".join(lines)), "--json"))
    assert (found["rows"], found["predicted"]) == (13, 1)
    written = [json.loads(line) for line in (place.folder / "new.predicted.jsonl").read_text().splitlines()]
    reasons = [row.get("prediction_missing_because") for row in written]
    assert reasons[0].startswith("line 1 cannot be read: Expecting property name enclosed in double quotes at column 2")
    assert reasons[1:10] == ["the text must not be empty."] * 9
    assert [row["label"] for row in written[1:10]] == [str(i) for i in range(9)]
    assert reasons[10] == 'line 11 cannot be read: not an object: ["no object"]'
    assert reasons[11] is None and written[11]["prediction"] in ("good", "bad")
    assert "text" in reasons[12]


@pytest.mark.parametrize("name", ["new.csv", "new.xlsx"])
def test_predict_keeps_the_place_of_a_row_that_cannot_be_read(name: str, place: Place, tunefork: Command) -> None:
    rows = [["text", "label"], ["Lost.", "bad", "one too many"], *[[r["text"], r["label"]] for r in reviews(2)]]
    if name.endswith("csv"):
        with (place.folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)  # type: ignore[union-attr]
        book.save(place.folder / name)
    said = tunefork("predict", place.run(), name, "--out", "said.csv", "--json")
    assert (document(said)["rows"], document(said)["predicted"]) == (3, 2)
    written = list(csv.DictReader((place.folder / "said.csv").open()))
    assert list(written[0]) == ["text", "label", *document(said)["columns"]]
    why = {"new.csv": "3 fields, the header has 2", "new.xlsx": "values beyond the last named column (label)"}
    assert written[0].pop("prediction_missing_because") == f"line 2 cannot be read: {why[name]}"
    assert set(written[0].values()) == {""}
    assert [row["text"] for row in written[1:]] == [r["text"] for r in reviews(2)]


def test_predict_leaves_columns_of_its_own_names_alone(place: Place, tunefork: Command) -> None:
    mine = {"prediction": "rain", "probability_good_2": "7"}
    rows = place.put("new.csv", [{**row, **mine} for row in reviews(3)])
    found = document(tunefork("predict", place.run(), rows, "--json"))
    added = ["prediction_3", "probability_bad_3", "probability_good_3", "prediction_missing_because_3"]
    assert found["columns"] == added
    assert [f["code"] for f in found["findings"]] == ["columns-renamed"]
    for row in read_rows(found["path"])[0]:
        assert list(row.values) == ["text", "label", *mine, *added[:3]]
        assert {name: row.values[name] for name in mine} == mine
        assert row.values["prediction_3"] in ("good", "bad")


def test_predict_does_not_look_at_labels(place: Place, tunefork: Command) -> None:
    rows = place.put("new.csv", [{**row, "label": "never heard of"} for row in reviews(3)])
    found = document(tunefork("predict", place.run(), rows, "--json"))
    assert (found["predicted"], found["findings"]) == (3, [])


def test_predict_says_which_texts_were_cut(place: Place, tunefork: Command) -> None:
    rows = place.put("new.csv", [{**row, "text": row["text"] * 400} for row in reviews(3)])
    (cut,) = document(tunefork("predict", place.run(), rows, "--json"))["findings"]
    assert (cut["code"], cut["level"], cut["count"], cut["split"]) == ("cut-row", "warning", 3, "")
    assert "3 rows cut to fit" in tunefork("predict", place.folder / "kept", rows, "--overwrite").out


def test_a_file_that_is_there_is_replaced_when_asked_to(place: Place, tunefork: Command) -> None:
    taken = place.put("taken.csv", "mine")
    export = ("data", "export", "--task", "classification", "--train", place.rows(), "--folder", place.folder / "sent")
    place.put("sent/valid.jsonl", "mine")
    for command in (
        ("predict", place.run(), place.rows(), "--out", taken),
        ("demo", "--rows", taken),
        export,
    ):
        before = tree(place.folder)
        said = tunefork(*command)
        assert said.code == 2
        assert "must not be replaced unasked" in said.sentence
        assert tree(place.folder) == before
        document(tunefork(*command, "--overwrite", "--json"))
        assert tree(place.folder) != before


def test_chat_streams_from_what_is_piped_in(place: Place, tunefork: Command) -> None:
    place.patch.setattr("sys.stdin", io.StringIO("Is room 3 free?\nAnd room 4?\n"))
    said = tunefork("chat", place.tiny("llama"), "--max-new-tokens", 4, "--system", "Be brief.")
    assert said.code == 0, said.err
    assert len(said.out.split("\n")) >= 3
    assert said.err == ""


def test_chat_gives_a_line_of_json_a_reply(place: Place, tunefork: Command) -> None:
    place.patch.setattr("sys.stdin", io.StringIO("Is room 3 free?\n" + "And room 4? " * 80 + "\n"))
    said = tunefork("chat", place.tiny("llama"), "--max-new-tokens", 4, "--json")
    assert (said.code, said.err) == (0, "")
    first, second = map(json.loads, said.out.splitlines())
    assert first.keys() == second.keys() == {"reply", "left_out"}
    assert first["left_out"] == 0 < second["left_out"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_chat_beyond_the_models_positions_ends_and_says_so(kind: str, place: Place, tunefork: Command) -> None:
    place.patch.setattr("sys.stdin", io.StringIO("Hello. " * 80 + "\n" + "And now? " * 80 + "\n"))
    said = tunefork("chat", place.tiny(kind), "--max-new-tokens", 1000, "--temperature", 1, "--seed", 1)
    assert said.code == 0, said.err
    assert "tokens of the conversation no longer fit" in said.err


def test_chat_with_a_run_of_chats(place: Place, tunefork: Command) -> None:
    assert document(tunefork(*place.good_chat()))["metric"] == "loss"
    place.patch.setattr("sys.stdin", io.StringIO("Is room 3 free?\n\n"))
    assert tunefork("chat", place.folder / "out", "--max-new-tokens", 4).code == 0


def test_data_check(place: Place, tunefork: Command) -> None:
    arguments = ["data", "check", *place.train("--adapter", "lora")[2:]]
    before = tree(place.folder)
    found = document(tunefork(*arguments, "--json"))
    assert tree(place.folder) == before
    assert found["counts"]["train"]["rows"] == 17
    assert {"level", "code", "message", "count", "examples", "advice", "split"} == found["findings"][0].keys()
    said = tunefork(*arguments)
    assert "train: 17 rows" in said.out


def test_data_check_refuses_and_says_all(place: Place, tunefork: Command) -> None:
    rows = place.put("a.csv", [{**row, "text": "The same."} for row in reviews()])
    said = tunefork("data", "check", "--task", "classification", "--train", rows, "--json")
    assert said.code == 2
    found = {f["code"]: f["level"] for f in json.loads(said.out)["findings"]}
    assert (found["conflicting-labels"], found["leaked-exact"]) == ("error", "error")


def test_data_check_of_rows_of_which_none_is_usable(place: Place, tunefork: Command) -> None:
    said = tunefork("data", "check", "--task", "choice", "--train", place.rows(), "--json")
    assert said.code == 2
    assert "unusable-row" in {f["code"] for f in json.loads(said.out)["findings"]}


def test_data_show(place: Place, tunefork: Command) -> None:
    arguments = ["--task", "chat", "--train", place.put("chats.jsonl", chats()), "--model", place.tiny("llama")]
    (shown,) = document(tunefork("data", "show", *arguments, "--row", 3, "--json"))
    trained = "".join(text for text, _, role in shown["tokens"] if role == "trained")
    assert "is free" in trained
    assert "Is room" not in trained
    said = tunefork("data", "show", *arguments, "--split", "test")
    assert "trained" in said.out
    assert "chats.jsonl:" in said.out


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_data_show_shows_characters_and_the_right_class(kind: str, place: Place, tunefork: Command) -> None:
    """Tokens that only together make a character stand beside it; joined they are the text again."""
    text = "Nice 😀👩‍👩‍👧‍👦 שלום é, and so on." if kind == "llama" else "nice and so on."
    rows = [{**row, "text": f"{text} {i}"} for i, row in enumerate(reviews())]
    arguments = ["--task", "classification", "--train", place.put("a.csv", rows), "--model", place.tiny(kind)]
    (shown,) = document(tunefork("data", "show", *arguments, "--form", "head", "--json"))
    assert text in "".join(piece for piece, _, role in shown["tokens"] if role == "masked")
    name, number, role = shown["tokens"][-1]
    assert (role, ["bad", "good"][number]) == ("right class", name)
    said = tunefork("data", "show", *arguments, "--form", "head")
    assert f'right class "{name}"' in said.out
    if kind == "llama":
        assert '"ש"' in said.out
        assert "⋮" in said.out


def test_demo_rows_are_a_file_to_begin_with(place: Place, tunefork: Command) -> None:
    found = document(tunefork("demo", "--rows", "feedback.csv", "--json"))
    rows = read_rows(place.folder / "feedback.csv")[0]
    assert found == {"path": "feedback.csv", "rows": len(rows)}
    assert {row.values["label"] for row in rows} == {"positive", "neutral", "negative"}
    checked = tunefork("data", "check", "--task", "classification", "--train", "feedback.csv", "--json")
    assert document(checked)["counts"]["test"]["rows"] > 200


def test_export_and_what_is_exported_can_be_used(place: Place, tunefork: Command) -> None:
    place.patch.chdir(place.folder)
    document(tunefork(*place.train("--adapter", "lora", "--learning-rate", 0.01, "--max-steps", 3)))
    adapter = document(tunefork("export", "out", "--to", "adapter", "--json"))
    assert adapter == {"path": "out/export-adapter", "proof": None}
    merged = document(tunefork("export", "out", "--out", "merged", "--dtype", "fp32", "--json"))
    assert merged["proof"]["ratio"] <= 0.05
    rows = place.put("new.csv", reviews(4))
    said = [
        document(tunefork("predict", model, rows, "--out", f"{Path(str(model)).name}.csv", "--json"))["predicted"]
        for model in ("out", adapter["path"], "merged")
    ]
    assert said == [4, 4, 4]
    written = {name: (place.folder / f"{name}.csv").read_text() for name in ("out", "export-adapter")}
    assert written["out"] == written["export-adapter"]


def test_replay_of_a_run_begun_over_and_of_its_export(place: Place, tunefork: Command) -> None:
    """A run that ended before its first checkpoint is begun over with another recipe, and leaves no step behind."""
    place.patch.chdir(place.folder)
    arguments = place.train("--method", "zo", "--adapter", "none", "--set", "zo.epsilon=1e-3")
    document(tunefork(*arguments, "--learning-rate", 0.01))
    for name in ("result.json", "checkpoints", "model"):
        left = place.folder / "out" / name
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    document(tunefork(*arguments, "--learning-rate", 0.02))
    shipped = document(tunefork("export", "out", "--to", "trajectory", "--json"))
    assert shipped == {"path": "out/export-trajectory", "proof": {"step": 2, "tensors": 28, "bitwise": True}}
    base, rows = place.tiny("llama"), place.put("new.csv", reviews(4))
    for source, out in (("out", "a"), ("out/export-trajectory", "b")):
        found = document(tunefork("replay", base, source, "-o", out, "--json"))
        assert (found["path"], found["step"], found["steps"]) == (out, 2, 2)
        kept, again = ((Path(f) / "adapter_model.safetensors").read_bytes() for f in ("out/model", out))
        assert kept == again
        assert document(tunefork("predict", out, rows, "--out", f"{out}.csv", "--json"))["predicted"] == 4
    said = tunefork("replay", base, "out", "-o", "first", "--step", 1)
    assert said.code == 0
    assert "step 1 of 2 rebuilt" in said.out
    assert "replaying steps 0 to 1" in said.out + said.err
    assert "left out" not in said.out
    with (place.folder / "out" / "trajectory").open("ab") as torn:
        torn.write(b"torn")
    assert "left out: 4 bytes of a step" in tunefork("replay", base, "out", "-o", "torn").out
    for where, model, *step in (("beyond", base, "--step", 3), ("adapter", "out/model"), ("else", place.tiny("gpt2"))):
        said = tunefork("replay", model, "out", "-o", where, *step)
        assert said.code == 2
        assert "replaying" not in said.out + said.err, "what cannot be done is not announced"
        says = {
            "beyond": "must be from 0 to 2",
            "adapter": "holds an adapter, not a model",
            "else": "it was trained on",
        }
        assert says[where] in said.sentence


def test_report(place: Place, tunefork: Command) -> None:
    page = place.run() / "report.html"
    page.unlink()
    for _ in range(2):
        said = tunefork("report", page.parent)
        assert (said.code, said.out) == (0, f"{page}\n")
    assert document(tunefork("report", page.parent, "--json")) == {"path": str(page)}
    assert page.read_text().startswith("<!doctype html>")


def test_methods_and_tasks(tunefork: Command) -> None:
    assert [m["name"] for m in document(tunefork("methods", "--json"))] == ["backprop", "hosted", "zo"]
    names = [t["name"] for t in document(tunefork("tasks", "--json"))]
    assert {"classification", "choice", "generation", "chat", "scoring", "sst2", "copa", "squad"} <= set(names)
    for command, shown in (("methods", "AdamW"), ("tasks", "sst2")):
        said = tunefork(command)
        assert said.code == 0
        assert shown in said.out


@pytest.mark.slow
def test_doctor(tunefork: Command) -> None:
    checks = {check["name"]: check for check in document(tunefork("doctor", "--json"))}
    assert checks["training"]["ok"] is True
    assert checks.keys() >= {"python", "torch", "device", "memory", "disk", "extra qlora"}


@pytest.mark.slow
def test_compare(place: Place, tunefork: Command) -> None:
    arguments = ["compare", *place.train("--set", "evaluate.baselines=[majority]")[1:], "--methods", "backprop/lora"]
    found = document(tunefork(*arguments))
    assert [cell["name"] for cell in found["cells"]] == ["majority", "backprop/lora"]
    trained = found["cells"][1]
    assert trained["error"] is None
    assert trained["against_best_baseline"]["baseline"] == "majority"
    assert trained["peak_memory_bytes"] > 0
    assert json.loads((place.folder / "out" / "comparison.json").read_text())["metric"] == "accuracy"
    assert found["advice"] is None


@pytest.mark.slow
def test_compare_again_keeps_what_is_measured_and_a_cell_that_failed_is_exit_code_1(
    place: Place, tunefork: Command
) -> None:
    given = ["compare", *place.train("--set", "evaluate.baselines=[majority]")[1:], "--methods", "none"]
    out = place.folder / "out"
    first = document(tunefork(*given))
    written = (out / "cells" / "none" / "result.json").stat().st_mtime_ns
    assert document(tunefork(*given)) == first
    assert (out / "cells" / "none" / "result.json").stat().st_mtime_ns == written
    other = tunefork(*given, "--seed", 7)
    assert (other.code, "was begun with other methods, settings or rows" in other.sentence) == (2, True)

    kept = json.loads((out / "comparison.json").read_text())
    kept["cells"][1]["error"] = "It failed."
    (out / "comparison.json").write_text(json.dumps(kept))
    (out / "cells" / "none" / "recipe.yaml").write_text("}")  # and it fails again
    said = tunefork(*[a for a in given if a != "--json"])
    assert said.code == 1
    assert "none failed: " in said.out and "majority" in said.out
    assert [c["error"] is None for c in json.loads((out / "comparison.json").read_text())["cells"]] == [True, False]


def test_compare_checks_every_cell_before_the_first_begins(place: Place, tunefork: Command) -> None:
    said = tunefork("compare", *place.train("--model", place.tiny("bert"))[1:], "--methods", "lora,prefix")
    assert (said.code, "prefix is offered for causal models" in said.sentence) == (2, True)
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize(
    ("methods", "given", "says"),
    [
        ("zo/none", "train.betas=[0.8, 0.9]", "`train.betas` is read by the method backprop"),
        ("zo/none", "train.activation_checkpointing=true", "saves memory in a backward pass"),
        ("backprop/lora,none", "zo.queries=4", "`zo.queries` is read by the method zo"),
        ("backprop/lora", "zo.objective=accuracy", "needs a gradient"),
        ("zo/none,backprop/lora", "zo.objective=acuracy", "Did you mean"),
        (
            "zo/lora",
            "zo.max_rank=8",
            "directions are low_rank. Received rademacher ones (preset default, adapter lora)",
        ),
        (
            "zo/none,zo/lora",
            "train.learning_rate=0.01",
            "Received backprop, and methods zo/none, zo/lora. Try --method zo",
        ),
    ],
)
def test_compare_refuses_what_no_cell_reads(
    place: Place, tunefork: Command, methods: str, given: str, says: str
) -> None:
    said = tunefork("compare", *place.train("--set", given)[1:], "--methods", methods)
    assert (said.code, says in said.sentence) == (2, True), said.sentence
    assert not (place.folder / "out").exists()


@pytest.mark.slow
def test_compare_sets_zo_beside_back_propagation(place: Place, tunefork: Command) -> None:
    """Each with settings of its own, under one limit of memory."""
    given = place.train("--learning-rate", 0.01, "--set", "train.betas=[0.8, 0.9]")[1:]
    given += ["--set", "zo.calibrate=false", "--set", "zo.queries=4", "--set", "zo.objective=accuracy"]
    methods = ["--methods", "zo/none,backprop/lora"]
    found = document(tunefork("compare", *given, *methods, "--memory-limit", "4G"))
    assert [cell["error"] for cell in found["cells"]] == [None, None]
    assert [cell["activation_checkpointing"] for cell in found["cells"]] == [False, True]
    advice = found["advice"]
    assert advice["use"] in ("zo/none", "backprop/lora")
    assert advice["memory_limit_bytes"] == 4 * 2**30
    assert advice["difference"]["low"] <= advice["difference"]["difference"] <= advice["difference"]["high"]
    assert json.loads((place.folder / "out" / "comparison.json").read_text())["advice"] == advice
    zo, backprop = [
        json.loads((place.folder / "out" / "cells" / c / "result.json").read_text())["recipe"]
        for c in ("zo-none", "backprop-lora")
    ]
    assert (backprop["train"]["learning_rate"], zo["train"]["learning_rate"]) == (0.01, None)
    assert (backprop["train"]["betas"], zo["train"]["betas"]) == ([0.8, 0.9], [0.9, 0.999])
    found = [(r["zo"]["calibrate"], r["zo"]["queries"], r["zo"]["objective"]) for r in (zo, backprop)]
    assert found == [(False, 4, "accuracy"), (None, None, "loss")]
    said = tunefork("compare", *given[:-2], "--out", "small", *methods, "--memory-limit", "4Q")
    assert (said.code, "must be a number with K, M, G or T" in said.sentence) == (2, True)


@pytest.mark.slow
def test_compare_cuts_micro_batches_to_the_limit_and_says_what_still_breaks_it(place: Place, tunefork: Command) -> None:
    given = [a for a in place.train("--method", "zo")[1:] if a != "--json"]
    said = tunefork("compare", *given, "--methods", "zo/none,backprop/lora", "--memory-limit", "1K")
    assert said.code == 0
    assert "Neither fits: backprop/lora with activation checkpointing took" in said.out
    for name in ("zo-none", "backprop-lora"):
        kept = json.loads((place.folder / "out" / "cells" / name / "result.json").read_text())["recipe"]
        assert kept["train"]["micro_batch_size"] == 1
