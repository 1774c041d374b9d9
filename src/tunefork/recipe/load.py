"""A Recipe from YAML, from flags, from `--set path=value`, or from all of them; later ones win."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from tunefork.errors import MissingFileError, RecipeError, did_you_mean
from tunefork.recipe.schema import Recipe
from tunefork.recipe.sentences import leaves, one_a_line

ALIASES: dict[str, str] = {
    "model": "model.name",
    "task": "task.name",
    "train": "data.train",
    "dev": "data.dev",
    "test": "data.test",
    "text-field": "data.fields.text",
    "label-field": "data.fields.label",
    "labels": "data.labels",
    "layout": "data.layout",
    "method": "train.method",
    "adapter": "adapter.name",
    "form": "task.form",
    "prompt": "task.prompt",
    "epochs": "train.epochs",
    "max-steps": "train.max_steps",
    "learning-rate": "train.learning_rate",
    "batch-size": "train.batch_size",
    "max-length": "model.max_length",
    "device": "model.device",
    "dtype": "model.dtype",
    "out": "out",
    "seed": "seed",
}
"""Flag -> recipe path. Every other path is reached with `--set path=value`."""


def load_recipe(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in the YAML file at `path` with `overrides` ({"train.learning_rate": 1e-4}) laid over it.

    Raises MissingFileError, or RecipeError naming each key that is unknown or out of range.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted, value)
    return make_recipe(tree)


def make_recipe(tree: Mapping[str, Any]) -> Recipe:
    """A Recipe from nested mappings. Raises RecipeError naming each key that is unknown or out of range."""
    return Recipe(**{str(key): value for key, value in tree.items()})


def all_paths() -> Iterator[tuple[str, Any]]:
    """(dotted path, pydantic field) of every leaf of the recipe, in order."""
    return leaves(Recipe)


def parse_sets(assignments: Sequence[str]) -> dict[str, Any]:
    """`["train.epochs=3", "adapter.rank=8"]` as overrides; values are YAML."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            _fail([f"--set must look like path=value. Received {assignment!r}. Try --set train.epochs=3"])
        overrides[path.strip()] = parse_value(value)
    return overrides


def parse_value(text: str) -> Any:
    """One flag's value: YAML, except that text YAML cannot read stays text, and no text is an empty one, not null."""
    try:
        return yaml.load(text, Loader=_Loader) if text.strip() else ""
    except yaml.YAMLError:
        return text


def parse_labels(text: str) -> dict[str, str]:
    """`"0=bad,1=good"` as {"0": "bad", "1": "good"}."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or any(not equals or not name.strip() for _, equals, name in pairs):
        _fail([f"--labels must look like value=name,value=name. Received {text!r}. Try --labels '0=bad,1=good'"])
    return {value.strip(): name.strip() for value, _, name in pairs}


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one."""
    tree = recipe.model_dump(mode="json")
    odd = _YAML_BREAKS.search(json.dumps(tree, ensure_ascii=False))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=not odd, width=100)


def settings(tree: Mapping[str, Any], why: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """(path, value, why) of all that was given or found in a dumped recipe; what is left out has its default.

    Model and seed are always there; what was automatic and has no use in this run is not.
    """
    for path, info in all_paths():
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        default = info.get_default(call_default_factory=True)
        given = value != (list(cast(tuple[Any, ...], default)) if isinstance(default, tuple) else default)
        if (path in why or given or path in ("model.name", "seed")) and (value is not None or default != "auto"):
            yield path, value, why.get(path, "given" if given else "the default")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's reading of scalars (`yes` is a word, `1e-4` is a number); a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool",)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(getattr(key_node, "value", ""))
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice (line {line})", None)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_YAML_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")  # PyYAML writes these raw and reads them as line breaks


def _read_yaml(path: Path) -> dict[str, Any]:
    hint = "" if path.suffix in ("", ".yaml", ".yml") else f" If it holds rows, try --train {path}."
    if path.is_dir():
        hint = f" If {str(path)!r} is a model, try --model {path}."
        path = path / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise MissingFileError(
            f"The recipe must be a YAML file or a run's folder. Received {str(path)!r}, which is not there."
            + (did_you_mean(path.name, siblings) or hint)
        ) from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"The recipe must be UTF-8 text. Received {str(path)!r}: {error}.{hint}") from None
    try:
        tree: Any = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"The recipe must be valid YAML. Received {str(path)!r}: {problem}{where}.{hint}") from None
    if not isinstance(tree, dict):
        raise RecipeError(
            f"The recipe must be a mapping (key: value). Received {type(tree).__name__} in {str(path)!r}.{hint}"
        )
    return cast(dict[str, Any], tree)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for depth, name in enumerate(parents):
        below: Any = tree.get(name)
        if isinstance(below, str) and depth == 0:  # `model: folder` written short
            below = {"name": below}
        if below is not None and not isinstance(below, dict):
            _fail([f"`{dotted}` cannot be set: `{name}` is not a section"])
        tree[name] = below = dict(cast(dict[str, Any], below or {}))
        tree = below
    tree[leaf] = value


def _fail(problems: Sequence[str]) -> NoReturn:
    raise RecipeError(one_a_line(problems))
