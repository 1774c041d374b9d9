"""What a hosted run has made is predicted with and talked with like a model of one's own; its weights stay there."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.clouds import Cloud, serving_cloud
from tests.hosted.host import KEY
from tunefork.cli import main
from tunefork.errors import RecipeError, UnsupportedError
from tunefork.export.exporting import export
from tunefork.workflows import Chat, compare, finetune, predict, show_data

TUNED = "fork.ft-b044a9d3cf9c4228"


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv("TUNEFORK_API_KEY", KEY)
    with serving_cloud(Cloud("/v1", deployed={TUNED})) as cloud:
        yield cloud


def tuned_run(cloud: Cloud, folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(
        {
            "model": f"{cloud.url}/v1#fork",
            "task": task,
            "data": {"train": str(file)},
            "train": {"method": "hosted"},
            "evaluate": {"bootstrap": 100, "baselines": []},
            "hosted": {"cache": str(folder / "cache"), "limit": 0, "top_logprobs": 0, "system": "Be short."},
            "out": str(folder / "run"),
        }
    )
    return folder / "run"


def colours(count: int = 20) -> list[dict[str, Any]]:
    return [{"text": f"the sea number {i}", "label": ("teal", "coral")[i % 2]} for i in range(count)]


def test_a_file_is_predicted_by_the_tuned_model(cloud: Cloud, tmp_path: Path) -> None:
    run, file = tuned_run(cloud, tmp_path, "classification", colours()), tmp_path / "new.csv"
    file.write_text("id,text\n1,a reef\n2,\n3,an odd one\n4,a filtered one\n")
    cloud.says = {"an odd one": "mauve", "a filtered one": None}
    found = predict(run, file)
    with found.path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["id"], row["prediction"], row["probability_teal"]) for row in rows] == [
        ("1", "teal", "1.0"),
        ("2", "", ""),
        ("3", "", ""),
        ("4", "", ""),
    ]
    whys = [row["prediction_missing_because"] for row in rows]
    assert "names no label: 'mauve'" in whys[2] and "filtered" in whys[3] and whys[1] and not whys[0]
    assert cloud.asked[-1]["messages"][0] == {"role": "system", "content": "Be short."}
    with pytest.raises(UnsupportedError, match="evaluate --model"):
        predict(f"{cloud.url}/v1#fork", file, tmp_path / "other.csv")


def test_it_must_be_confirmed_where_the_run_set_no_limit(cloud: Cloud, tmp_path: Path) -> None:
    run, file = tuned_run(cloud, tmp_path, "classification", colours()), tmp_path / "new.csv"
    file.write_text("text\na reef\n")
    result = json.loads((run / "result.json").read_text())
    result["recipe"]["hosted"]["limit"] = None
    (run / "result.json").write_text(json.dumps(result))
    with pytest.raises(RecipeError, match="1 requests"):
        predict(run, file)
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(run), str(file), "--yes"])
    assert caught.value.code == 0


def test_a_conversation(cloud: Cloud, tmp_path: Path) -> None:
    talk = Chat(f"{cloud.url}/v1#{TUNED}", system="You are the sea.", temperature=0.5)
    assert list(talk.say("Who?")) == ["teal"]
    assert list(talk.say("And?")) == ["teal"]
    assert [m["role"] for m in cloud.asked[-1]["messages"]] == ["system", "user", "assistant", "user"]
    assert (cloud.asked[-1]["temperature"], cloud.asked[-1]["max_tokens"]) == (0.5, 256)
    rows = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]} for i in range(20)
    ]
    assert list(Chat(tuned_run(cloud, tmp_path, "chat", rows)).say("Who?")) == ["teal"]
    assert [m["content"] for m in cloud.asked[-1]["messages"]] == ["Be short.", "Who?"]


def test_what_a_service_keeps_is_refused_by_name(cloud: Cloud, tmp_path: Path) -> None:
    run = tuned_run(cloud, tmp_path, "classification", colours())
    with pytest.raises(UnsupportedError, match="predict"):
        Chat(run)
    with pytest.raises(UnsupportedError, match="whose model a service keeps"):
        export(run)
    recipe = {
        "model": f"{cloud.url}/v1#fork",
        "task": "classification",
        "data": {"train": str(tmp_path / "rows.jsonl")},
    }
    with pytest.raises(UnsupportedError, match="--method hosted"):
        compare(recipe)
    with pytest.raises(UnsupportedError, match="data export"):
        show_data(recipe)
