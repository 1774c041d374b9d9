"""One Recipe, equal from YAML, flags or Python; what cannot be meant is refused with a sentence."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefork.cli.options import overrides_from
from tunefork.errors import MissingFileError, RecipeError
from tunefork.recipe import ALIASES, Recipe, all_paths, dump_recipe, load_recipe, make_recipe, parse_labels, parse_sets
from tunefork.recipe.schema import AdapterSection, DataSection, TaskSection, TrainSection


def test_yaml_flags_and_python_give_the_same_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: some/model\ntask: classification\nadapter: lora\nout: runs/x\nseed: 3\n"
        "data:\n  train: a.csv\n  fields: {text: review, label: stars}\n  labels: {0: bad, 1: good}\n"
        "train:\n  max_steps: 200\n  learning_rate: 1e-4\n"
    )
    flags = {
        "model": "some/model",
        "task": "classification",
        "adapter": "lora",
        "out": "runs/x",
        "seed": "3",
        "train": "a.csv",
        "text_field": "review",
        "label_field": "stars",
        "labels": "0=bad,1=good",
        "max_steps": "200",
        "learning_rate": "1e-4",
    }
    python = Recipe(
        model={"name": "some/model"},  # type: ignore[arg-type]
        task=TaskSection(name="classification"),
        adapter=AdapterSection(name="lora"),
        data=DataSection(train="a.csv", fields={"text": "review", "label": "stars"}, labels={"0": "bad", "1": "good"}),
        train=TrainSection(max_steps=200, learning_rate=1e-4),
        out="runs/x",
        seed=3,
    )
    assert load_recipe(file) == load_recipe(None, overrides_from(flags, [])) == python


def test_every_alias_names_a_path_of_the_recipe() -> None:
    paths = {path for path, _ in all_paths()}
    for path in ALIASES.values():
        assert path in paths or path.rpartition(".")[0] in paths


def test_every_field_says_what_it_is() -> None:
    assert [path for path, info in all_paths() if not info.description] == []


def test_set_wins_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("task: sst2\ntrain: {epochs: 1, batch_size: 4, warmup: 0.5}\n")
    recipe = load_recipe(file, overrides_from({"epochs": "2", "batch_size": "8"}, ["train.epochs=3"]))
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.warmup) == (3, 8, 0.5)


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    recipe = make_recipe({"task": "trec", "data": {"labels": {"no": 'No: "x"', "1": "yes"}}, "train": {"epochs": 2}})
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


TEXTS = st.text(min_size=1) | st.sampled_from(
    ["yes", "1e-4", "0x1", "null", "~", "1_000", "\x85", "\u2028", "a: b", "- x"]
)


@given(st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=4))
def test_labels_survive_yaml(labels: dict[str, str]) -> None:
    recipe = make_recipe({"task": "classification", "data": {"labels": labels}})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
        assert load_recipe(file).data.labels == labels


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"task": "sst2", "train": {"learnin_rate": 1e-4}}, "Did you mean `train.learning_rate`?"),
        ({"task": "sst2", "learning_rate": 1e-4}, "Did you mean `train.learning_rate`?"),
        ({"task": "sst2", "train": {"learning_rate": 2}}, "`train.learning_rate`"),
        ({"task": "sst2", "train": {"schedule": "cosin"}}, "Did you mean `cosine`?"),
        ({"task": "sst2", "train": {"batch_size": 0}}, "`train.batch_size`"),
        ({"task": "sst2", "train": {"batch_size": "many"}}, "`train.batch_size`"),
        ({"task": "sst2", "adapter": "lorra"}, "Did you mean `lora`?"),
        ({"task": "sst2", "adapter": {"rank": -1}}, "`adapter.rank`"),
        ({"task": "sst2", "seed": -1}, "`seed`"),
        ({"task": "sst2", "model": {"dtype": "float8"}}, "`model.dtype`"),
        ({"task": "sst2", "data": {"dev_fraction": 0.9}}, "`data.dev_fraction`"),
        ({"model": "x"}, "`task` must be given"),
        ({"task": {"prompt": "x"}}, "`task.name` must be given"),
        ({"task": "sst2", "evaluate": {"baselines": ["majorty"]}}, "Did you mean `majority`?"),
        ({"task": "sst2", "data": {"trian": "a.csv"}}, "Did you mean `data.train`?"),
        ({"task": "sst2", "data": {"fields": {"text": None}}}, "`data.fields.text` must be text. Received None."),
        ({"task": "sst2", "train": {"max_steps": 1.5}}, "`train.max_steps` must be a whole number. Received 1.5."),
        ({"task": "sst2", "train": {"betas": [0.9, 0.9, 0.9]}}, "`train.betas` must have at most 2 items"),
        ({"task": "sst2", "train": {"activation_checkpointing": "maybe"}}, "must be true or false. Received 'maybe'."),
        ({"task": "sst2", "adapter": {"targets": 5}}, "`adapter.targets` must be a list. Received 5."),
    ],
)
@pytest.mark.parametrize("make", [make_recipe, lambda tree: Recipe(**tree)], ids=["mapping", "class"])
def test_what_cannot_be_meant_is_refused(make: Callable[..., Recipe], tree: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(tree)
    assert says in str(caught.value)
    assert not re.search("\n    |pydantic|[Ii]nput should|valid (string|int|num|dict|tuple|list)", str(caught.value))


def test_every_problem_of_a_recipe_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(task="sst2", data={"trian": "x"}, seed=-1)  # type: ignore[arg-type]
    lines = str(caught.value).split("\n")
    assert lines[0] == "`data.trian` is not a key of the recipe. Did you mean `data.train`?"
    assert lines[1].startswith("`seed` must be greater than or equal to 0. Received -1.")


def test_an_empty_value_is_empty_text_and_not_null() -> None:
    assert parse_sets(["task.prompt=", "a=~", "b= "]) == {"task.prompt": "", "a": None, "b": ""}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: sst2\ntask: trec\n", "given twice"),
        ("task: [sst2\n", "line"),
        ("- task\n- sst2\n", "mapping"),
        ("just words\n", "mapping"),
        ("", "mapping"),
        ("task: sst2\n\tx: 1\n", "valid YAML"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(file)


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("task: sst2\n")
    with pytest.raises(MissingFileError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipee.yaml")


def test_yes_and_no_stay_words(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("task: rte\ndata:\n  labels: {yes: no, 1: on}\n")
    assert load_recipe(file).data.labels == {"yes": "no", "1": "on"}


@pytest.mark.parametrize("bad", ["train.epochs", "=3", ""])
def test_set_needs_a_path_and_a_value(bad: str) -> None:
    with pytest.raises(RecipeError, match="path=value"):
        parse_sets([bad])


@pytest.mark.parametrize("bad", ["0", "0=,1=x", ""])
def test_labels_need_values_and_names(bad: str) -> None:
    with pytest.raises(RecipeError, match="--labels"):
        parse_labels(bad)
