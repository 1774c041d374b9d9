"""`azure:` and `nebius:` as those services document themselves: what is sent, waited for, and asked in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hosted.clouds import Cloud, serving_cloud
from tests.hosted.host import KEY
from tunefork.cli import main
from tunefork.errors import HostedError, RunError
from tunefork.hosted import services
from tunefork.workflows import evaluate, finetune, name_deployment, tuned_model


def recipe(folder: Path, model: str, **hosted: Any) -> dict[str, Any]:
    file = folder / "things.csv"
    file.write_text("text,label\n" + "".join(f"the sea number {i},{('teal', 'coral')[i % 2]}\n" for i in range(30)))
    return {
        "model": model,
        "task": "classification",
        "data": {"train": str(file)},
        "train": {"method": "hosted"},
        "evaluate": {"bootstrap": 100, "baselines": ["majority"]},
        "hosted": {"cache": str(folder / "cache"), "top_logprobs": 0, **hosted},
        "out": str(folder / "run"),
    }


def agree(given: dict[str, Any], **options: Any) -> Any:
    from tunefork.workflows import Listener

    class Agreeing(Listener):
        def confirm(self, estimate: Any) -> bool:
            return True

    return finetune(given, listener=Agreeing(), **options)


def test_azure_is_sent_what_its_pages_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths below /openai/v1, no api-version, marked files, a wait until they are read, and a deployment at the end."""
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    with serving_cloud(Cloud("/openai/v1", marked=True)) as azure:
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", f"{azure.url}/openai/v1/")
        given = recipe(tmp_path, "azure:gpt-4.1-mini-2025-04-14", job={"trainingType": "GlobalStandard"}, suffix="sea")
        with pytest.raises(HostedError, match=r"deploy gpt-4.1-mini-2025-04-14.ft-b044a9d3cf9c4228 and say its name"):
            agree(given)
        (job,) = azure.jobs
        assert (job["trainingType"], job["suffix"], job["seed"]) == ("GlobalStandard", "sea", 0)
        assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": {}}}
        assert azure.looks >= 3  # two files, the first one looked at twice
        assert azure.queries <= {"purpose", "limit", "after"}
        assert azure.refused == ["404 POST /openai/v1/chat/completions"] * len(azure.refused)
        with pytest.raises(RunError, match=r"recipe.yaml"):
            name_deployment(tmp_path, "sea")
        azure.deployed.add("sea")
        with pytest.raises(SystemExit) as caught:
            main(["hosted", "deployed", str(tmp_path / "run"), "sea"])
        assert caught.value.code == 0
        result = agree(given, resume=True).result
        assert result["hosted"]["model"] == "sea"
        assert result["test"]["accuracy"]["n"] == 6
        assert len(azure.jobs) == 1
        assert tuned_model(tmp_path / "run") == "azure:sea"
        found = evaluate(tmp_path / "run", given["data"]["train"], confirm=lambda estimate: True)
        assert found.metrics["accuracy"]["value"] == 0.5
    assert [path.name for path in (tmp_path / "run" / "result_files").iterdir()] == ["file-r.csv"]  # not the weights
    assert (tmp_path / "run" / "train.jsonl").read_bytes().startswith(b"\xef\xbb\xbf{")


def test_a_file_that_a_service_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    with serving_cloud(Cloud("/openai/v1", marked=True, wrong="line 3 is no JSON")) as azure:
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", azure.url)
        with pytest.raises(HostedError, match=r"train.jsonl: line 3 is no JSON\. Try"):
            agree(recipe(tmp_path, "azure:gpt-4.1-mini"))
        assert not azure.jobs


def test_nebius_is_sent_numbers_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `method`, no "auto"; LoRA by `hosted.job`; what was made has no name until it is deployed."""
    monkeypatch.setenv("NEBIUS_API_KEY", KEY)
    with serving_cloud(Cloud("/v1", flat=True, names_models=False)) as nebius:
        entry = services._known()["nebius"]
        monkeypatch.setitem(entry, "base_url", f"{nebius.url}/v1")
        extra = {"hyperparameters": {"lora": True, "learning_rate": 1e-4}}
        given = recipe(tmp_path, "nebius:meta-llama/Llama-3.1-8B", job=extra)
        given["train"]["epochs"] = 2
        with pytest.raises(HostedError, match=r"Received: no name of it.*deploy ftjob-1"):
            agree(given)
        assert nebius.jobs[0]["hyperparameters"] == {"n_epochs": 2, "lora": True, "learning_rate": 1e-4}
        assert not nebius.refused
        assert tuned_model(tmp_path / "run") is None
        nebius.deployed.add("meta-llama/Llama-3.1-8B-LoRa:sea-AbCd")
        name_deployment(tmp_path / "run", "meta-llama/Llama-3.1-8B-LoRa:sea-AbCd")
        assert agree(given, resume=True).result["test"]["accuracy"]["n"] == 6
    state = json.loads((tmp_path / "run" / "hosted.json").read_text())
    assert state["deployed"].endswith("sea-AbCd")
