"""The recipe's flags: made from the alias table, so that help, documentation and behaviour cannot differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tunefork.recipe import ALIASES, Recipe, all_paths, load_recipe, parse_labels, parse_sets
from tunefork.recipe.load import parse_value

_DESCRIPTIONS = {path: info.description for path, info in all_paths()} | {
    "data.fields.text": "column that holds the text",
    "data.fields.label": "column that holds the label",
    "data.labels": "value in the file = name shown to the model, as '0=bad,1=good'",
}


def overrides_from(flags: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """Flags that were given, by recipe path; `--set` wins over them."""
    found: dict[str, Any] = {}
    for flag, path in ALIASES.items():
        text = flags.get(flag.replace("-", "_"))
        if text is not None:
            found[path] = parse_labels(text) if path == "data.labels" else _value(path, text)
    return found | parse_sets(sets)


def _value(path: str, text: str) -> Any:
    """Numbers become numbers; paths, names and prompts stay what was typed."""
    return parse_value(text) if path.startswith("train.") or path in ("seed", "model.max_length") else text


def recipe_command(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `(recipe: Recipe, **own)` the recipe file argument, every alias flag, and `--set`.

    A command that also takes `source: Path | None` is told which file or run folder the recipe came from.
    """
    wanted = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    own = [p for p in wanted if p.name != "source"]
    file = inspect.Parameter(
        "recipe_file",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="YAML recipe, or a run's folder")],
    )
    flags = [
        inspect.Parameter(
            flag.replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(f"--{flag}", help=f"{_DESCRIPTIONS[path]} [{path}]", rich_help_panel="Recipe"),
            ],
        )
        for flag, path in ALIASES.items()
    ]
    sets = inspect.Parameter(
        "set_",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None,
            typer.Option("--set", metavar="PATH=VALUE", help="any key of the recipe", rich_help_panel="Recipe"),
        ],
    )
    parameters = [file, *flags, sets, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]

    def run(**given: Any) -> None:
        overrides = overrides_from(given, given["set_"] or [])
        recipe: Recipe = load_recipe(given["recipe_file"], overrides)
        source = {"source": given["recipe_file"]} if len(own) < len(wanted) else {}
        command(recipe, **source, **{p.name: given[p.name] for p in own})

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run
