"""The official client with patience: every request through one place, repeated while there is hope, its key unseen."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from tunefork.errors import HostedError, MissingExtraError
from tunefork.hosted.services import ANY_KEY, Service, find_key

if TYPE_CHECKING:
    import openai

T = TypeVar("T")
_log = logging.getLogger(__name__)  # its warnings are on stderr unless a program says otherwise
_AGAIN = (408, 409, 425, 429)  # and every 5xx
_LONGEST_WAIT = 60.0
_SECONDS = 300.0  # that one answer may take


class Client:
    """Requests to one service. Thread-safe.

    A connection that breaks and the statuses 408, 409, 425, 429 and 5xx are tried again, after what `Retry-After`
    says or an exponential, jittered wait, until `patience` seconds have passed without an answer; `on_wait` hears of
    each wait, or the log. Everything else is a HostedError at once. `sent` counts requests, `unanswered` those that
    were cut off and may yet be billed.
    """

    def __init__(
        self, service: Service, *, patience: float = 600.0, on_wait: Callable[[str], None] = _log.warning
    ) -> None:
        openai = import_openai()
        self.service, self.patience, self.on_wait = service, patience, on_wait
        self._key = find_key(service)
        self.api = openai.OpenAI(base_url=service.base_url, api_key=self._key, max_retries=0, timeout=_SECONDS)
        self.sent = self.unanswered = 0
        self._count, self._stopped = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """No further request is sent; those that wait to be repeated give up. Answers under way still arrive."""
        self._stopped.set()

    def chat(self, body: Mapping[str, Any], on_cut: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The answer to a chat request, as the service's JSON. `on_cut` hears of requests that were cut off."""

        model, messages = body["model"], body["messages"]
        others = {key: value for key, value in body.items() if key not in ("model", "messages")}

        def send(api: openai.OpenAI) -> dict[str, Any]:
            completions = api.chat.completions.with_raw_response
            found = completions.create(model=model, messages=messages, extra_body=others).http_response.json()
            if not isinstance(found, dict) or not found.get("choices"):
                raise ValueError("no choices")
            return found

        return self.call("A chat request", send, on_cut)

    def call(self, what: str, send: Callable[[openai.OpenAI], T], on_cut: Callable[[], None] = lambda: None) -> T:
        """What `send` returns. `what` begins the sentence of an error."""
        openai = import_openai()
        started, attempt = time.monotonic(), 0
        while True:
            if self._stopped.is_set():
                raise HostedError(f"{what} must wait until the others are done. Received: an earlier one failed.")
            with self._count:
                self.sent += 1
            try:
                return send(self.api)
            except openai.APIStatusError as error:
                if not _hopeful(error):
                    raise self._refused(what, error) from None
                problem, wait = f"status {error.status_code}", _retry_after(error.response.headers)
            except (openai.APIConnectionError, openai.APIResponseValidationError, ValueError) as error:
                problem, wait = f"no answer ({type(error).__name__})", None
                with self._count:
                    self.unanswered += 1
                on_cut()
            wait = min(_LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1) if wait is None else wait
            attempt += 1
            if time.monotonic() - started + wait > self.patience:
                raise HostedError(
                    f"{what} must be answered by {self.service.name} within {self.patience:g} seconds. Received "
                    f"{attempt} times nothing usable, last {problem}. Try again later; what was answered is kept."
                )
            self.on_wait(f"{self.service.name}: {problem}; again in {wait:.1f} s")
            self._stopped.wait(wait)

    def _refused(self, what: str, error: openai.APIStatusError) -> HostedError:
        said = error.body.get("message") if isinstance(error.body, Mapping) else None
        by_url = self.service.key_variable == ANY_KEY
        text = str(said or error.response.reason_phrase).replace(self._key, "…").strip().rstrip(".")
        advice = {
            401: f"Try the right key in {self.service.key_variable}.",
            403: "Try a key that may do this.",
            404: "Try a name that the service has" + (", and its address as far as /v1." if by_url else "."),
            429: "Try again when the account has credit.",
        }.get(error.status_code, "Try changing what it refuses.")
        return HostedError(
            f"{what} must be accepted by {self.service.name}. Received status {error.status_code}: {text}. {advice}",
            status=error.status_code,
            code=error.code,
        )


def overlay(request: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A request with a person's own fields over ours, also inside objects; null takes a field away."""
    found = dict(request)
    for key, value in given.items():
        mine = found.get(key)
        found[key] = overlay(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return {key: value for key, value in found.items() if value is not None}


def import_openai() -> Any:
    """The package `openai`. Raises MissingExtraError without it."""
    try:
        import openai
    except ImportError:
        raise MissingExtraError("openai", "hosted", "A hosted model") from None
    return openai


def _hopeful(error: openai.APIStatusError) -> bool:
    """Whether the same request may be answered later. An account without credit is a 429 that does not pass."""
    if error.code == "insufficient_quota":
        return False
    return error.status_code in _AGAIN or error.status_code >= 500


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the service asks to wait (RFC 9110, section 10.2.3: a number or a date), or None."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
        text = headers.get("retry-after", "")
        if text.replace(".", "", 1).isdecimal():
            return float(text)
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
