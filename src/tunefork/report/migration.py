"""A migration on one page: for each model, how often the new one agrees with the old, and what is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunefork import words
from tunefork.report import figures
from tunefork.report.page import environment, page_style

_OUTCOMES = {
    "better": "right more often",
    "worse": "right less often",
    "unclear": "no clear difference in right answers",
    "unmeasured": "not measured",
}


def render_migration(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """comparison.json of each model as one HTML page: no script, nothing fetched, every text of others escaped."""
    found = [{**c, **_said(c), "dots": Markup(_dots(c)), "shown": _rows(c)} for c in comparisons]
    counts = Counter(_OUTCOMES[c["outcome"]].replace("no clear", "without a clear") for c in found)
    headline = f"{words.count(len(found), 'model')} compared: " + ", ".join(f"{n} {what}" for what, n in counts.items())
    view = {"comparisons": found, "headline": headline, "outcomes": _OUTCOMES, "spread": words.spread}
    return environment().get_template("migration.html.j2").render(style=Markup(page_style()), **view).lstrip()


def migration_verdict(comparison: Mapping[str, Any]) -> str:
    """What the page says of one model, in a sentence or two."""
    return _said(comparison)["verdict"]


def _said(c: Mapping[str, Any]) -> dict[str, str]:
    """The outcome, and a sentence that does not overclaim."""
    same = c["agreement"]["exact_match"]
    text = (
        f"The new model gives the same answer to {words.percent(same['value'])} of {words.count(same['n'], 'prompt')} "
        f"({words.percent(same['low'])} to {words.percent(same['high'])})."
    )
    if not c["scores"]:
        return {"outcome": "unmeasured", "verdict": f"{text} Which answers are right is not known."}
    first = c["scores"][0]
    d = first["difference"]
    outcome = "unclear" if not d["clear"] else "better" if d["low"] > 0 else "worse"
    but = "" if d["low"] <= 0 <= d["high"] else f"{words.probability(d['p_value'])} in the paired test, so that "
    told = {
        "unclear": f"{but}these rows do not tell the two apart",
        "better": "the new model is better",
        "worse": "the old model is better",
    }[outcome]
    now, before = (words.percent(first[which]["value"]) for which in ("new", "old"))
    text += f" Right are {now}, before {before}: the difference is {words.decimal(d['difference'], signed=True)} "
    return {"outcome": outcome, "verdict": f"{text}({words.interval(d['low'], d['high'])}), and {told}."}


def _dots(c: Mapping[str, Any]) -> str:
    """Shares of prompts: same answer, and right answers of both."""
    lines = [("same answer", c["agreement"]["exact_match"], True)]
    lines += [(f"same, old was {part['name']}", part, False) for part in c["sure"]]
    if c["scores"]:
        lines += [("new is right", c["scores"][0]["new"], False), ("old was right", c["scores"][0]["old"], False)]
    return figures.dot_plot(
        [figures.Dot(n, v["value"], v["low"], v["high"], ours) for n, v, ours in lines], "exact_match"
    )


def _rows(c: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: words.trimmed(str(row[key] or ""), 600) for key in ("source", "text", "gold", "before", "after")}
        for row in c["changed"]
    ]
