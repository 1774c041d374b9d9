"""The recipe's flags: made from the alias table, so that help, documentation and behaviour cannot differ."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape

from tunefork.errors import RecipeError, RunError
from tunefork.recipe import ALIASES, Recipe, all_paths, load_recipe, parse_labels, parse_sets
from tunefork.recipe.load import parse_value
from tunefork.run import RunFolder

_DESCRIPTIONS = {path: info.description for path, info in all_paths()} | {
    "data.fields.text": "column that holds the text",
    "data.fields.label": "column that holds the label",
    "data.labels": "value in the file = name shown to the model, as '0=bad,1=good'",
}
_METAVARS = {
    **dict.fromkeys(("data.train", "data.dev", "data.test"), "FILE"),
    **dict.fromkeys(("data.fields.text", "data.fields.label"), "COLUMN"),
    **dict.fromkeys(("train.epochs", "train.learning_rate"), "NUMBER"),
    **dict.fromkeys(("train.max_steps", "train.batch_size", "model.max_length", "seed"), "N"),
    "data.labels": "VALUE=NAME,…",
    "task.prompt": "TEMPLATE",
    "model.name": "MODEL",
    "out": "FOLDER",
}


class Origin(NamedTuple):
    """Where a recipe came from: a file or a run's folder, and the paths that flags and --set have set."""

    file: Path | None
    given: Sequence[str]

    def only(self, *read: str) -> None:
        """Raises RecipeError for a path that was set and does not begin like one of `read`."""
        for path in self.given:
            if not path.startswith(read):
                why = ": a run knows its own task, columns and model" if self.file is not None else " by this command"
                names = ", ".join(name.rstrip(".") for name in read)
                raise RecipeError(f"`{path}` is not read{why}. Read are {names}. Try leaving it out.")


def parse_size(text: str) -> int:
    """Bytes of `800M`, `6G`, `1.5 GiB`: binary units, as sizes are shown."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"A size must be a number with K, M, G or T. Received {text!r}. Try 6G.")
    return int(float(match[1]) * 1024 ** ("KMGT".index(match[2].upper()) + 1))


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


def kept_recipe(file: Path | None, overrides: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """What `--resume` starts from: `RUN --resume` and `--resume --out RUN` both mean the recipe that RUN keeps.

    Raises RunError where neither is given, MissingFileError or RunError when --out, given without a recipe file, is not
    a run.
    """
    if file is None:
        if overrides.get("out") is None:
            raise RunError("`--resume` must be told which run. Received none. Try `train RUN --resume`, or --out RUN.")
        return RunFolder.open(str(overrides["out"]), write=False).path, overrides
    if file.is_dir():
        return file, {"out": str(file), **overrides}  # wherever the folder has been moved since
    return file, overrides


def recipe_command(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `(recipe: Recipe, **own)` the recipe file argument, every alias flag, and `--set`.

    A command that also takes `origin: Origin` is told where the recipe came from.
    """
    wanted = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    own = [p for p in wanted if p.name != "origin"]
    file = inspect.Parameter(
        "recipe_file",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML recipe, or a run's folder")],
    )
    flags = [
        inspect.Parameter(
            flag.replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    f"--{flag}",
                    metavar=_METAVARS.get(path, "NAME"),
                    help=escape(f"{_DESCRIPTIONS[path]} [{path}]"),
                    rich_help_panel="Recipe",
                ),
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
        file: Path | None = given["recipe_file"]
        if given.get("resume") and given["seeds"] == 1:
            file, overrides = kept_recipe(file, overrides)
        recipe: Recipe = load_recipe(file, overrides)
        origin = {"origin": Origin(file, tuple(overrides))} if len(own) < len(wanted) else {}
        command(recipe, **origin, **{p.name: given[p.name] for p in own})

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run
