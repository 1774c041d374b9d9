"""Lists: newest first, a page at a time, from where the last page ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from tunefork.server.store import Row

R = TypeVar("R", bound=Row)


def page(
    db: Session,
    query: Select[R],
    kind: type[R],
    show: Callable[[R], dict[str, Any]],
    *,
    after: str | None,
    limit: int,
    ascending: bool = False,
    edges: bool = False,
) -> dict[str, Any]:
    """A page of `query` as OpenAI's list object, with the first and last id where `edges`.

    `after` is the id that the page before ended with. After an id that is not there (it may have been deleted since)
    there is nothing to list, rather than everything again.
    """
    id_of = kind.id  # pyright: ignore[reportAttributeAccessIssue]
    if after:
        place = db.scalar(select(kind.seq).where(id_of == after))
        query = query.where(kind.seq > place if ascending else kind.seq < place) if place else query.where(id_of == "")
    rows: Sequence[R] = db.scalars(query.order_by(kind.seq if ascending else kind.seq.desc()).limit(limit + 1)).all()
    data = [show(row) for row in rows[:limit]]
    found: dict[str, Any] = {"object": "list", "data": data, "has_more": len(rows) > limit}
    if edges:
        found |= {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return found
