"""One answer in the making: which token comes next, what of its text can be told, and when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tunefork.errors import RunError

_COLD = 1e-4  # a temperature below it is 0: the most likely token
_CONTEXT = 4  # tokens before one that decide how it is written


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn, in OpenAI's terms. `top` asks for log-probabilities, with so many alternatives."""

    longest: int  # tokens
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text and its log-probability in nats, before temperature and bias. `whole` is false for a part of a
    character, which is shown by its name in the vocabulary."""

    text: str
    logprob: float | None  # None for a first token, which nothing predicts
    whole: bool = True
    top: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer: text, its tokens where they were asked for, and with the last one why it ended."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str | None = None  # stop, length
    error: BaseException | None = None  # nothing more will come


class Row:
    """A prompt and what has been generated after it. Used by the thread that computes; only `stop` by others."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: Any,
        ends: Sequence[int],
        tell: Callable[[Piece], None],
        *,
        read_prompt: bool = False,
        special: bool = False,
    ) -> None:
        """`tell` hears every piece. `read_prompt`: the first piece has the tokens of the prompt. `special`: special
        tokens are told as text."""
        self.prompt, self.sampling, self.tokenizer, self.ends, self.tell = prompt, sampling, tokenizer, ends, tell
        self.read_prompt, self.special = read_prompt, special
        self.generated: list[int] = []
        self.done = self.failed = False
        self._generator: torch.Generator | None = None
        self._from, self._told = 0, 0  # of `generated`: where the decoded window begins, and what it has told
        self._text, self._tokens, self._places = "", [], []  # not told yet: it may become a stop string

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.generated]

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.sampling.longest - len(self.generated)

    def stop(self) -> None:
        """Nobody listens any more."""
        self.done = True

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self.tell(Piece(error=error))
        self.done = self.failed = True

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from fp32 logits [V]. Tells what it makes known; of a broken model, that it is broken."""
        if not bool(logits.amax().isfinite()):  # its own answer fails, not those that are computed with it
            self.fail(RunError("A model's logits must be finite numbers. Received others. Its training has diverged."))
            return self.prompt[-1]
        token = self._draw(logits)
        wanted = self.sampling.top is not None and token not in self.ends
        shown = self._measured(self.ids, token, logits) if wanted else None
        self.generated.append(token)
        if token in self.ends:
            self._end("stop")
            return token
        self._places.append(len(self._text))
        self._text += self._new_text()
        if shown:
            self._tokens.append(shown)
        found = [at for stop in self.sampling.stop if (at := self._text.find(stop)) >= 0]
        if found:
            self._tokens = [t for t, at in zip(self._tokens, self._places, strict=False) if at < min(found)]
            self._text = self._text[: min(found)]
            self._end("stop")
        elif self.left <= 0:
            self._end("length")
        elif self._text and not any(self._begins(stop) for stop in self.sampling.stop):
            self._flush()
        return token

    def read(self, logits: torch.Tensor) -> None:
        """Tells the prompt's tokens, from its fp32 logits [T, V], but for the one that begins any text."""
        begun = self.prompt[0] in self.tokenizer.all_special_ids
        tokens = [] if begun else [Token(*self._written([], self.prompt[0]), top=())]
        for at in range(1, len(self.prompt)):
            tokens.append(self._measured(self.prompt[:at], self.prompt[at], logits[at - 1]))
        self.read_prompt = False
        self.tell(Piece(tokens=tuple(tokens)))
        if self.left <= 0:
            self._end("length")

    def _draw(self, logits: torch.Tensor) -> int:
        options, scores = self.sampling, logits
        if options.bias or options.frequency_penalty or options.presence_penalty:
            scores = logits.clone()
            for token, count in Counter(self.generated).items():
                scores[token] -= options.frequency_penalty * count + options.presence_penalty
            for token, bias in options.bias.items():
                scores[token] += bias
        if options.temperature < _COLD:
            return int(scores.argmax())
        if self._generator is None:  # of its own: what else is computed has no part in what is drawn
            self._generator = torch.Generator(scores.device).manual_seed(options.seed)
        probabilities, order = torch.softmax(scores / options.temperature, -1).sort(descending=True, stable=True)
        beyond = probabilities.cumsum(0) - probabilities >= options.top_p
        beyond[0] = False
        probabilities[beyond] = 0.0
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])

    def _new_text(self) -> str:
        """What the last token adds; nothing while it ends in a part of a character."""
        before = self._decoded(self.generated[self._from : self._told], special=self.special)
        after = self._decoded(self.generated[self._from :], special=self.special)
        if after.endswith("\ufffd"):
            return ""
        self._from, self._told = self._told, len(self.generated)
        return after[len(before) :]

    def _begins(self, stop: str) -> bool:
        """Whether the text that waits ends in the beginning of a stop string."""
        return any(self._text.endswith(stop[:n]) for n in range(1, len(stop)))

    def _end(self, why: str) -> None:
        self.done = True
        self.tell(Piece(self._text, tuple(self._tokens), why))

    def _flush(self) -> None:
        self.tell(Piece(self._text, tuple(self._tokens)))
        self._text, self._tokens, self._places = "", [], []

    def _measured(self, before: Sequence[int], token: int, logits: torch.Tensor) -> Token:
        logprobs = torch.log_softmax(logits, -1)
        values, ids = logprobs.topk(self.sampling.top or 0)
        top = [Token(*self._written(before, i, v)) for v, i in zip(values.tolist(), ids.tolist(), strict=True)]
        return Token(*self._written(before, token, float(logprobs[token])), top=tuple(top))

    def _written(self, before: Sequence[int], token: int, logprob: float | None = None) -> tuple[str, Any, bool]:
        """A token's text where it stands, its log-probability, and whether it is whole."""
        context = list(before[-_CONTEXT:])
        start = self._decoded(context, special=True)
        text = self._decoded([*context, token], special=True)[len(start) :]
        if text and "\ufffd" not in text and "\ufffd" not in start:
            return text, logprob, True
        alone = self._decoded([token], special=True)
        if alone and "\ufffd" not in alone:
            return alone, logprob, True
        return str(self.tokenizer.convert_ids_to_tokens(token)), logprob, False

    def _decoded(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)
