"""A base that brings Python code of its own: every command that would run it asks first, and none asks the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.places import Place
from tests.cli.scenes import Command, reviews

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
class OwnConfig(LlamaConfig):
    model_type = "own-thing"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def base_with_code(place: Place) -> Path:
    """A tiny Llama under the name of classes that only the file beside it defines."""
    folder = place.model()
    (folder / "own.py").write_text(OWN)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-thing", "architectures": ["OwnModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(("adapter", "method"), [("lora", "zo"), ("none", "zo"), ("none", "backprop")])
def test_code_of_a_base_runs_where_the_command_says_so(
    adapter: str, method: str, place: Place, tunefork: Command
) -> None:
    base, run, rows = base_with_code(place), place.folder / "out", place.put("some.csv", reviews(4))
    train = place.train("--model", base, "--adapter", adapter, "--set", f"train.method={method}")
    assert "trust_remote_code" in tunefork(*train).sentence
    assert tunefork(*train, "--set", "model.trust_remote_code=true").code == 0
    commands = [
        ["evaluate", run, "--test", rows],
        ["predict", run, rows, "--out", place.folder / "predicted.csv"],
        ["export", run, "--to", "merged"],
    ]
    if adapter == "lora":
        commands.append(["export", run, "--to", "adapter"])
    if method == "zo":
        commands.append(["export", run, "--to", "trajectory"])
        commands.append(["replay", base, run, "--out", place.folder / "replayed"])
    for command in commands:
        refused = tunefork(*command)
        assert refused.code != 0 and "Try --trust-remote-code" in refused.sentence, command
        done = tunefork(*command, "--trust-remote-code")
        assert done.code == 0, (command, done.err)
    for card in run.glob("export-*/README.md"):
        assert "rows.csv --trust-remote-code`" in card.read_text() and "`trust_remote_code=True`" in card.read_text()
