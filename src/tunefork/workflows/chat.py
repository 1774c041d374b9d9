"""Talks with a model, reply by reply, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from tunefork.evaluate.trained import Trained, is_trained, load_trained, load_untrained
from tunefork.recipe import DataSection, ModelSection, TaskSection
from tunefork.tasks import Example, Message, make_task


class Chat:
    """A conversation with a run or with any chat model. Sampling is seeded; temperature 0 is greedy."""

    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        self.trained = _load(model, device)
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self.messages: list[Message] = [Message("system", system)] if system else []

    def say(self, text: str) -> Iterator[str]:
        """Yields the reply in pieces as it is generated; afterwards it is part of the conversation."""
        self.messages.append(Message("user", text))
        pieces: list[str] = []
        for piece in stream(self.trained, self.messages, self.temperature, self.max_new_tokens, self.seed):
            pieces.append(piece)
            yield piece
        self.messages.append(Message("assistant", "".join(pieces).strip()))


def stream(
    trained: Trained, messages: Sequence[Message], temperature: float, max_new_tokens: int, seed: int
) -> Iterator[str]:
    """The reply to `messages`, in pieces."""
    prompt = trained.renderer.prompt(Example("chat", messages=tuple(messages)))
    ids = torch.tensor([prompt.ids], device=trained.device)
    streamer = TextIteratorStreamer(trained.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )

    def generate() -> None:
        with trained.compute(), torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed + len(messages))
            trained.model.eval().generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=trained.tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
            )

    worker = Thread(target=generate, daemon=True)
    worker.start()
    yield from streamer
    worker.join()


def _load(model: str | Path, device: str) -> Trained:
    if is_trained(model):
        return load_trained(model, device)
    section = ModelSection.model_validate({"name": str(model), "device": device})
    task = make_task(TaskSection(name="chat"), DataSection(), "causal", ())
    return load_untrained(section, task, False)
