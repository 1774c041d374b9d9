"""`migrate record`: what a tuned model says, with log-probabilities, kept before it stops answering."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunefork.data import Finding
from tunefork.errors import HostedError, MissingFileError, RecipeError, RunError
from tunefork.files import make_folder, write_atomic, write_json
from tunefork.hosted.answers import Answer, AnswerStore, ask_all, request_key
from tunefork.hosted.client import Client, overlay
from tunefork.hosted.jobs import find_job, read_file
from tunefork.hosted.prices import Budget, Estimate, estimate_requests, find_price, require_confirmed
from tunefork.hosted.services import HostedModel, find_model
from tunefork.migrate.inventory import shutdown_of
from tunefork.migrate.prompts import Prompt, read_prompts

RECORDING_SCHEMA = 1
Confirm = Callable[[Estimate], bool]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of recorded.jsonl: what was asked, what is right, what was said; or why nothing was said."""

    source: str
    messages: Sequence[Mapping[str, Any]]
    reference: str | None
    answer: str | None
    finish_reason: str | None = None
    tokens: Sequence[Mapping[str, Any]] = ()  # token, logprob, top_logprobs
    tool_calls: Sequence[Any] = ()
    at: int | None = None  # seconds since 1970
    error: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Recording:
    """A folder with answers.jsonl (as they came), recorded.jsonl (in order) and recording.json (`about`)."""

    path: Path
    about: Mapping[str, Any]
    rows: Sequence[Recorded]
    findings: Sequence[Finding] = ()


def record(
    model: str,
    out: str | Path,
    prompts: str | Path | None = None,
    *,
    confirm: Confirm = lambda estimate: False,
    text_field: str | None = None,
    label_field: str | None = None,
    top_logprobs: int | None = 5,
    max_tokens: int = 1024,
    concurrency: int = 8,
    limit: float | None = None,
    prices: str | Path | None = None,
    system: str | None = None,
    request: Mapping[str, Any] | None = None,
    client: Client | None = None,
    on_answer: Callable[[int, int], None] = lambda done, total: None,
) -> Recording:
    """Asks `model` every prompt at temperature 0 and keeps what it says in the folder `out`.

    Run again with the same folder it goes on: an answer that arrived is never asked for again. Without `prompts` the
    validation file of the model's own job is asked. `confirm` hears what it may cost before anything is paid for.

    Args:
        top_logprobs: alternatives of each token, 0 to 20; None: no log-probabilities (some models have none).
        limit: US dollars that the folder may have cost in all, cut-off requests of this call included.
        system: a message that is put before every prompt.
        request: fields of a chat request in place of ours; None leaves one out.

    Raises HostedError where the service cannot be used any more; everything that was answered is kept.
    """
    hosted, out = find_model(model), Path(out)
    client = client or Client(hosted.service)
    _refuse_another_model(out, hosted)
    make_folder(out)
    job = find_job(client, hosted) if prompts is None else None
    file = Path(prompts) if prompts is not None else _validation_file(client, hosted, job, out)
    asked, findings = read_prompts(file, text_field, label_field, system)
    bodies = [overlay(_body(hosted, p, top_logprobs, max_tokens), request or {}) for p in asked]
    price = find_price(hosted, prices)
    with AnswerStore(out) as store:
        budget = Budget(price, limit)
        budget.spent = sum(budget.cost_of(usage) for _, usage in store.usage())
        keys = {request_key(hosted.service.base_url, body): body for body in bodies}
        left = [body for key, body in keys.items() if store.get(key) is None]
        require_confirmed(estimate_requests(left, price), limit, confirm)
        about: dict[str, Any] = {
            "schema": RECORDING_SCHEMA,
            "model": hosted.name,
            "base_url": hosted.service.base_url,
            "base": hosted.base,
            "shutdown": shutdown_of(hosted),
            "job": job,
            "prompts": {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": len(asked)},
            "request": {k: v for k, v in bodies[0].items() if k not in ("messages", "tools", "model")},
        }
        write_json(out / "recording.json", {**about, "finished": None})
        answers = ask_all(client, store, bodies, budget, concurrency=concurrency, on_answer=on_answer)
        rows = [_recorded(p, a) for p, a in zip(asked, answers, strict=True)]
        write_atomic(out / "recorded.jsonl", "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        usage = [u for _, u in store.usage()]
        about |= {
            "answers": sum(r.error is None for r in rows),
            "refused": sum(r.error is not None for r in rows),
            "cut_short": sum(r.finish_reason == "length" for r in rows),
            "tokens": {k: sum(u.get(f"{k}_tokens") or 0 for u in usage) for k in ("prompt", "completion")},
            "cost": None if price is None else round(sum(budget.cost_of(u) for u in usage), 6),
            "sent": client.sent,
            "unanswered": client.unanswered,
            "finished": int(time.time()),
        }
        write_json(out / "recording.json", about)
    return Recording(out, about, rows, findings)


def read_recording(path: str | Path) -> Recording:
    """What `record` left in a folder. Raises MissingFileError or RunError where it is not there or not finished."""
    path = Path(path)
    try:
        about = json.loads((path / "recording.json").read_bytes())
        lines = (path / "recorded.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [Recorded(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise MissingFileError(
            f"A recording must be a folder with recorded.jsonl. Received {str(path)!r}. "
            "Try `tunefork migrate record` again with this folder: it goes on."
        ) from None
    except (ValueError, TypeError) as error:
        raise RunError(
            f"A recording must be readable. Received {str(path)!r}: {error}. Try `tunefork migrate record` again: its "
            "answers are kept apart, in answers.jsonl."
        ) from None
    return Recording(path, about, rows)


def _body(model: HostedModel, prompt: Prompt, top_logprobs: int | None, max_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model.id,
        "messages": [dict(m) for m in prompt.messages],
        "temperature": 0,
        model.service.longest: max_tokens,
    }
    if top_logprobs is not None:
        body |= {"logprobs": True, **({"top_logprobs": top_logprobs} if top_logprobs else {})}
    return body | ({"tools": [dict(t) for t in prompt.tools]} if prompt.tools else {})


def _recorded(prompt: Prompt, answer: Answer | HostedError) -> Recorded:
    asked = (prompt.source, prompt.messages, prompt.reference)
    if isinstance(answer, HostedError):
        return Recorded(*asked, None, error=str(answer), tools=prompt.tools)
    said = (answer.text, answer.finish_reason, answer.tokens, answer.tool_calls, answer.at)
    return Recorded(*asked, *said, tools=prompt.tools)


def _validation_file(client: Client, model: HostedModel, job: Mapping[str, Any] | None, out: Path) -> Path:
    """The validation file of the model's job, brought to `out`/prompts.jsonl once."""
    file = out / "prompts.jsonl"
    if not file.exists():
        if job is None or not job.get("validation_file"):
            why = "has no job that this key can see" if job is None else "was tuned without one"
            raise RecipeError(
                f"A recording needs prompts. Received none, and {model.id} {why}, so there is no validation file. "
                "Try --prompts FILE."
            )
        write_atomic(file, read_file(client, job["validation_file"]))
    return file


def _refuse_another_model(out: Path, model: HostedModel) -> None:
    try:
        kept = json.loads((out / "recording.json").read_bytes())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise RunError(f"{out / 'recording.json'} must be JSON. Received: {error}. Try another --out.") from None
    if kept["model"] != model.name:
        raise RunError(f"A recording holds one model. {out} has {kept['model']}. Try another --out.")
