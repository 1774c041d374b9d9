"""One thread that computes answers: what waits for the same base is computed together, until others want the thread.

Then rows that are not done go back to the end of the queue. So a new request waits for a few tokens, not for the
longest answer, and nobody is computed for who has ended.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunefork.errors import TuneforkError
from tunefork.evaluate.generate import end_tokens
from tunefork.models import ModelFacts, artefact_tokenizer, inspect_model, load_tokenizer, read_artefact_info
from tunefork.recipe import DataSection, TaskSection
from tunefork.render import Renderer
from tunefork.server.inference.hosts import Host
from tunefork.server.inference.rows import Row
from tunefork.server.models import Served
from tunefork.server.problems import ApiError
from tunefork.server.settings import Settings
from tunefork.tasks import make_task

_log = logging.getLogger("tunefork.server.inference")
_GATHER_SECONDS = 0.005  # requests that come so soon after another are computed with it
_VOICES = 256  # models whose tokenizers are kept
_UNCUT = 2**30  # tokens: what does not fit is refused here, and never cut


class Voice:
    """How a model is asked: its tokenizer as it was kept with it, and the one path from messages or text to ids."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.facts: ModelFacts = inspect_model(served.section)
        self.adapter = read_artefact_info(served.folder)["adapter"] if served.folder else None
        trusted, folder = self.facts.trust_remote_code, served.folder
        self.tokenizer: Any = artefact_tokenizer(folder, trusted) if folder else load_tokenizer(self.facts)
        self._renderers: dict[str, Renderer] = {}

    def renderer(self, task: str) -> Renderer:
        """Of the task `chat` or `generation`. Raises RecipeError or UnsupportedError where the model lacks what it
        needs, such as a chat template."""
        if task not in self._renderers:
            made = make_task(TaskSection(name=task), DataSection(), self.facts.kind, ())
            self._renderers[task] = Renderer(self.tokenizer, self.facts.kind, made, _UNCUT, False)
        return self._renderers[task]

    @property
    def positions(self) -> int:
        """Tokens of prompt and answer together."""
        limit = self.served.section.max_length
        return self.facts.max_positions if limit == "auto" else min(int(limit), self.facts.max_positions)


@dataclass(frozen=True, slots=True)
class _Waiting:
    row: Row
    voice: Voice
    renderer: Renderer

    @property
    def host(self) -> tuple[str, bool]:
        """What must be in memory: a whole tuned model, or a base, perhaps quantised."""
        served, adapter = self.voice.served, self.voice.adapter
        return (str(served.folder), False) if adapter == "none" else (served.base, adapter == "qlora")

    @property
    def over(self) -> Path | None:
        """The adapter's folder."""
        return None if self.voice.adapter in (None, "none") else self.voice.served.folder

    @property
    def company(self) -> tuple[Any, ...]:
        """Equal for rows that can be computed together."""
        return (self.host, self.over if self.voice.adapter == "dora" else None)


