"""A hosted model asked a task's questions: the same examples and predictions as a model of one's own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunefork.errors import HostedError, UnsupportedError
from tunefork.evaluate.harness import candidate_prediction, right_answer
from tunefork.hosted.answers import Answer, AnswerStore, ask_all, request_key
from tunefork.hosted.client import Client, overlay
from tunefork.hosted.labels import label_shares
from tunefork.hosted.prices import Budget, Estimate, estimate_requests, find_price
from tunefork.hosted.services import HostedModel
from tunefork.recipe.schema import HostedSection
from tunefork.render.messages import asked_messages
from tunefork.tasks.base import Example, Message, Prediction, Task


@dataclass(frozen=True)
class HostedAsking:
    """How a hosted model is asked: its task, where its answers are kept, and what they may cost."""

    task: Task
    model: HostedModel
    client: Client
    store: AnswerStore
    budget: Budget
    section: HostedSection
    unanswered: dict[str, str] = field(default_factory=dict)  # source -> why; of what was predicted so far

    def estimate(self, examples: Sequence[Example], stops: Sequence[str] = ()) -> Estimate:
        """Of what is not in the cache."""
        bodies = {request_key(self.client.service.base_url, b): b for b in self._bodies(examples, stops)}
        left = [body for key, body in bodies.items() if self.store.get(key) is None]
        return estimate_requests(left, self.budget.price)

    def cost(self) -> str:
        """In a sentence, what was sent and spent since this was opened."""
        spent = "" if self.budget.price is None else f", ${self.budget.spent:,.4f}"
        return f"{self.client.sent:,} requests to {self.model.service.name}{spent}; other answers were in the cache."

    def predict(
        self,
        examples: Sequence[Example],
        *,
        stops: Sequence[str] = (),
        on_answer: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[list[Prediction], list[str]]:
        """A prediction a row, in order, and notes. Labels and choices get probabilities; text has no loss.

        A row that the service refuses, or whose answer names no label, has even probabilities or no text, and a note.
        """
        bodies = self._bodies(examples, stops)
        answers = ask_all(
            self.client, self.store, bodies, self.budget, concurrency=self.section.concurrency, on_answer=on_answer
        )
        refused = [(e, a) for e, a in zip(examples, answers, strict=True) if isinstance(a, HostedError)]
        notes = [f"{len(refused)} of {len(examples)} rows were refused. {e.source}: {why}" for e, why in refused[:1]]
        self.unanswered.update({e.source: str(why) for e, why in refused})
        said = [answer if isinstance(answer, Answer) else None for answer in answers]
        if self.task.form == "text" or self.task.form == "chat":
            return [_text(e, a, (*self.task.stop, *stops)) for e, a in zip(examples, said, strict=True)], notes
        predictions, masses = [], []
        for example, answer in zip(examples, said, strict=True):
            names = self.task.labels or tuple(c.strip() for c in example.candidates)
            shares, mass = label_shares(answer.tokens if answer else (), answer.text if answer else "", names)
            predictions.append(candidate_prediction(self.task, example, shares))
            masses.append(mass)
            if mass == 0 and answer is not None:
                self.unanswered[example.source] = f"The answer names no label: {answer.text[:200]!r}"
        if missed := sum(mass == 0 for mass in masses):
            notes.append(f"{missed} of {len(examples)} answers name no label; each counts as the first, all even.")
        if any(answer.tokens for answer in said if answer):
            notes.append(f"The labels had {sum(masses) / len(masses):.3f} of the answers' probability in the mean.")
        return predictions, notes

    def _bodies(self, examples: Sequence[Example], stops: Sequence[str]) -> list[dict[str, Any]]:
        return [self.body(self.task, self.model, self.section, example, stops) for example in examples]

    @staticmethod
    def body(
        task: Task, model: HostedModel, section: HostedSection, example: Example, stops: Sequence[str]
    ) -> dict[str, Any]:
        """The request that asks an example's question."""
        labelled = task.form not in ("text", "chat")
        longest = task.max_new_tokens
        if labelled:  # no token is shorter than a byte
            longest = max(len(c.encode()) for c in example.candidates) + 8
        body: dict[str, Any] = {
            "model": model.id,
            "messages": as_json((*system_message(task, example, section.system), *asked_messages(example))),
            "temperature": 0,
            model.service.longest: longest,
        }
        if labelled and section.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": section.top_logprobs}
        if not labelled and (*task.stop, *stops):
            body["stop"] = list(dict.fromkeys((*task.stop, *stops)))[:4]
        return overlay(body | ({"tools": [dict(t) for t in example.tools]} if example.tools else {}), section.request)


@contextmanager
def asking_hosted(
    model: HostedModel, task: Task, section: HostedSection, client: Client | None = None
) -> Iterator[HostedAsking]:
    """A model of a service, ready to be asked. Raises UnsupportedError for a task it cannot be asked."""
    if task.objective == "preference":
        raise UnsupportedError(
            "A hosted model tells no likelihood of a given reply, which preferences are measured by. Received the task "
            "preference. Try --task chat on the preferred replies."
        )
    budget = Budget(find_price(model, section.prices), section.limit)
    with AnswerStore(cache_folder(section, model)) as store:
        yield HostedAsking(task, model, client or Client(model.service), store, budget, section)


def cache_folder(section: HostedSection, model: HostedModel) -> Path:
    """Where a model's answers are kept: a folder a model in `hosted.cache`, the user's cache when absent."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunefork" / "answers"
    name = hashlib.sha256(f"{model.service.base_url} {model.id}".encode()).hexdigest()[:24]
    return (Path(section.cache) if section.cache is not None else home) / name


def system_message(task: Task, example: Example, given: str | None) -> tuple[Message, ...]:
    """What stands before every question, in training and when asked: by default the list of labels or choices."""
    text = given
    if given is None and task.form in ("verbalizer", "head"):
        text = f"Answer with one of these and nothing else: {', '.join(task.labels)}."
    elif given is None and task.form == "choice":
        choices = "".join(f"\n- {candidate.strip()}" for candidate in example.candidates)
        text = f"Answer with one of these, word for word, and nothing else:{choices}"
    return (Message("system", text),) if text else ()


def as_json(messages: Sequence[Message], *, weights: bool = False) -> list[dict[str, Any]]:
    """Messages as a service is sent them; with `weights`, replies that are not trained say so."""
    return [
        {"role": m.role, "content": m.content, **_extra(m)}
        | ({"weight": 0} if weights and m.role == "assistant" and not m.trained else {})
        for m in messages
    ]


def _extra(message: Message) -> dict[str, Any]:
    """Names and tool calls; arguments as JSON text, which services want, where chat templates want objects."""
    extra = dict(message.extra or {})
    if extra.get("tool_calls"):
        extra["tool_calls"] = [{**call, "function": _as_text(call["function"])} for call in extra["tool_calls"]]
    return extra


def _as_text(function: Mapping[str, Any]) -> dict[str, Any]:
    given = function.get("arguments", {})
    return {**function, "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)}


def _text(example: Example, answer: Answer | None, stops: Sequence[str]) -> Prediction:
    return Prediction(
        example.source,
        answer.text.strip() if answer is not None else "",
        right_answer(example),
        stopped=None if answer is None else answer.finish_reason == "stop",
        references=example.references,
        group=example.group,
    )
