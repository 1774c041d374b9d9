"""Talks with a model, reply by reply, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from tunefork.errors import UnsupportedError
from tunefork.evaluate.generate import answer_renderer, end_tokens
from tunefork.evaluate.trained import Trained, is_trained, load_trained, load_untrained
from tunefork.hosted import HostedModel, find_model, is_hosted
from tunefork.hosted.answers import Answer
from tunefork.hosted.asking import as_json
from tunefork.hosted.client import Client, overlay
from tunefork.recipe import DataSection, HostedSection, ModelSection, TaskSection
from tunefork.tasks import Example, Message, Task, make_task
from tunefork.workflows.tuned import open_tuned


class Chat:
    """A conversation with a run, with any chat model, or with a service's, which bills what is said.

    Temperature 0 is greedy; above it replies are drawn, by `seed`, from the model's whole distribution.
    `trust_remote_code`: whether a model that brings its own Python code may run it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self._hosted, self._section = _find_hosted(model)
        self.trained = None if self._hosted is not None else _load(model, device, trust_remote_code)
        system = self._section.system if system is None else system
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.left_out = 0  # tokens of the conversation that the last reply could not see

    def say(self, text: str) -> Iterator[str]:
        """Yields the reply in pieces as it is generated; afterwards it is part of the conversation."""
        self.messages.append(Message("user", text))
        pieces: list[str] = []
        for piece in self._reply(self.seed + len(self.messages)):
            pieces.append(piece)
            yield piece
        self.messages.append(Message("assistant", "".join(pieces).strip()))

    def _reply(self, seed: int) -> Iterator[str]:
        if self.trained is not None:
            renderer = answer_renderer(self.trained.model, self.trained.renderer)
            prompt = renderer.prompt(Example("chat", messages=tuple(self.messages)))
            self.left_out = prompt.cut
            yield from stream(self.trained, prompt.ids, self.temperature, self.max_new_tokens, seed)
        elif self._hosted is not None:
            body = {"model": self._hosted.id, "messages": as_json(self.messages), "temperature": self.temperature}
            body |= {"seed": seed, self._hosted.service.longest: self.max_new_tokens}
            yield Answer(Client(self._hosted.service).chat(overlay(body, self._section.request)), 0).text


def stream(trained: Trained, prompt: Sequence[int], temperature: float, longest: int, seed: int) -> Iterator[str]:
    """The reply to a prompt of token ids, in pieces; at most `longest` tokens, and what the model has positions for.

    With a temperature a token is drawn from all of them (no top-k, no top-p). Sampling settings and penalties that the
    model ships are not used. Whoever stops listening stops the generation.
    """
    tokenizer, ends = trained.tokenizer, end_tokens(trained.model, trained.renderer)
    ids = torch.tensor([list(prompt)], device=trained.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else 50,  # unread without sampling, where transformers warns of all but its default
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max(1, min(longest, trained.facts.max_positions - len(prompt))),
        eos_token_id=list(ends) or None,
        pad_token_id=trained.renderer.pad,
    )
    unheard = Event()

    def generate() -> None:
        try:
            with trained.compute(), torch.inference_mode(), torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
                torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
                trained.model.eval().generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([_Unheard(unheard)]),
                    streamer=streamer,
                )
        finally:
            streamer.end()  # whatever happened: the listener waits for it

    with ThreadPoolExecutor(1) as worker:
        done = worker.submit(generate)
        try:
            yield from streamer
        finally:
            unheard.set()
        done.result()


class _Unheard(StoppingCriteria):
    """True once nobody listens any more."""

    def __init__(self, unheard: Event) -> None:
        self.unheard = unheard

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.unheard.is_set(), device=input_ids.device)


def _find_hosted(model: str | Path) -> tuple[HostedModel | None, HostedSection]:
    """The service's model that is meant, by its name or as a run, and how it is asked."""
    if is_hosted(str(model)):
        return find_model(str(model)), HostedSection()
    if (tuned := open_tuned(model)) is None:
        return None, HostedSection()
    _require_chat(tuned.task, model)
    return tuned.model, tuned.section


def _require_chat(task: Task, model: str | Path) -> None:
    if task.form != "chat":
        raise UnsupportedError(
            f"A chat needs a run of the task chat. Received {str(model)!r}, trained for {task.info.name}. "
            "Try `tunefork predict`."
        )


def _load(model: str | Path, device: str, trusted: bool) -> Trained:
    if is_trained(model) or (Path(model) / "recipe.yaml").is_file():  # a run without a model is refused in loading
        trained = load_trained(model, device, trust_remote_code=trusted)
        _require_chat(trained.task, model)
        return trained
    section = ModelSection.model_validate({"name": str(model), "device": device, "trust_remote_code": trusted})
    task = make_task(TaskSection(name="chat"), DataSection(), "causal", ())
    return load_untrained(section, task, False)
