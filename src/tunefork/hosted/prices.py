"""What it costs: a dated table that anyone may edit, estimates before, a limit while, the sum after."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tunefork.errors import HostedError, MissingFileError, RecipeError
from tunefork.hosted.services import HostedModel

BYTES_A_TOKEN = 3.6  # of English prose in the tokenizers of 2023 to 2026, rounded down so that estimates are high
_MILLION = 1e6
_OF_A_MESSAGE = 4  # tokens around each message
_KEYS = {"input", "output", "tuned_input", "tuned_output", "train", "image"}
_SAID = {"date", "source"}  # of a line, before those of the table


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars a million tokens of one model, the day they were written down, and where they come from."""

    input: float
    output: float
    train: float | None
    date: str
    source: str
    image: int | None = None  # tokens of an image at most; None where the table does not say


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is about to be asked for, at most: tokens from bytes, answers as long as they may become."""

    requests: int
    input_tokens: int
    output_tokens: int
    trained_tokens: int
    cost: float | None  # US dollars; None where no price is known
    date: str  # of the prices

    def __add__(self, other: Estimate) -> Estimate:
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        names = ("requests", "input_tokens", "output_tokens", "trained_tokens")
        return replace(
            self, cost=cost, date=self.date or other.date, **{n: getattr(self, n) + getattr(other, n) for n in names}
        )

    def says(self) -> str:
        """In a sentence, with the date of the prices."""
        parts = [f"{self.trained_tokens:,} tokens to train"] if self.trained_tokens else []
        if self.requests:
            parts.append(
                f"{self.requests:,} requests of {self.input_tokens:,} tokens, at most {self.output_tokens:,} in answers"
            )
        what = "About " + " and ".join(parts or ["nothing left to ask"])
        if self.cost is None:
            return f"{what}; no price is known for all of it (see --prices)."
        dated = f" by the prices of {self.date}" if self.date else ""
        return f"{what}: at most about ${self.cost:,.2f}{dated}."


class Budget:
    """A limit that is never passed: before a request, what it may cost at most must fit beside what was spent.

    Thread-safe. `spent` is in US dollars; requests that were cut off count as if they had been answered at length.
    """

    def __init__(self, price: Price | None, limit: float | None, spent: float = 0.0) -> None:
        if limit is not None and price is None:
            raise RecipeError(
                "A spending limit needs the model's price. Received a model that the table does not have. "
                "Try --prices with a file that has it (docs/migrate.md shows one)."
            )
        self.price, self.limit, self.spent = price, limit, spent
        self._held, self._lock = 0.0, threading.Lock()

    @contextmanager
    def reserved(self, body: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
        """Holds what `body` may cost; the function it gives settles with a usage and with times that it was cut off.

        Raises HostedError, before anything is sent, where the limit would be passed.
        """
        most = self.most(body)
        with self._lock:
            if self.limit is not None and self.spent + self._held + most > self.limit:
                so_far = self.spent + self._held
                raise HostedError(
                    f"Spending must stay below ${self.limit:,.6g}. Received ${so_far:,.4f} so far, and a request of up "
                    f"to ${most:,.4f}. Try a higher limit; what was answered is kept."
                )
            self._held += most

        def settle(usage: Mapping[str, Any], cut: int) -> None:
            with self._lock:
                self.spent += self.cost_of(usage) + cut * most

        try:
            yield settle
        finally:
            with self._lock:
                self._held -= most

    def cost_of(self, usage: Mapping[str, Any]) -> float:
        """US dollars of one answer."""
        if self.price is None:
            return 0.0
        asked, said = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        return (asked * self.price.input + said * self.price.output) / _MILLION

    def most(self, body: Mapping[str, Any]) -> float:
        """US dollars that a request may cost: no token is shorter than a byte, no image has more than the table says.

        Raises HostedError where a limit is set and something in the request has no bound.
        """
        if self.price is None:
            return 0.0
        if self.limit is not None and (unbounded := _unbounded(body, self.price)):
            raise HostedError(
                f"A spending limit needs a bound on every request. Received {unbounded}. Try --yes without a limit, or "
                "for images `image` in a price table of your own: how many tokens one has at most."
            )
        asked = _bytes(body) + 16 + len(_parts(body)) * (self.price.image or 0)
        return self.cost_of({"prompt_tokens": asked, "completion_tokens": _longest(body)})


def find_price(model: HostedModel, file: str | Path | None = None) -> Price | None:
    """The price of a model (of its base with a tuned model's prices), from `file` first; None where none is known.

    A service on this machine costs nothing unless `file` says so. Raises RecipeError for a file that is no price table.
    """
    own = str(files("tunefork.hosted") / "prices.yaml")
    for path in (file, own) if file is not None else (own,):
        table = _read(Path(str(path)))
        known = table["models"].get(model.service.name, {})
        fitting = [name for name in known if model.base == name or model.base.startswith(f"{name}-20")]
        if fitting:
            prices = known[max(fitting, key=len)]
            tuned = "tuned_" if model.is_tuned else ""
            kind = [float(prices.get(f"{tuned}{side}", prices[side])) for side in ("input", "output")]
            train = prices.get("train")
            date, source = (str(prices.get(key, table[key])) for key in ("date", "source"))
            return Price(kind[0], kind[1], None if train is None else float(train), date, source, prices.get("image"))
    return Price(0.0, 0.0, 0.0, "", "this machine") if model.service.is_local else None


def estimate_requests(bodies: Sequence[Mapping[str, Any]], price: Price | None) -> Estimate:
    """Of these requests."""
    images = sum(len(_parts(b)) for b in bodies) * ((price and price.image) or 0)
    asked, said = images + sum(estimate_tokens(b["messages"]) for b in bodies), sum(map(_longest, bodies))
    if price is None or any(_unbounded(b, price) for b in bodies):
        return Estimate(len(bodies), asked, said, 0, None if bodies else 0.0, "")
    return Estimate(len(bodies), asked, said, 0, (asked * price.input + said * price.output) / _MILLION, price.date)


def estimate_training(tokens: int, price: Price | None) -> Estimate:
    """Of a job that trains on as many tokens, all epochs together."""
    if price is None or price.train is None:
        return Estimate(0, 0, 0, tokens, None, "")
    return Estimate(0, 0, 0, tokens, tokens * price.train / _MILLION, price.date)


def estimate_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of a conversation's text, about; the service's own count is what is billed."""
    text = sum(len(_text(m.get("content")).encode()) for m in messages)
    return round(text / BYTES_A_TOKEN) + _OF_A_MESSAGE * len(messages)


def require_confirmed(estimate: Estimate, limit: float | None, confirm: Callable[[Estimate], bool]) -> None:
    """Raises RecipeError unless nothing is to be paid for, a limit was set, or `confirm` says yes."""
    if (estimate.requests or estimate.trained_tokens) and limit is None and not confirm(estimate):
        raise RecipeError(
            f"What is paid for must be confirmed. Received no. {estimate.says()} Try --yes, or a limit in dollars."
        )


def _bytes(body: Mapping[str, Any]) -> int:
    """Of the request without its images, which are not billed by their bytes."""
    messages = [{**m, "content": _text(m.get("content"))} for m in body["messages"]]
    return len(json.dumps([messages, body.get("tools")], ensure_ascii=False).encode())


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in parts)


