"""Examples of one task as token ids of one tokenizer: what is read, what is trained, what is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunefork.batch import Batch
from tunefork.errors import DataError, RecipeError, UnsupportedError
from tunefork.recipe.schema import ModelKind
from tunefork.render.chat import ChatText, chat_texts, prompt_text, shorter_chats, stop_text
from tunefork.render.collate import answer_batch, candidate_batch, head_batch, text_batch
from tunefork.render.messages import asked_messages, taught_messages
from tunefork.render.rendered import Rendered, common_prefix, last_words, leading, trained_tokens
from tunefork.tasks.base import MASK, Example, Message, Objective, Task

MOST_ENDS = 4096  # ends of prompts whose continuations are remembered
MOST_PARTS = 8  # tokens that make a character; a byte each, and they may reach into the next one
_Split = tuple[list[int], int, tuple[tuple[int, ...], ...]]


class Renderer:
    """Renders the examples of one task for one model's tokenizer, at most `max_length` tokens a sequence.

    The start token stands once at the beginning of a causal text if the tokenizer puts one there by itself; where a
    chat template writes the text, the template decides. No end token follows a causal prompt.

    Raises RecipeError or UnsupportedError where the tokenizer lacks what the task needs.
    """

    def __init__(
        self, tokenizer: Any, model_kind: ModelKind, task: Task, max_length: int, use_chat_template: bool
    ) -> None:
        self.tokenizer, self.model_kind, self.task = tokenizer, model_kind, task
        self.max_length, self.chat_template = max_length, use_chat_template or bool(task.form == "chat" or task.beta)
        self.start, self.end = _specials(tokenizer)
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
        if self.chat_template:
            self._check_chat()
        if model_kind == "masked" and task.form == "verbalizer" and tokenizer.mask_token_id is None:
            raise RecipeError("A masked prompt needs a tokenizer with a mask token. Received none. Try --form head.")
        self._ends: dict[tuple[str, tuple[str, ...]], _Split] = {}
        self.stop_ids = self._stop_ids()
        self.objective = self._objective()

    def render(self, example: Example) -> list[Rendered]:
        """The example as training and evaluation see it; several where a template rewrites earlier turns, and where a
        text without a prompt is longer than `max_length`.

        Raises DataError where the chat template refuses the row, or a prompt has no token to predict from.
        """
        if self.task.form == "chat":
            return self._conversation(example, example)
        if self.task.form == "head":
            return [self._head(example)]
        if self.task.objective == "preference":
            return [self._preference(example)]
        if self.task.form == "text":
            return self._text(example)
        return [self._masked(example) if self.model_kind == "masked" else self._candidates(example)]

    def prompt(self, example: Example) -> Rendered:
        """What an answer is generated from: everything before the answer.

        Too long a text is cut from the left; a chat first loses its oldest exchanges.
        """
        asked = self._asked(example)
        chats = [asked, *shorter_chats(asked)] if self.task.form == "chat" else [asked]
        texts = [self._tokens(self._question(chats[0]))]
        for chat in chats[1:]:
            if len(texts[-1]) <= self.max_length:
                break
            texts.append(self._tokens(self._question(chat)))
        ids = texts[-1]
        return self._fitted(example, ids, [False] * len(ids), len(texts[0]) - len(ids))

    def batch(self, rendered: Sequence[Rendered], *, learn: bool = False) -> Batch:
        """Rows as padded tensors; see `Batch`. All rows must be of this renderer.

        With `learn`, where the objective is `answer`, the right candidate alone is text to be predicted.
        """
        if self.task.form in ("text", "chat"):
            return text_batch(rendered, self.pad)
        if self.task.form == "head":
            return head_batch(rendered, self.pad)
        if learn and self.objective == "answer":
            return answer_batch(rendered, self.pad)
        found = candidate_batch(rendered, self.pad)
        return found if self.task.beta is None else replace(found, beta=self.task.beta)

    def describe(self) -> dict[str, Any]:
        """What decides the rendering, as JSON: kept with the model so that it is asked the same way.

        `fingerprint` is equal for two renderers only if they give the same ids for the same example.
        """
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items()))
        known: dict[str, Any] = {
            "form": self.task.form,
            "objective": self.objective,
            "wording": dict(self.task.wording),
            "chat_template": self.tokenizer.chat_template if self.chat_template else None,
            "max_length": self.max_length,
            "stop": list(self.task.stop),
            "stop_ids": list(self.stop_ids),
            "vocabulary_size": len(self.tokenizer),
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        }
        return {**known, "fingerprint": hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()}

    def explain(self, rendered: Rendered) -> list[tuple[str, int, str]]:
        """(text, id, role) of each token. Roles: masked, trained, read, `candidate N`, and `right N` for the right one.

        The texts joined are the text; of tokens that only together make a character, the first has it. Tokens that were
        cut are one line with the role `cut` and the id -1, where they stood. Under a head the last line is the name of
        the right class, with its number and the role `right class`.
        """
        ids = rendered.ids
        lines = [
            (text, token, "trained" if use else "read" if t == rendered.read_at else "masked")
            for t, (text, token, use) in enumerate(zip(self._shown(ids), ids, rendered.trained, strict=True))
        ]
        for c, candidate in enumerate(rendered.candidates):
            role = f"right {c}" if c == rendered.example.gold else f"candidate {c}"
            texts = self._shown((*ids[-1:], *candidate))[len(ids[-1:]) :]
            lines += [(text, token, role) for text, token in zip(texts, candidate, strict=True)]
        if rendered.cut:
            ends = len(self.end) if self.end and rendered.ids[-len(self.end) :] == self.end else 0
            at = len(rendered.ids) - ends if rendered.cut_side == "right" else leading(rendered.ids, self.start)
            lines.insert(at, (f"({rendered.cut} tokens left out)", -1, "cut"))
        if self.task.form == "head" and rendered.example.gold is not None:
            lines.append((self.task.labels[rendered.example.gold], rendered.example.gold, "right class"))
        return lines

    def _check_chat(self) -> None:
        if self.model_kind != "causal" or self.task.form == "head":
            raise UnsupportedError(
                f"`task.chat_template` needs a causal model that answers in words. Received a {self.model_kind} model "
                f"and the form {self.task.form}. Try without it."
            )
        if not self.tokenizer.chat_template:
            raise RecipeError(
                "A chat needs a model with a chat template. Received a tokenizer without one. Try the model's "
                "instruction-tuned sibling, put a chat_template.jinja into its folder, or use --task generation."
            )
        if not self.tokenizer.is_fast:
            raise UnsupportedError(
                "A chat needs a tokenizer that tells where its tokens stand in the text (a fast one). Received "
                f"{type(self.tokenizer).__name__}. Try a model folder with a tokenizer.json."
            )

    def _stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the one the chat template writes after a reply, and the end token."""
        eos = self.tokenizer.eos_token_id
        found = [] if eos is None else [int(eos)]
        if self.chat_template:
            written = self._plain(stop_text(self.tokenizer))
            special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
            found = [*(token for token in written[:1] if token in special), *found]
        return tuple(dict.fromkeys(found))

    def _objective(self) -> Objective:
        """The task's, but candidates when nobody asked for another and every label is one token of its own."""
        if not (self.task.automatic_objective and self.task.labels and self.task.form == "verbalizer"):
            return self.task.objective
        if self.model_kind == "masked":
            return "candidates"
        ends_in_space = str(self.task.wording.get("prompt", "")).endswith((" ", "\n"))
        labels = self.task.labels if ends_in_space else tuple(f" {label}" for label in self.task.labels)
        _, answers = self._continued("Which is it?\n" if ends_in_space else "It is", labels)
        return "candidates" if _single(answers) else self.task.objective

    def _shown(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text: nothing after the first of those that only together make a character.

        Where no character comes of them (one was cut, say) a token is its name in the vocabulary.
        """
        found: list[str] = []
        before = 0  # where the piece before begins: a token is decoded after it, for its space depends on that
        while len(found) < len(ids):
            at = len(found)
            known = str(self.tokenizer.decode(ids[before:at])) if at else ""
            for end in range(at + 1, min(at + MOST_PARTS, len(ids)) + 1):
                text = str(self.tokenizer.decode(ids[before:end]))
                if text.startswith(known) and len(text) > len(known) and "\ufffd" not in text[len(known) :]:
                    found += [text[len(known) :], *[""] * (end - at - 1)]
                    break
            else:
                found.append(str(self.tokenizer.convert_ids_to_tokens(ids[at])))
            before = at
        return found

    def _asked(self, example: Example) -> Example:
        """The example without the reply that is to be generated."""
        return replace(example, messages=asked_messages(example)) if example.messages else example

    def _question(self, example: Example) -> str:
        """The text before the answer, as the chat template writes it where one is used."""
        if self.task.form == "chat":
            return prompt_text(self.tokenizer, example)
        if self.chat_template:
            return prompt_text(self.tokenizer, replace(example, messages=asked_messages(example)))
        return example.prompt

    def _tokens(self, text: str) -> list[int]:
        """Ids of a causal text. A template writes its own start token; another text has it once."""
        ids = self._plain(text)
        return ids if self.chat_template or leading(ids, self.start) else [*self.start, *ids]

    def _continued(self, question: str, texts: tuple[str, ...]) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """The ids that all of question + text begin with, and the rest of each.

        Only the end of a question is tokenised again with each text, once for all questions that end alike, provided
        that the question's ids do end with those of its end.
        """
        prompt, end = self._tokens(question), question[last_words(question) :]
        if (end, texts) not in self._ends:
            if len(self._ends) >= MOST_ENDS:
                self._ends.clear()
            self._ends[end, texts] = _split(self._plain(end), [self._plain(end + text) for text in texts])
        ids, shared, answers = self._ends[end, texts]
        if shared and prompt[len(prompt) - len(ids) :] == ids:
            return prompt[: len(prompt) - len(ids) + shared], answers
        _, shared, answers = _split(prompt, [self._tokens(question + text) for text in texts])
        return prompt[:shared], answers

    def _plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens of the tokenizer's own; too long a one is this class's business."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _candidates(self, example: Example) -> Rendered:
        """Whole texts are tokenised, and what all of them begin with is the prompt: no boundary is guessed."""
        question = self._question(example)
        texts = [c.lstrip() for c in example.candidates] if self.chat_template else example.candidates
        prompt, answers = self._continued(question, tuple(texts))
        single = _single(answers)
        if not prompt:
            raise DataError(
                f"{example.source}: a candidate must follow a prompt of at least one token. Received "
                f"{question[-40:]!r} before {texts[0]!r}. Try a longer task.prompt."
            )
        fitted = self._before(example, prompt, 0 if single else max(len(a) for a in answers))
        return replace(fitted, candidates=answers, read_at=len(fitted.ids) - 1 if single else None)

    def _preference(self, example: Example) -> Rendered:
        """The conversation, and after it each reply as the template writes it, with its stop token."""
        chats = [replace(example, messages=(*example.messages, Message("assistant", c))) for c in example.candidates]
        wholes = [self._encoded(chat_texts(self.tokenizer, chat)[-1]) for chat in chats]
        first = min(trained.index(True) for _, trained in wholes)
        shared = common_prefix(wholes[0][0][:first], [ids for ids, _ in wholes])
        ends = [len(trained) - trained[::-1].index(True) for _, trained in wholes]
        answers = tuple(tuple(ids[shared:end]) for (ids, _), end in zip(wholes, ends, strict=True))
        fitted = self._before(example, wholes[0][0][:shared], max(len(a) for a in answers))
        return replace(fitted, candidates=answers)

    def _before(self, example: Example, prompt: list[int], longest: int) -> Rendered:
        """The prompt, cut so that the longest candidate fits behind it."""
        if longest >= self.max_length:
            raise DataError(
                f"{example.source}: a candidate and one token of its prompt must fit {self.max_length} tokens. "
                f"Received a candidate of {longest}. Try a larger model.max_length, or leave the row out."
            )
        return self._fitted(example, prompt, [False] * len(prompt), room=self.max_length - longest)

    def _text(self, example: Example) -> list[Rendered]:
        """Prompt, answer and end token; trained on the answer and the end token."""
        if example.answer is None:
            return [self.prompt(example)]
        if self.chat_template:
            return self._conversation(example, replace(example, messages=taught_messages(example)))
        prompt, whole = self._tokens(example.prompt), self._tokens(example.prompt + example.answer)
        shared = common_prefix(prompt, [whole])
        tail = [*whole[shared:], *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])]
        if not example.prompt and shared + len(tail) > self.max_length:
            return self._in_pieces(example, tail)
        trained = [False] * shared + [True] * len(tail)
        return [self._fitted(example, [*whole[:shared], *tail], trained)]

    def _in_pieces(self, example: Example, ids: Sequence[int]) -> list[Rendered]:
        """A long text without a prompt, all of it trained: each piece after the start token, or the token before it."""
        room = self.max_length - max(1, len(self.start))
        found = []
        for at in range(0, len(ids), room):
            before, piece = self.start or tuple(ids[max(0, at - 1) : at]), ids[at : at + room]
            found.append(Rendered(example, (*before, *piece), (False,) * len(before) + (True,) * len(piece)))
        return found

    def _fitted(
        self, example: Example, ids: Sequence[int], trained: Sequence[bool], gone: int = 0, room: int | None = None
    ) -> Rendered:
        """At most `room` ids (max_length when absent), cut from the left after the start token.

        What is trained is never cut: where it does not fit behind at least one other token, nothing is trained.
        `gone` tokens of older turns have been left out before.
        """
        over = len(ids) - (self.max_length if room is None else room)
        if over <= 0:
            return Rendered(example, tuple(ids), tuple(trained), cut=gone, cut_side="turns" if gone else "")
        begin = leading(ids, self.start)
        first = next((t for t, use in enumerate(trained) if use), len(ids))
        if over <= first - max(begin, 1):
            kept, flags = (*ids[:begin], *ids[begin + over :]), (*trained[:begin], *trained[begin + over :])
            return Rendered(example, kept, flags, cut=over + gone, cut_side="left")
        kept = tuple(ids[:-over])
        return Rendered(example, kept, (False,) * len(kept), cut=over + gone, cut_side="right", answer_cut=True)

    def _conversation(self, example: Example, chat: Example) -> list[Rendered]:
        """A chat with its replies trained; too long a one loses its oldest exchanges, system messages stay."""
        found: list[Rendered] = []
        texts = chat_texts(self.tokenizer, chat)
        for text in texts:
            ids, trained = self._encoded(text)
            full = len(ids)
            for shorter in shorter_chats(chat, text.turns):
                if len(ids) <= self.max_length:
                    break
                again = chat_texts(self.tokenizer, _only_last(shorter) if len(texts) > 1 else shorter)
                if len(again) == 1 and again[0].trained:
                    ids, trained = self._encoded(again[0])
            found.append(self._fitted(example, ids, trained, full - len(ids)))
        return found

    def _encoded(self, text: ChatText) -> tuple[list[int], list[bool]]:
        """The text tokenised once, and which tokens overlap what is trained."""
        found = self.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), trained_tokens(found["offset_mapping"], text.trained)

    def _masked(self, example: Example) -> Rendered:
        """The masked prompt, cut so that the mask stays, with one-token verbalizers read at the mask."""
        before, _, after = example.prompt.partition(MASK)
        left = self._plain(before.rstrip())
        right = self._plain(after)
        over = max(0, len(self.start) + len(left) + 1 + len(right) + len(self.end) - self.max_length)
        from_left = min(over, len(left))  # the wording next to the mask stays
        left, right = left[from_left:], right[: len(right) - (over - from_left)]
        ids = (*self.start, *left, int(self.tokenizer.mask_token_id), *right, *self.end)
        return Rendered(
            example,
            ids,
            (False,) * len(ids),
            tuple((self._verbalizer(candidate),) for candidate in example.candidates),
            read_at=len(self.start) + len(left),
            cut=over,
            cut_side="" if not over else "left" if from_left else "right",
        )

    def _verbalizer(self, word: str) -> int:
        """The one token of a verbalizer, with the space before it that words carry inside a text (RoBERTa)."""
        ids = self._plain(f" {word.strip()}")
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise RecipeError(
                f"A verbalizer of a masked model must be one token. Received {word.strip()!r}, which is {pieces}. "
                "Try other words with --labels, or --form head."
            )
        return int(ids[0])

    def _head(self, example: Example) -> Rendered:
        """The text between the tokenizer's special tokens, cut from the right."""
        ids = self._plain(example.prompt)
        cut = max(0, len(ids) - (self.max_length - len(self.start) - len(self.end)))
        kept = (*self.start, *ids[: len(ids) - cut], *self.end)
        return Rendered(example, kept, (False,) * len(kept), cut=cut, cut_side="right" if cut else "")


def _split(prompt: list[int], wholes: Sequence[Sequence[int]]) -> _Split:
    """The prompt, how much of it all of `wholes` begin with, and the rest of each."""
    shared = common_prefix(prompt, wholes)
    return prompt, shared, tuple(tuple(whole[shared:]) for whole in wholes)


def _single(answers: Sequence[Sequence[int]]) -> bool:
    """Whether each is one token, and another one."""
    return all(len(answer) == 1 for answer in answers) and len(set(answers)) == len(answers)


def _only_last(chat: Example) -> Example:
    """The same conversation with its last reply alone trained."""
    before = tuple(replace(m, trained=False) for m in chat.messages[:-1])
    return replace(chat, messages=(*before, chat.messages[-1]))


def _specials(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids the tokenizer puts before and after a text of its own accord."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return tuple(full[:at]), tuple(full[at + len(plain) :])
    return (), ()
