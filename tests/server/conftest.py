"""Databases other than the sqlite file of a data folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.server.postgres import postgres


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], str]]:
    """Makes a database on a PostgreSQL that lives as long as the tests, and gives its URL."""
    with postgres() as database:
        yield database


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    """For `Settings.database`; one for all tests of a file."""
    return request.getfixturevalue("new_postgres")() if request.param == "postgres" else None
