"""The one path from an Example to token ids and what is trained: training, evaluation, generation and export use it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunefork.batch import Batch
from tunefork.chat_mask import ChatText, chat_texts, prompt_text
from tunefork.errors import RecipeError
from tunefork.recipe.schema import ModelKind
from tunefork.tasks.base import Example, Message, Task

IGNORED = -100  # the label that PyTorch's cross-entropy skips
MASK = "[MASK]"


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as token ids. `ids` ends where the candidates, if there are any, begin."""

    example: Example
    ids: tuple[int, ...]
    trained: tuple[bool, ...]  # one per id: the loss is on predicting it
    candidates: tuple[tuple[int, ...], ...] = ()
    read_at: int | None = None  # position whose logits choose among candidates of one token each
    cut: int = 0  # tokens left out to fit max_length
    cut_side: str = ""  # "left", "right" or "turns"
    answer_cut: bool = False  # the answer itself did not fit: nothing is trained

    @property
    def fanned_out(self) -> bool:
        """Whether each candidate is a sequence of its own."""
        return bool(self.candidates) and self.read_at is None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence this becomes."""
        return len(self.ids) + (max(len(c) for c in self.candidates) if self.fanned_out else 0)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence before anything was cut."""
        return self.longest + self.cut


class Renderer:
    """Renders the examples of one task for one model's tokenizer, at most `max_length` tokens a sequence."""

    def __init__(self, tokenizer: Any, model_kind: ModelKind, task: Task, max_length: int, chat_template: bool) -> None:
        self.tokenizer, self.model_kind, self.task = tokenizer, model_kind, task
        self.max_length, self.chat_template = max_length, chat_template
        self.start, self.end = _specials(tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        if task.form == "chat" or chat_template:
            if not tokenizer.chat_template:
                raise RecipeError(
                    "A chat needs a model with a chat template. Received a tokenizer without one. "
                    "Try a chat model, or --task generation with a prompt of your own."
                )
        if model_kind == "masked" and task.form == "verbalizer" and tokenizer.mask_token is None:
            raise RecipeError("A masked prompt needs a tokenizer with a mask token. Received none. Try --form head.")

    def render(self, example: Example) -> list[Rendered]:
        """The example as training and evaluation see it; several only where a template rewrites earlier turns.

        Raises DataError when the chat template refuses the row.
        """
        if self.task.form == "chat":
            return [self._chat(example, text) for text in chat_texts(self.tokenizer, example)]
        if self.task.form == "head":
            return [self._head(example)]
        if self.task.form == "text":
            return [self._text(example)]
        return [self._masked(example) if self.model_kind == "masked" else self._candidates(example)]

    def prompt(self, example: Example) -> Rendered:
        """What an answer is generated from: everything before the answer, cut from the left."""
        if self.task.form == "chat":
            messages = example.messages
            if messages and messages[-1].role == "assistant":
                messages = messages[:-1]
            text = prompt_text(self.tokenizer, replace(example, messages=messages))
            ids = self._tokens(text, template=True)
        else:
            ids = self._tokens(self._question(example), template=self.chat_template)
        kept, cut = self._cut_left(ids, self.max_length)
        return Rendered(example, kept, (False,) * len(kept), cut=cut, cut_side="left" if cut else "")

    def batch(self, rendered: Sequence[Rendered], *, learn: bool = False) -> Batch:
        """Rows as padded tensors; see `Batch`. All rows must be of this renderer.

        With `learn`, a task whose objective is `answer` gets the right candidate alone, as text to be predicted.
        """
        form, fanned = self.task.form, any(r.fanned_out for r in rendered)
        answer_only = learn and fanned and self.task.objective == "answer"
        sequences: list[tuple[int, Sequence[int], Sequence[bool]]] = []  # row, ids, trained
        for row, r in enumerate(rendered):
            if form in ("text", "chat") or not fanned:
                sequences.append((row, r.ids, r.trained))
                continue
            for c in [r.example.gold or 0] if answer_only else range(len(r.candidates)):
                sequences.append((row, (*r.ids, *r.candidates[c]), (*r.trained, *(True,) * len(r.candidates[c]))))
        width = max(len(ids) for _, ids, _ in sequences)
        input_ids = torch.full((len(sequences), width), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        targets = torch.full_like(input_ids, IGNORED)
        for s, (_, ids, trained) in enumerate(sequences):
            input_ids[s, : len(ids)] = torch.tensor(ids)
            mask[s, : len(ids)] = 1
            for t, use in enumerate(trained[1:]):
                if use:
                    targets[s, t] = ids[t + 1]
        rows = torch.tensor([row for row, _, _ in sequences])
        gold = None
        if form not in ("text", "chat") and all(r.example.gold is not None for r in rendered):
            gold = torch.tensor([r.example.gold for r in rendered])
        common: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "row": rows, "gold": gold}
        if form in ("text", "chat") or answer_only:
            counts = (targets != IGNORED).sum(1).clamp(min=1).float()
            return Batch(**common | {"gold": None}, weights=counts, targets=targets)
        ones = torch.ones(len(rendered))
        if form == "head":
            return Batch(**common, weights=ones, head=True)
        if not fanned:
            options = torch.full((len(rendered), max(len(r.candidates) for r in rendered)), -1, dtype=torch.int64)
            for row, r in enumerate(rendered):
                options[row, : len(r.candidates)] = torch.tensor([c[0] for c in r.candidates])
            return Batch(**common, weights=ones, options=options, read_at=torch.tensor([r.read_at for r in rendered]))
        return Batch(**common, weights=ones, targets=targets)

    def describe(self) -> dict[str, Any]:
        """What decides the rendering, for the artefact: kept with the model so that it is asked the same way."""
        template = self.tokenizer.chat_template if self.task.form == "chat" or self.chat_template else None
        vocabulary = hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()
        return {
            "form": self.task.form,
            "objective": self.task.objective,
            "chat_template": template,
            "max_length": self.max_length,
            "stop": list(self.task.stop),
            "vocabulary": vocabulary[:16],
        }

    def explain(self, rendered: Rendered) -> list[tuple[str, int, str]]:
        """(text, id, role) of each token; roles: masked, trained, read, candidate N, right candidate N."""
        ids = self.tokenizer.convert_ids_to_tokens(list(rendered.ids))
        lines = []
        for t, (text, token) in enumerate(zip(ids, rendered.ids, strict=True)):
            role = "trained" if rendered.trained[t] else "read" if t == rendered.read_at else "masked"
            lines.append((str(text), token, role))
        for c, candidate in enumerate(rendered.candidates):
            right = "right " if c == rendered.example.gold else ""
            for text, token in zip(self.tokenizer.convert_ids_to_tokens(list(candidate)), candidate, strict=True):
                lines.append((str(text), token, f"{right}candidate {c}"))
        return lines

    def _question(self, example: Example) -> str:
        """The text before the answer, through the chat template if the recipe says so."""
        if not self.chat_template:
            return example.prompt
        return prompt_text(self.tokenizer, replace(example, messages=(Message("user", example.prompt),)))

    def _tokens(self, text: str, *, template: bool = False) -> list[int]:
        """Ids of a causal text: the start token exactly once, whether the template writes it or not."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if template or (self.start and ids[: len(self.start)] == list(self.start)):
            return ids
        return [*self.start, *ids]

    def _cut_left(self, ids: Sequence[int], room: int) -> tuple[tuple[int, ...], int]:
        """At most `room` ids, cut after the start tokens."""
        over = len(ids) - room
        if over <= 0:
            return tuple(ids), 0
        start = len(self.start) if tuple(ids[: len(self.start)]) == self.start else 0
        return (*ids[:start], *ids[start + over :]), over

    def _candidates(self, example: Example) -> Rendered:
        """Prompt and candidates are tokenised as whole texts; what they share is the prompt, so no boundary is guessed."""
        question, template = self._question(example), self.chat_template
        candidates = [c.lstrip() for c in example.candidates] if template else list(example.candidates)
        wholes = [self._tokens(question + c, template=template) for c in candidates]
        shared = _common_prefix([self._tokens(question, template=template), *wholes])
        answers = tuple(tuple(whole[shared:]) for whole in wholes)
        room = self.max_length - (max(len(a) for a in answers) if any(len(a) != 1 for a in answers) else 0)
        ids, cut = self._cut_left(wholes[0][:shared], max(1, room))
        single = all(len(a) == 1 for a in answers) and len(set(answers)) == len(answers)
        lost = room < 1
        return Rendered(
            example,
            ids,
            (False,) * len(ids),
            answers,
            read_at=len(ids) - 1 if single else None,
            cut=cut,
            cut_side="left" if cut else "",
            answer_cut=lost,
        )

    def _text(self, example: Example) -> Rendered:
        """Prompt, answer and end token; trained on the answer and the end token."""
        question, template = self._question(example), self.chat_template
        prompt = self._tokens(question, template=template)
        if example.answer is None:
            ids, cut = self._cut_left(prompt, self.max_length)
            return Rendered(example, ids, (False,) * len(ids), cut=cut, cut_side="left" if cut else "")
        answer = example.answer.lstrip() if template else example.answer
        whole = self._tokens(question + answer, template=template)
        shared = _common_prefix([prompt, whole])
        tail = [*whole[shared:], *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])]
        return self._prompt_and_answer(example, whole[:shared], tail, [True] * len(tail))

    def _prompt_and_answer(
        self, example: Example, prompt: Sequence[int], tail: Sequence[int], trained: Sequence[bool]
    ) -> Rendered:
        room = self.max_length - len(tail)
        if room < 1:  # the answer is never cut: a row whose answer does not fit teaches nothing, and is counted
            ids, cut = self._cut_left(prompt, self.max_length)
            lost = len(prompt) + len(tail) - len(ids)
            return Rendered(example, ids, (False,) * len(ids), cut=lost, cut_side="right", answer_cut=True)
        ids, cut = self._cut_left(prompt, room)
        flags = (False,) * len(ids) + tuple(trained)
        return Rendered(example, (*ids, *tail), flags, cut=cut, cut_side="left" if cut else "")

    def _chat(self, example: Example, text: ChatText) -> Rendered:
        """The whole text is tokenised once; tokens that overlap a trained reply are trained."""
        found = self.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        trained = [any(a < end and begin < b for begin, end in text.trained) for a, b in offsets]
        trained = [use and b > a for use, (a, b) in zip(trained, offsets, strict=True)]
        if len(ids) <= self.max_length:
            return Rendered(example, tuple(ids), tuple(trained))
        first = trained.index(True) if True in trained else len(ids)
        over = len(ids) - self.max_length
        start = len(self.start) if tuple(ids[: len(self.start)]) == self.start else 0
        if over <= first - start:  # only text before the first trained reply goes
            kept, flags = ids[:start] + ids[start + over :], trained[:start] + trained[start + over :]
            return Rendered(example, tuple(kept), tuple(flags), cut=over, cut_side="left")
        kept_ids = tuple(ids[: self.max_length])
        return Rendered(
            example, kept_ids, (False,) * len(kept_ids), cut=over, cut_side="right", answer_cut=True
        )

    def _masked(self, example: Example) -> Rendered:
        """The masked prompt, with one-token verbalizers read at the mask."""
        before, mark, after = example.prompt.partition(MASK)
        if not mark or MASK in after:
            raise RecipeError(f"`task.masked_prompt` must hold {MASK} once. Received {example.prompt!r}.")
        left = list(self.tokenizer(before.rstrip(), add_special_tokens=False)["input_ids"])
        right = list(self.tokenizer(after, add_special_tokens=False)["input_ids"])
        over = max(0, len(self.start) + len(left) + 1 + len(right) + len(self.end) - self.max_length)
        from_left = min(over, len(left))  # the wording next to the mask stays
        left, right = left[from_left:], right[: len(right) - (over - from_left)]
        ids = (*self.start, *left, self.tokenizer.mask_token_id, *right, *self.end)
        answers = tuple((self._verbalizer(c, spaced=bool(before.strip())),) for c in example.candidates)
        return Rendered(
            example,
            ids,
            (False,) * len(ids),
            answers,
            read_at=len(self.start) + len(left),
            cut=over,
            cut_side="" if not over else "left" if from_left else "right",
        )

    def _verbalizer(self, word: str, *, spaced: bool) -> int:
        """The one token of a verbalizer, with the leading space that the tokenizer's own words carry."""
        word = word.strip()
        for text in (f" {word}", word) if spaced else (word, f" {word}"):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                return int(ids[0])
        raise RecipeError(
            f"A verbalizer of a masked model must be one token. Received {word!r}, which is not. "
            "Try another word with --labels, or --form head."
        )

    def _head(self, example: Example) -> Rendered:
        text = example.prompt or example.text
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        room = self.max_length - len(self.start) - len(self.end)
        cut = max(0, len(ids) - room)
        kept = (*self.start, *ids[: len(ids) - cut], *self.end)
        return Rendered(example, kept, (False,) * len(kept), cut=cut, cut_side="right" if cut else "")


def _specials(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids the tokenizer puts before and after a text of its own accord."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return tuple(full[:at]), tuple(full[at + len(plain) :])
    return (), ()


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Length of what all id sequences begin with, leaving each of the later ones at least one id."""
    limit = min(len(texts[0]), *(max(0, len(t) - 1) for t in texts[1:]))
    return next((i for i in range(limit) if len({t[i] for t in texts}) > 1), limit)