def _parts(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a request holds besides text: images, sounds, files."""
    lists = [m["content"] for m in body["messages"] if isinstance(m.get("content"), list)]
    return [part for parts in lists for part in parts if part.get("type") not in ("text", "refusal")]


def _longest(body: Mapping[str, Any]) -> int:
    """Tokens that may be answered; 0 where the request does not say."""
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or 0) * int(body.get("n") or 1)


def _unbounded(body: Mapping[str, Any], price: Price) -> str:
    """What about a request has no bound that is paid for; empty where everything has one."""
    kinds = {str(part.get("type")) for part in _parts(body)} - ({"image_url"} if price.image is not None else set())
    if kinds and price.input:
        return f"one with {', '.join(sorted(kinds))}, whose tokens the price table does not bound"
    return "one that does not say how long its answer may be" if price.output and not _longest(body) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        models = {s: dict(m) for s, m in table["models"].items()}
        for prices in (p for m in models.values() for p in m.values()):
            figures = [float(v) for k, v in prices.items() if k not in _SAID]
            if not {"input", "output"} <= set(prices) <= _KEYS | _SAID or min(figures) < 0:
                raise ValueError(f"{prices} must have input and output, and of {', '.join(sorted(_KEYS))} no others")
        return {"date": str(table["date"]), "source": str(table["source"]), "models": models}
    except FileNotFoundError:
        raise MissingFileError(f"A price table must be a file. Received {str(path)!r}, which is not there.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"A price table must be YAML with date, source and models. Received {str(path)!r}: {error}. "
            "Try a copy of the one that ships with the package."
        ) from None
