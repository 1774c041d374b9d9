"""The model card of an export, written from the run's own figures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from tunefork import words
from tunefork.evaluate.summary import caution
from tunefork.evaluate.trained import Trained
from tunefork.export.proof import Proof
from tunefork.export.snippet import Artefact, model_class, snippet
from tunefork.models import ModelFacts
from tunefork.models.artefact import ArtefactInfo, base_facts
from tunefork.models.source import EMBEDDED

_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
}
_LIBRARIES = {"merged": "transformers", "adapter": "peft", "trajectory": "tunefork"}
_SHOWN_SETTINGS = ("method", "learning_rate", "schedule", "warmup", "batch_size", "weight_decay", "epochs", "max_steps")


def render_card(
    result: Mapping[str, Any], info: ArtefactInfo, trained: Trained, *, to: str, dtype: str, proof: Proof | None
) -> str:
    """README.md with its YAML front matter. `result` is the run's result.json."""
    facts = base_facts(info["base"], trust_remote_code=trained.facts.trust_remote_code)
    base, licence = base_name(info), _licence_of(facts.folder)
    title = f"{base.rpartition('/')[2]} for {trained.task.info.name}"
    where = str(info["base"]["name"] if info["base"]["commit"] else info["base"]["folder"])
    code = snippet(Artefact(trained, to, info["adapter"], where, info["extra"]["dtype"]))
    parts = [
        _front_matter(base, licence, trained, to),
        f"# {title}\n",
        _summary(base, info, trained, words.system_name(result["recipe"]), to, dtype),
        _licence(base, licence),
        "## How to use it\n",
        _usage(to, info["adapter"], code, EMBEDDED if info["base"]["name"] == EMBEDDED else where, facts),
        "## How good it is\n",
        _metrics(result),
        *(["## Proof of the merge\n", _proof(proof)] if proof is not None else []),
        "## How it was trained\n",
        _data(result),
        _settings(result),
        "## Limits\n",
        _limits(result, to),
    ]
    return "\n".join(parts)


def base_name(info: ArtefactInfo) -> str:
    """The base's hub name; of a local model the last part of its folder."""
    base = info["base"]
    return str(base["name"]) if base["commit"] else PurePath(str(base["folder"])).name


def _front_matter(base: str, licence: str | None, trained: Trained, to: str) -> str:
    base_licence = f" ({licence})" if licence else ""
    lines = [
        "---",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        f"library_name: {_LIBRARIES[to]}",
        f"pipeline_tag: {_PIPELINES[model_class(trained)]}",
        "tags: [tunefork, fine-tuned]",
        f"# license: for you to fill in; it must fit that of the base model{base_licence} and your rights to the data",
        "---\n",
    ]
    return "\n".join(lines)


def _summary(base: str, info: ArtefactInfo, trained: Trained, how: str, to: str, dtype: str) -> str:
    task = trained.task
    labels = f" Its answers are {', '.join(f'`{label}`' for label in task.labels[:30])}." if task.labels else ""
    more = f" (and {len(task.labels) - 30} more)" if len(task.labels) > 30 else ""
    kind = "" if task.info.kind == task.info.name else f" ({task.info.kind})"
    kept = {
        "merged": f"These are the whole weights, in {dtype}.",
        "adapter": "This is the adapter alone, in fp32.",
        "trajectory": "This is the log of its training, from which the model is rebuilt bit for bit.",
    }[to]
    return (
        f"`{base}` ({info['base']['architecture']}, {info['base']['parameters']:,} parameters), fine-tuned for the task"
        f" `{task.info.name}`{kind}.{labels}{more} {kept} It was made with Tunefork ({how}).\n"
    )


def _licence(base: str, licence: str | None) -> str:
    chosen = "Whoever publishes this model chooses one that the base model and the data allow.\n"
    if licence is None:
        return f"**License: not stated.** {chosen}"
    return f"**License of the base model: {licence}**, as the card of `{base}` says. {chosen}"


