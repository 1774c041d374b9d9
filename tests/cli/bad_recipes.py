"""Recipes, flags and models that cannot be meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.cli.places import Arguments, Case, Place
from tests.cli.scenes import chats, reviews

YAML = "task: classification\ndata: {train: rows.csv}\n"


def with_adapter_only(place: Place) -> Path:
    model = place.model()
    (model / "config.json").rename(model / "adapter_config.json")
    return model


def without(place: Place, *names: str) -> Path:
    model = place.model()
    for name in names:
        (model / name).unlink()
    return model


def cut_weights(place: Place) -> Path:
    model = place.model()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return model


def pickled(place: Place) -> Path:
    model = without(place, "model.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return model


def configured(place: Place, **changes: Any) -> Path:
    model = place.model()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    return model


def broken_config(place: Place) -> Path:
    model = place.model()
    (model / "config.json").write_text("{")
    return model


def wide_prompt(place: Place) -> Arguments:
    """Prompts that are all longer than 12 tokens."""
    return place.train("--max-length", 12)


def masked(place: Place, *more: object) -> Arguments:
    return place.train("--model", place.tiny("bert"), *more)


def set_(path: str, value: object) -> Any:
    return lambda place: place.train("--set", f"{path}={value}")


def model(make: Any) -> Any:
    return lambda place: place.train("--model", make(place))


def gguf(place: Place) -> Path:
    shutil.rmtree(without(place, "model.safetensors"), ignore_errors=True)
    (place.folder / "model").mkdir()
    return place.put("model/model.gguf", b"GGUF").parent


FILES = (
    Case(
        "typo in a key",
        lambda p: p.train_with(YAML + "train: {learning_rte: 1e-4}\n"),
        ("`train.learning_rte`", "Did you mean `train.learning_rate`?"),
    ),
    Case("key in the wrong section", lambda p: p.train_with(YAML + "learning_rate: 1e-4\n"), ("train.learning_rate",)),
    Case("section misspelt", lambda p: p.train_with(YAML + "adaptor: lora\n"), ("`adaptor`", "Did you mean `adapter`")),
    Case("yaml broken", lambda p: p.train_with("task: [sst2\n"), ("valid YAML", "line 2")),
    Case("yaml with tabs", lambda p: p.train_with("data:\n\ttrain: rows.csv\n"), ("valid YAML", "line 2")),
    Case("yaml key given twice", lambda p: p.train_with("task: sst2\ntask: rte\n"), ("given twice", "line 2")),
    Case("yaml is a list", lambda p: p.train_with("- sst2\n"), ("must be a mapping",)),
    Case("yaml is empty", lambda p: p.train_with(""), ("must be a mapping",)),
    Case("yaml is latin-1", lambda p: p.train_with("task: köstlich".encode("latin-1")), ("UTF-8",)),
    Case("yaml value of another type", lambda p: p.train_with(YAML + "train: 5\n"), ("`train`", "Received 5")),
    Case("no such recipe", lambda p: ["train", "recpie.yaml", p.put("recipe.yaml", YAML), "--json"][:2], ("recpie",)),
    Case("a folder that is no run", lambda p: ["train", p.folder, "--json"], ("recipe.yaml",)),
    Case("rows for a recipe", lambda p: ["train", p.rows(), "--json"], ("must be a mapping", "try --train")),
    Case(
        "rows in jsonl for a recipe",
        lambda p: ["train", p.put("a.jsonl", chats()), "--json"],
        ("If it holds rows, try --train {folder}/a.jsonl",),
    ),
    Case(
        "a model for a run",
        lambda p: ["evaluate", p.model(), "--task", "sst2", "--test", p.rows()],
        ("If '{folder}/model' is a model, try --model {folder}/model",),
    ),
    Case("no task", lambda p: ["train", "--json", "--train", p.rows()], ("`task` must be given",)),
)

NAMES = (
    Case("task misspelt", lambda p: p.train("--task", "clasification"), ("Did you mean `classification`?",)),
    Case("preset misspelt", lambda p: p.train("--task", "sst-2"), ("Did you mean `sst2`?",)),
    Case("adapter misspelt", lambda p: p.train("--adapter", "lroa"), ("`adapter.name`", "Did you mean `lora`?")),
    Case("method misspelt", lambda p: p.train("--method", "backprob"), ("Did you mean `backprop`?",)),
    Case(
        "a service's method to compare",
        lambda p: ["compare", *p.train("--methods", "hosted/lora")[1:]],
        ("of a method that trains here", "Try lora"),
    ),
    Case(
        "a method without an adapter to compare",
        lambda p: ["compare", *p.train("--methods", "zo,lora")[1:]],
        ("Received 'zo'. Try zo/none.",),
    ),
    Case("metric misspelt", set_("task.metric", "acuracy"), ("Did you mean `accuracy`?",)),
    Case("layout misspelt", lambda p: p.train("--layout", "opnai"), ("Did you mean `openai`?",)),
    Case("baseline misspelt", set_("evaluate.baselines", "[majorty]"), ("Did you mean `majority`?",)),
    Case("baseline of another task", set_("evaluate.baselines", "[lead3]"), ("lead3",)),
    Case("dtype unknown", lambda p: p.train("--dtype", "int3"), ("`model.dtype`", "'int3'")),
    Case("device unknown", lambda p: p.train("--device", "tpu"), ("`model.device`", "'tpu'")),
    Case("several devices", lambda p: p.train("--device", "cuda:0,cuda:1"), ("one device", "CUDA_VISIBLE_DEVICES")),
    Case("device not there", lambda p: p.train("--device", "cuda"), ("cuda", "--device cpu")),
    Case("form unknown", lambda p: p.train("--form", "verbaliser"), ("Did you mean `verbalizer`?",)),
)

VALUES = (
    Case("--set without =", lambda p: p.train("--set", "train.epochs"), ("path=value", "'train.epochs'")),
    Case("--set of nothing", lambda p: p.train("--set", "=3"), ("path=value",)),
    Case("--set of an unknown key", set_("train.lerning_rate", 1), ("Did you mean `train.learning_rate`?",)),
    Case("--set inside a value", set_("seed.x", 1), ("`seed`",)),
    Case("--set of a section", set_("train", 3), ("`train`", "Received 3")),
    Case("learning rate 2", lambda p: p.train("--learning-rate", 2), ("`train.learning_rate`", "less than 1")),
    Case("learning rate in words", lambda p: p.train("--learning-rate", "fast"), ("learning_rate", "'fast'")),
    Case("learning rate NaN", lambda p: p.train("--learning-rate", ".nan"), ("learning_rate", "finite")),
    Case("no steps", lambda p: p.train("--max-steps", 0), ("`train.max_steps`", "Received 0")),
    Case("half a step", lambda p: p.train("--max-steps", 1.5), ("`train.max_steps`", "1.5")),
    Case("epochs negative", lambda p: p.train("--epochs", -1), ("`train.epochs`", "Received -1")),
    Case("epochs infinite", lambda p: p.train("--epochs", ".inf"), ("`train.epochs`",)),
    Case("batch of none", lambda p: p.train("--batch-size", 0), ("`train.batch_size`", "Received 0")),
    Case("rank 0", set_("adapter.rank", 0), ("`adapter.rank`", "Received 0")),
    Case("alpha negative", set_("adapter.alpha", -4), ("`adapter.alpha`", "Received -4")),
    Case("betas of 1", set_("train.betas", "[0.9, 1.0]"), ("`train.betas.1`", "less than 1")),
    Case("three betas", set_("train.betas", "[0.9, 0.9, 0.9]"), ("`train.betas`",)),
    Case("seed negative", lambda p: p.train("--seed", -1), ("`seed`", "Received -1")),
    Case("--seeds negative", lambda p: p.train("--seeds", -1), ("--seeds", "greater than or equal to 1")),
    Case("--labels without names", lambda p: p.train("--labels", "good,bad"), ("value=name", "'good,bad'")),
    Case("--labels with one name", lambda p: p.train("--labels", "good=x,bad=x"), ("two different",)),
    Case(
        "--labels of some labels only",
        lambda p: p.train_on("a.csv", reviews(24, ("good", "bad", "so so")), "--labels", "good=yes,bad=no"),
        ("8 rows of 24 with `so so`", "Try adding 'so so=NAME'", "data.max_unusable=1"),
    ),
    Case(
        "demonstrations that nobody shows",
        set_("evaluate.demonstrations", 8),
        ("is read by the baseline in_context", "no baselines"),
    ),
    Case("fractions leave nothing", set_("data.dev_fraction", 0.9), ("`data.dev_fraction`", "less than 0.5")),
    Case(
        "a share beside a file",
        lambda p: p.train("--test", p.rows("test.csv"), "--set", "data.test_fraction=0.3"),
        ("`data.test_fraction`", "one of the two"),
    ),
    Case("revision of a folder", set_("model.revision", "v1"), ("`model.revision`", "'v1'")),
    Case("unknown flag", lambda p: p.train("--lerning-rate", 1), ("No such option", "--learning-rate")),
    Case("unknown command", lambda p: ["trian"], ("No such command", "'train'")),
    Case("a flag without its value", lambda p: ["train", "--task"], ("--task", "requires an argument")),
)

WORDINGS = (
    Case("prompt with an unknown field", lambda p: p.train("--prompt", "{{ txet }}"), ("`txet`", "`text`?")),
    Case("prompt without a field", lambda p: p.train("--prompt", "Well?"), ("`task.prompt`", "the same for every row")),
    Case("prompt with a syntax error", lambda p: p.train("--prompt", "{{ text"), ("`task.prompt`", "Jinja")),
    Case("prompt with an unknown filter", lambda p: p.train("--prompt", "{{ text|shout }}"), ("shout",)),
    Case("prompt that is code", lambda p: p.train("--prompt", "{{ ''.__class__.__mro__ }}"), ("`task.prompt`",)),
    Case("masked prompt without a mask", lambda p: masked(p, "--prompt", "{{ text }}"), ("[MASK]",)),
    Case(
        "masked label of several tokens",
        lambda p: masked(p, "--labels", "good=supercalifragilistic,bad=bad"),
        ("one token", "supercalifragilistic"),
    ),
    Case("two labels that are one", lambda p: p.train("--labels", "good=yes ,bad=yes"), ("two different",)),
    Case("prompt that is empty", lambda p: p.train("--prompt", ""), ("`task.prompt`", "the same for every row")),
    Case("prompt set to nothing", set_("task.prompt", ""), ("`task.prompt`", "the same for every row")),
    Case("setting of another task", set_("task.choices", "[a, b]"), ("`task.choices`", "no use for it")),
    Case("length too small", wide_prompt, ("max_cut", "model.max_length")),
    Case("length too small to mean anything", lambda p: p.train("--max-length", 4), ("`model.max_length`", "8")),
    Case("length too large", lambda p: p.train("--max-length", 300), ("256",)),
)

MODELS = (
    Case("no such folder", model(lambda p: p.model().parent / "modle"), ("modle", "`{folder}/model`?")),
    Case(
        "hub out of reach",
        lambda p: p.train("--model", "nobody/nothing"),
        ("'nobody/nothing'", "not in the cache, and the hub is not asked (offline)", "hf download"),
    ),
    Case(
        "a run that is not there",
        lambda p: ["chat", p.put("runs/one/x", "").parents[1].name + "/nope"],
        ("the folder `runs` has none of that name",),
    ),
    Case("a file", model(lambda p: p.rows()), ("Received the file", "Try its folder")),
    Case("no config", model(lambda p: without(p, "config.json")), ("must hold config.json",)),
    Case("config broken", model(broken_config), ("config.json",)),
    Case("architecture unknown", model(lambda p: configured(p, model_type="lama")), ("lama",)),
    Case("encoder-decoder", model(lambda p: configured(p, model_type="t5", architectures=["T5Model"])), ("T5",)),
    Case("no weights", model(lambda p: without(p, "model.safetensors")), ("must have weights", "safetensors")),
    Case("weights cut short", model(cut_weights), ("whole safetensors", "Try downloading it again")),
    Case("weights pickled", model(pickled), ("pytorch_model.bin", "safetensors")),
    Case("gguf", model(gguf), ("config.json",)),
    Case("an adapter", model(with_adapter_only), ("which holds an adapter",)),
    Case("no tokenizer", model(lambda p: without(p, "tokenizer.json", "tokenizer_config.json")), ("tokenizer",)),
    Case("prefix on a masked model", lambda p: masked(p, "--adapter", "prefix"), ("prefix", "--adapter lora")),
    Case("targets of full training", set_("adapter.targets", "[nope]"), ("`adapter.targets`", "--adapter lora")),
    Case("rank of a head", set_("adapter", "{name: head, rank: 4}"), ("head", "Try --adapter lora")),
    Case("adapter head in chat", lambda p: p.good_chat("--adapter", "head"), ("classification head", "chat")),
    Case("head form in chat", lambda p: p.chat(chats(), "--form", "head"), ("`task.form`", "no use for it")),
    Case("generation by a masked model", lambda p: masked(p, "--task", "generation"), ("needs a causal model",)),
    Case("chat template not there", lambda p: masked(p, "--set", "task.chat_template=true"), ("`task.chat_template`",)),
)

CASES = (*FILES, *NAMES, *VALUES, *WORDINGS, *MODELS)
