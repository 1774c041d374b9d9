"""Writes docs/recipe.md from the recipe itself: `python docs/make_recipe.py`; `--check` says whether it is current."""

import sys
from pathlib import Path
from typing import Any

from tunefork.recipe import ALIASES, all_paths
from tunefork.recipe.schema import Recipe

PAGE = Path(__file__).with_name("recipe.md")
HEAD = """# Recipe

Everything that decides a run, in one place. The same key is set in YAML

```yaml
model: Qwen/Qwen3-0.6B        # short for  model: {name: …}; task and adapter too
task: classification
data:
  train: reviews.csv
  fields: {text: review, label: stars}
train:
  epochs: 3
out: runs/reviews
```

by a flag (`--epochs 3`) or, any of them, by `--set train.epochs=3`, or in Python
(`Recipe(task={"name": "sst2"}, train={"epochs": 3})`). Later ones win: file, flags, `--set`. An unknown key is an
error. `auto` becomes a value before the first step, with its reason in the printed plan and in `result.json`, or null
where nothing reads it. `--set task.prompt=` is an empty text; null is written `--set task.prompt=null`.
`tunefork train runs/x --resume` goes on with a run by the recipe that is kept in its folder.

This page is written by `python docs/make_recipe.py` from `src/tunefork/recipe/schema.py`.
"""


def default(info: Any) -> str:
    if info.is_required():
        return "must be given"
    value = info.get_default(call_default_factory=True)
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def page() -> str:
    flags = {path: flag for flag, path in ALIASES.items()}
    lines = [HEAD]
    section = None
    for path, info in all_paths():
        top = path.partition(".")[0] if "." in path else "the run itself"
        if top != section:
            section = top
            lines += [f"\n## {top}\n", "| key | flag | default | what it is |", "|---|---|---|---|"]
        flag = f"`--{flags[path]}`" if path in flags else ""
        if path == "data.fields":
            flag = "`--text-field`, `--label-field`"
        lines.append(f"| `{path}` | {flag} | {default(info)} | {info.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    assert Recipe
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        sys.exit(0 if current else "docs/recipe.md is not current: python docs/make_recipe.py")
    PAGE.write_text(page(), encoding="utf-8")
