"""The check of rendered rows: what was cut, what teaches nothing, what the model is never told to stop at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from tunefork.data.findings import SHOWN, about_rows, refuse_shares
from tunefork.data.rows import Finding
from tunefork.data.values import counted, shorten
from tunefork.recipe.schema import DataSection
from tunefork.render import Rendered, Renderer
from tunefork.tasks.base import Example, Prediction, Task

TRIED = 50  # rows whose prompt is rendered again
UNKNOWN_SHARE = 0.01  # of a split's tokens that may be unknown to the tokenizer before a warning


def check_rendered(
    rendered: Mapping[str, Sequence[Rendered]], task: Task, renderer: Renderer, section: DataSection
) -> list[Finding]:
    """Findings on the tokens of every split, errors where `section` allows no more of them."""
    findings: list[Finding] = []
    learns_text = task.form in ("text", "chat")
    for split, rows in rendered.items():
        if not rows:
            continue
        findings += _cut(split, rows)
        if learns_text:
            findings += _untrained(split, rows)
        findings += _alike(split, rows)
        findings += [*_unknown(split, rows, renderer), *_special(split, rows, renderer)]
    counts = {split: len(rows) for split, rows in rendered.items()}
    findings = refuse_shares(findings, {"cut-row"}, counts, section, "max_cut")
    findings = refuse_shares(findings, {"nothing-trained"}, counts, section, "max_unusable")
    if learns_text and rendered.get("train"):
        findings += [*_pieces(rendered, renderer), *_stop(rendered["train"], renderer)]
        findings += _boundary(rendered["train"], renderer)
    return findings


def _places(rows: Sequence[Rendered], what: Callable[[Rendered], str]) -> list[tuple[str, str]]:
    return [(r.example.source, what(r)) for r in rows]


def _named(rows: Sequence[Rendered], what: Callable[[Rendered], str]) -> tuple[str, ...]:
    return tuple(f"{where}: {text}" for where, text in _places(rows[:SHOWN], what))


def _cut(split: str, rows: Sequence[Rendered]) -> list[Finding]:
    """Over-long rows, by the side they were cut from; the share of all together is what may not exceed max_cut."""
    words = {"left": "from the left", "right": "from the right", "turns": "as the oldest turns"}
    found: list[Finding] = []
    for side, where in words.items():
        cut = [r for r in rows if r.cut and not r.answer_cut and r.cut_side == side]
        what = f"cut to fit, {sum(r.cut for r in cut):,} tokens in all, {where}; never the answer."
        places = _places(cut, lambda r: f"{r.length} tokens, {r.cut} of them left out")
        advice = "Raise model.max_length if the model allows it, or shorten these rows."
        found += about_rows("warning", "cut-row", places, what, advice, split)
    return found


def _untrained(split: str, rows: Sequence[Rendered]) -> list[Finding]:
    """Rows whose answer does not fit, or that have no reply to learn from."""
    empty = [r for r in rows if not any(r.trained[1:])]
    why = _places(
        empty, lambda r: f"the answer does not fit {len(r.ids)} tokens" if r.answer_cut else "no trained token"
    )
    what = "without a trained token: nothing is learned there."
    advice = "Raise model.max_length, or shorten or remove these rows."
    return about_rows("warning", "nothing-trained", why, what, advice, split)


def _pieces(rendered: Mapping[str, Sequence[Rendered]], renderer: Renderer) -> list[Finding]:
    """Texts that are learned in several pieces."""
    found = []
    for split, rows in rendered.items():
        counts = Counter(r.example.source for r in rows)
        long = [count for count in counts.values() if count > 1] if renderer.task.form == "text" else []
        if long:
            what = f"longer than {renderer.max_length} tokens, read in {sum(long):,} pieces."
            text = f"{counted(len(long), 'row')} {what}"
            found.append(Finding("info", "text-in-pieces", text, len(long), split=split))
    return found


def _stop(rows: Sequence[Rendered], renderer: Renderer) -> list[Finding]:
    """A model that is never shown the stop token in its place never learns to stop."""
    if renderer.task.form == "text":  # of a text in pieces, the last one ends it
        rows = list({id(r.example): r for r in rows}.values())
    trained = [r for r in rows if any(r.trained)]
    missing = [r for r in trained if not _ends_trained(r, renderer.stop_ids)]
    if not missing:
        return []
    names = " or ".join(repr(name) for name in renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids)))
    source = "the chat template" if renderer.chat_template else "the tokenizer"
    if not renderer.stop_ids:
        text = f"No answer ends with a stop token, since {source} has none: the tuned model would not stop by itself."
    elif len(missing) == len(trained):
        text = f"The stop token {names} is trained in no row: the tuned model would not stop by itself."
    else:
        text = f"The stop token {names} is not trained after the last answer of {counted(len(missing), 'row')}."
    level = "error" if len(missing) == len(trained) else "warning"
    advice = "Use a model whose chat template ends every reply with a special token, or one with an end token."
    shown = _named(missing, lambda r: "the last trained token is not the stop token")
    return [Finding(level, "stop-not-trained", text, len(missing), shown, advice, "train")]


def _special(split: str, rows: Sequence[Rendered], renderer: Renderer) -> list[Finding]:
    """Rows whose own text spells a special token: read as the token, it can end a turn or begin another."""
    special = [t.content for t in renderer.tokenizer.added_tokens_decoder.values() if t.special]
    wording = str(renderer.task.wording)  # it stands in `text` where it reads other fields; what it spells is meant
    spelled = [name for name in special if name.strip() and name not in wording]
    if not spelled:
        return []
    pattern = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
    examples = {id(r.example): r.example for r in rows}.values()
    found = [(e.source, hit[0]) for e in examples if (hit := pattern.search(f"{e.text}\n{e.answer or ''}"))]
    what = "whose text spells a special token of the tokenizer, which the model reads as that token."
    advice = "Right where it is meant; else write it otherwise: text of others can end a turn, or forge one."
    return about_rows("warning", "special-token", found, what, advice, split)


def _ends_trained(r: Rendered, stop: Sequence[int]) -> bool:
    """Whether what is trained ends with a stop token."""
    last = max(t for t, use in enumerate(r.trained) if use)
    return r.ids[last] in stop


def _boundary(rows: Sequence[Rendered], renderer: Renderer) -> list[Finding]:
    """Prompts whose last tokens are others where an answer follows: the model is asked in a way it was not trained."""
    last = {id(r.example): r for r in rows}.values()  # a chat may be several texts; the last has the last reply
    asked_for = [r for r in last if r.example.prompt or r.example.messages]
    tried = [r for r in asked_for if any(r.trained) and not r.cut and _ends_in_answer(r.example)][:TRIED]
    other: list[Rendered] = []
    for r in tried:
        asked = renderer.prompt(r.example).ids
        if r.ids[: len(asked)] != asked or r.trained[len(asked) : len(asked) + 1] != (True,):
            other.append(r)
    if not other:
        return []
    text = (
        f"In {counted(len(other), 'row')} of the {len(tried)} tried, the end of the prompt and the beginning of the "
        "answer are one token, or others together than apart: generation starts from tokens training did not show."
    )
    shown = _named(other, lambda r: "the prompt alone has other tokens")
    advice = "End the prompt before a space rather than after one, and begin the answer with it."
    return [Finding("warning", "prompt-boundary", text, len(other), shown, advice, "train")]


def _ends_in_answer(example: Example) -> bool:
    """Whether what is generated for the example is what it trains: not so where its last reply has weight 0."""
    last = example.messages[-1] if example.messages else None
    return last is None or (last.role == "assistant" and last.trained)


def _alike(split: str, rows: Sequence[Rendered]) -> list[Finding]:
    """Candidates of the same tokens cannot be told apart; those that begin alike only by their later tokens."""
    by_tokens: dict[tuple[tuple[int, ...], ...], list[Rendered]] = {}  # labels are the same in every row
    for r in rows:
        if r.candidates:
            by_tokens.setdefault(r.candidates, []).append(r)

    def those(alike: Callable[[Rendered], bool]) -> list[Rendered]:
        return [r for group in by_tokens.values() if alike(group[0]) for r in group]

    same = those(lambda r: len(set(r.candidates)) < len(r.candidates))
    if same:
        what = "with candidates that are the same tokens, which cannot be told apart."
        places = _places(same, lambda r: " and ".join(map(repr, _pair(r, lambda a, b: a == b))))
        return about_rows("error", "same-candidates", places, what, "Give them different names.", split)
    if split != "train":
        return []
    inside = those(lambda r: bool(_pair(r, _inside)))
    if inside:
        places = _places(inside, lambda r: " and ".join(map(repr, _pair(r, _inside))))
        what = "with a candidate that another one begins with."
        advice = "They are compared by their mean log-probability a token; names of their own tell them apart better."
        return about_rows("warning", "candidate-in-candidate", places, what, advice, split)
    begin = those(lambda r: len({c[0] for c in r.candidates}) < len(r.candidates))
    if not begin:
        return []
    pair = " and ".join(map(repr, _pair(begin[0], lambda a, b: a[0] == b[0])))
    text = f"{counted(len(begin), 'row')} with candidates that begin with the same token ({pair})."
    advice = "Nothing is wrong; names that differ in their first token are told apart with less training."
    return [Finding("info", "shared-prefix", text, len(begin), (), advice, split)]


def _inside(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one begins with the other."""
    return a[: len(b)] == b or b[: len(a)] == a