def _licence_of(folder: Path) -> str | None:
    """The licence that a model's own card (README.md) names in its front matter, as it is written there."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    if not isinstance(front, Mapping):
        return None
    named = front.get("license_name") if front.get("license") == "other" else front.get("license")
    return ", ".join(map(str, named if isinstance(named, list) else [named])) if named else None


def _usage(to: str, adapter: str, code: str, base: str, facts: ModelFacts) -> str:
    needs = "`transformers`" if to == "merged" or adapter in ("none", "head") else "`transformers` and `peft`"
    needs += ", and `bitsandbytes`" if to != "merged" and adapter == "qlora" else ""
    trust, own = "", ""
    if facts.trust_remote_code:
        trust = " --trust-remote-code"
        own = "The model brings Python code of its own, which `from_pretrained` runs with `trust_remote_code=True`.\n\n"
    if to == "trajectory":
        return (
            "The model it was trained on and this folder give the trained one, without training:\n\n"
            f"```sh\ntunefork replay {shlex.quote(base)} . -o model{trust}\n```\n\n"
            f"The folder `model` is then read by {needs} alone:\n\n```python\n{code}```\n\n{own}"
            f"With Tunefork, which asks it exactly as in training: `tunefork predict model rows.csv{trust}`.\n"
        )
    return (
        f"With {needs} alone, in this folder:\n\n```python\n{code}```\n\n{own}"
        f"With Tunefork, which asks it exactly as in training: `tunefork predict FOLDER rows.csv{trust}`.\n"
    )


def _metrics(result: Mapping[str, Any]) -> str:
    measured: Mapping[str, Mapping[str, Any]] = result["test"]
    if not measured:
        return "It was not measured: the run had no test rows.\n"
    systems = [("**this model**", measured), *((words.baseline_name(n), m) for n, m in result["baselines"].items())]
    names = list(measured)
    rows = [[name, *(words.value(figures[m]) if m in figures else "–" for m in names)] for name, figures in systems]
    n = max(int(value["n"]) for value in measured.values())
    return (
        f"On {n:,} test rows that were read once, after training, with {_percent(result)} bootstrap intervals; "
        "the baselines are measured on the same rows.\n\n"
        + _table(["", *(f"`{name}`" for name in names)], rows)
        + (f"\n{said}\n" if (said := caution(measured, "`{}`".format)) else "")
    )


def _percent(result: Mapping[str, Any]) -> str:
    return f"{100 * float(result['recipe']['evaluate']['confidence']):g} %"


def _proof(proof: Proof) -> str:
    text = (
        f"On {proof.rows} {proof.split} rows ({proof.positions} positions) the logits of this folder, loaded from the "
        f"disk, differ from those of the trained model by **{proof.ratio:.2g}** of what training changed "
        f"(|merged − trained| / |trained − base|, fp32 arithmetic; at most {proof.limit:g} passes, an unchanged base "
        "would have 1)."
    )
    if proof.ratio_in_own_arithmetic is not None:
        text += f" Computing in {proof.dtype} itself, the difference is {proof.ratio_in_own_arithmetic:.2g}."
    if proof.ties:
        tied = "1 row was a tie" if proof.ties == 1 else f"{proof.ties} rows were ties"
        text += f" {tied} that the merge decided otherwise; the metrics below take the trained model's choice."
    rows = [[f"`{name}`", f"{pair['trained']:.4f}", f"{pair['merged']:.4f}"] for name, pair in proof.metrics.items()]
    return f"{text}\n\n{_table(['on these rows', 'trained', 'merged'], rows)}"


def _data(result: Mapping[str, Any]) -> str:
    counts = result["data"]["counts"]
    rows = [[name, f"{c['rows']:,}", f"{c['tokens']:,}"] for name, c in counts.items()]
    return _table(["rows", "count", "tokens"], rows)


def _settings(result: Mapping[str, Any]) -> str:
    recipe = result["recipe"]
    shown = [("steps", result["steps"]), *((k, recipe["train"][k]) for k in _SHOWN_SETTINGS)]
    if recipe["adapter"]["name"] in ("lora", "qlora", "dora"):
        shown += [(k, recipe["adapter"][k]) for k in ("rank", "alpha", "dropout", "targets")]
    elif recipe["adapter"]["name"] == "prefix":
        shown.append(("prefix_tokens", recipe["adapter"]["prefix_tokens"]))
    shown += [("dtype", recipe["model"]["dtype"]), ("max_length", recipe["model"]["max_length"])]
    shown.append(("seed", recipe["seed"]))
    rows = [[f"`{key}`", words.setting(value)] for key, value in shown if value is not None]
    return _table(["setting", "value"], rows) + "\nThe whole recipe is in `recipe.yaml`.\n"


def _limits(result: Mapping[str, Any], to: str) -> str:
    points = [
        "The figures hold for texts like the test rows. Nothing was measured on other texts, topics or languages.",
        "What the base model has learned before, its errors and prejudices among it, was not examined.",
    ]
    if to != "merged":
        points.append(f"The {to} works with the base model it was trained on, and with no other.")
    for finding in result["data"]["findings"]:
        if finding["level"] == "warning":
            where = f" ({finding['split']})" if finding.get("split") else ""
            points.append(f"Found in the data{where}: {finding['message']}")
    return "".join(f"- {' '.join(point.split())}\n" for point in points)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |\n" for line in lines)