class Engine:
    """Answers for the models of `tunefork.server.models.Served`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._queue: deque[_Waiting] = deque()
        self._lock = threading.RLock()
        self._voices: OrderedDict[Path | str, Voice] = OrderedDict()
        self._hosts: OrderedDict[tuple[str, bool], Host] = OrderedDict()  # least used first
        self._pool = ThreadPoolExecutor(1, "inference")
        self._tasks = 0  # of the pool, which have not ended
        self._woken = self._closing = False

    async def voice(self, served: Served) -> Voice:
        """Raises the errors of models that cannot be read, and ApiError (503) where the server is about to stop."""
        with self._lock:
            if self._closing:
                raise _overloaded()
            found = self._voices.get(served.folder or served.base)
            if found:
                return found
            made = self._run(self._voice, served)
        return await asyncio.wrap_future(made)

    def _voice(self, served: Served) -> Voice:
        """On the thread that computes: while transformers builds a model, it changes the default dtype of all."""
        key = served.folder or served.base
        found = self._voices.get(key) or Voice(served)
        with self._lock:
            self._voices[key] = found
            while len(self._voices) > _VOICES:
                self._voices.popitem(last=False)
        return found

    def submit(self, rows: Sequence[Row], voice: Voice, renderer: Renderer) -> None:
        """Each row's `tell` hears its pieces, from another thread. Raises ApiError (503) where too many wait."""
        with self._lock:
            if self._closing or len(self._queue) + len(rows) > self.settings.waiting_rows:
                raise _overloaded()
            self._queue.extend(_Waiting(row, voice, renderer) for row in rows)
            self._wake()

    def forget(self, folder: Path) -> None:
        """Lets go of an artefact that is about to be deleted; one that is not loaded is fine."""
        with self._lock:
            self._voices.pop(folder, None)
            if not self._closing:
                self._run(self._forget, folder).add_done_callback(_logged)

    def close(self) -> None:
        """Ends within a slice of tokens."""
        with self._lock:
            self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, task: Callable[..., Any], *given: Any) -> Future[Any]:
        """On the thread that computes; the lock is held."""
        self._tasks += 1
        made = self._pool.submit(task, *given)
        made.add_done_callback(self._ended)
        return made

    def _ended(self, done: Future[Any]) -> None:
        with self._lock:
            self._tasks -= 1

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._run(self._work).add_done_callback(_logged)

    def _others_wait(self) -> bool:
        """Asked by the task that computes."""
        return self._tasks > 1 or bool(self._queue) or self._closing

    def _work(self) -> None:
        """Rows that can be computed together, until all are done or others wait."""
        time.sleep(_GATHER_SECONDS)
        batch = self._gather()
        try:
            if batch:
                self._extend(batch)
        except BaseException as error:
            self._hosts.pop(batch[0].host, None)  # whatever it was left as: it is loaded anew
            for waiting in batch:
                waiting.row.fail(error)
            raise
        finally:
            with self._lock:
                self._queue.extend(waiting for waiting in batch if not waiting.row.done)
                if self._queue and not self._closing:
                    self._wake()

    def _gather(self) -> list[_Waiting]:
        """The oldest row and its company; as many as fit a batch and the adapters in memory.

        Those over one adapter come together: every adapter in a batch costs, a row more over the same one hardly.
        """
        taken: list[_Waiting] = []
        over: set[Path | None] = {None}
        with self._lock:
            self._woken = False
            rows = [waiting for waiting in self._queue if not waiting.row.done]
            oldest: dict[Path | None, int] = {}
            for place, waiting in enumerate(rows):
                oldest.setdefault(waiting.over, place)
            for waiting in sorted(rows, key=lambda waiting: oldest[waiting.over]):
                if not taken or (
                    waiting.company == taken[0].company
                    and len(taken) < self.settings.batch_rows
                    and len(over | {waiting.over}) - 1 <= self.settings.adapters_in_memory
                ):
                    taken.append(waiting)
                    over.add(waiting.over)
            self._queue = deque(waiting for waiting in rows if waiting not in taken)
        return taken

    def _extend(self, batch: list[_Waiting]) -> None:
        host = self._host(batch[0])
        wanted = [waiting.over for waiting in batch]
        spare = [folder for folder in host.adapters if folder not in wanted]
        excess = len({*host.adapters, *wanted} - {None}) - self.settings.adapters_in_memory
        for folder in spare[: max(0, excess)]:
            host.evict(folder)
        names: list[str | None] = []
        for waiting in batch:
            try:
                names.append(host.use(waiting.over))
            except TuneforkError as error:  # of this model alone; a part of it may be in memory, so that is left
                waiting.row.fail(error)
                self._hosts.pop(waiting.host, None)
            if not waiting.row.ends:
                waiting.row.ends = end_tokens(host.model, waiting.renderer)
        ready = [waiting for waiting in batch if not waiting.row.failed]
        if not ready:
            return
        room = min(waiting.voice.positions - len(waiting.row.ids) for waiting in ready)
        tokens = min(room, max(waiting.row.left for waiting in ready))
        alone = batch[0].voice.adapter == "dora"
        host.extend([waiting.row for waiting in ready], names, tokens, self._others_wait, alone=alone)

    def _host(self, waiting: _Waiting) -> Host:
        key = waiting.host
        if key not in self._hosts:
            while len(self._hosts) >= self.settings.bases_in_memory:
                self._hosts.popitem(last=False)
            voice = waiting.voice
            whole = voice.served.folder if voice.adapter == "none" else None
            pad = waiting.renderer.pad
            self._hosts[key] = Host(voice.served.section, voice.facts, pad, nf4=key[1], folder=whole)
        self._hosts.move_to_end(key)
        return self._hosts[key]

    def _forget(self, folder: Path) -> None:
        self._hosts.pop((str(folder), False), None)
        for host in self._hosts.values():
            host.evict(folder)


def _overloaded() -> ApiError:
    message = "The server is overloaded, or about to stop. Try again in a moment."
    return ApiError(message, status=503, type="server_error", code="service_unavailable")


def _logged(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        _log.error("an answer failed", exc_info=error)