def _pair(r: Rendered, alike: Callable[[tuple[int, ...], tuple[int, ...]], bool]) -> tuple[str, ...]:
    """The first two candidates that are alike, or none."""
    for (i, a), (j, b) in combinations(enumerate(r.candidates), 2):
        if alike(a, b):
            return shorten(r.example.candidates[i], 40), shorten(r.example.candidates[j], 40)
    return ()


def _unknown(split: str, rows: Sequence[Rendered], renderer: Renderer) -> list[Finding]:
    """Tokens the tokenizer has no entry for: the model reads them all as one."""
    unknown = renderer.tokenizer.unk_token_id
    if unknown is None or unknown in renderer.stop_ids:  # GPT-2 calls its end token its unknown one too
        return []
    counts = [(sum(token == unknown for token in r.ids), r) for r in rows]
    total, tokens = sum(count for count, _ in counts), sum(len(r.ids) for r in rows)
    if total <= UNKNOWN_SHARE * tokens:
        return []
    worst = [r for count, r in sorted(counts, key=lambda pair: -pair[0]) if count]
    text = f"{total / tokens:.1%} of the tokens are unknown to the model's tokenizer, in {counted(len(worst), 'row')}."
    shown = _named(worst, lambda r: f"{sum(token == unknown for token in r.ids)} unknown of {len(r.ids)} tokens")
    advice = "Check the language and the encoding of the file, or use a model that knows its characters."
    return [Finding("warning", "unknown-tokens", text, len(worst), shown, advice, split)]


def cut_prompts(predictions: Sequence[Prediction]) -> list[Finding]:
    """Prompts of which the model, as it generated, saw a part only."""
    cut = [p for p in predictions if p.cut]
    what = f"whose prompt was cut to leave room for the answer, {sum(p.cut for p in cut):,} tokens in all."
    advice = "Shorten these rows, or lower task.max_new_tokens."
    return about_rows("warning", "cut-prompt", [(p.source, f"{p.cut} tokens left out") for p in cut], what, advice)
