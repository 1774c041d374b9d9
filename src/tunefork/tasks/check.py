"""The check of rendered rows: what was cut, what teaches nothing, what the model is never told to stop at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunefork.data.findings import SHOWN, refuse_above
from tunefork.data.rows import Finding
from tunefork.data.values import counted
from tunefork.recipe.schema import DataSection
from tunefork.render import Rendered, Renderer
from tunefork.tasks.base import Task


def check_rendered(
    rendered: Mapping[str, Sequence[Rendered]], task: Task, renderer: Renderer, section: DataSection
) -> list[Finding]:
    """Findings on the tokens of every split."""
    findings: list[Finding] = []
    for split, rows in rendered.items():
        if not rows:
            continue
        findings += _cut(split, rows, section)
        if task.form in ("text", "chat"):
            findings += _untrained(split, rows, section)
        findings += _alike(split, rows)
    if task.form in ("text", "chat") and rendered.get("train"):
        findings += _stop(rendered["train"], renderer)
    return findings


def _named(rows: Sequence[tuple[Rendered, str]]) -> tuple[str, ...]:
    return tuple(f"{r.example.source}: {what}" for r, what in rows[:SHOWN])


def _cut(split: str, rows: Sequence[Rendered], section: DataSection) -> list[Finding]:
    cut = [(r, f"{r.length} tokens, {r.cut} cut from the {r.cut_side}") for r in rows if r.cut and not r.answer_cut]
    if not cut:
        return []
    lost = sum(r.cut for r, _ in cut)
    finding = Finding(
        "warning",
        "cut-row",
        f"{counted(len(cut), 'row')} cut to fit, {lost:,} tokens in all, from the {cut[0][0].cut_side}; never the answer.",
        len(cut),
        _named(cut),
        "Raise model.max_length if the model allows it, or shorten these rows.",
        split,
    )
    return refuse_above([finding], {"cut-row"}, len(rows), section.max_cut, "max_cut")


def _untrained(split: str, rows: Sequence[Rendered], section: DataSection) -> list[Finding]:
    empty = [(r, "the answer does not fit" if r.answer_cut else "no trained token") for r in rows if not any(r.trained)]
    if not empty:
        return []
    finding = Finding(
        "warning",
        "nothing-trained",
        f"{counted(len(empty), 'row')} teach nothing: no token of the answer is trained.",
        len(empty),
        _named(empty),
        "Raise model.max_length, or shorten or remove these rows.",
        split,
    )
    return refuse_above([finding], {"nothing-trained"}, len(rows), section.max_unusable, "max_unusable")


def _stop(rows: Sequence[Rendered], renderer: Renderer) -> list[Finding]:
    """A model that is never shown the end token in its place never learns to stop."""
    end = renderer.tokenizer.eos_token_id
    trained = [r for r in rows if any(r.trained)]
    taught = sum(any(use and token == end for token, use in zip(r.ids, r.trained, strict=True)) for r in trained)
    if not trained or (end is not None and taught == len(trained)):
        return []
    name = renderer.tokenizer.eos_token
    missing = [(r, "ends without it") for r in trained if end not in r.ids]
    advice = "Use a tokenizer whose end token ends every reply in its chat template."
    if end is None or not taught:
        text = f"The stop token {name!r} is never trained: the tuned model would not stop by itself."
        return [Finding("error", "stop-not-trained", text, len(trained), _named(missing), advice, "train")]
    text = f"The stop token {name!r} is not trained in {counted(len(trained) - taught, 'row')}."
    return [Finding("warning", "stop-not-trained", text, len(trained) - taught, _named(missing), advice, "train")]


def _alike(split: str, rows: Sequence[Rendered]) -> list[Finding]:
    """Candidates that begin alike are told apart by their later tokens only; identical ones not at all."""
    with_candidates = [r for r in rows if r.candidates]
    same = [(r, "two candidates are the same tokens") for r in with_candidates if len(set(r.candidates)) < len(r.candidates)]
    if same:
        text = f"{counted(len(same), 'row')} with candidates that are the same tokens."
        return [
            Finding("error", "same-candidates", text, len(same), _named(same), "Give labels different names.", split)
        ]
    begin = [r for r in with_candidates if len({c[0] for c in r.candidates}) < len(r.candidates)]
    if not begin or split != "train":
        return []
    shown = begin[0]
    first = [c[0] for c in shown.candidates]
    pair = [shown.example.candidates[i].strip() for i, token in enumerate(first) if first.count(token) > 1][:2]
    text = f"{counted(len(begin), 'row')} with candidates that begin with the same token ({' and '.join(pair)})."
    advice = "Nothing is wrong; names that differ in their first token are told apart with less training."
    return [Finding("info", "shared-prefix", text, len(begin), (), advice, split)]
