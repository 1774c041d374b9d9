"""What the doctor says of extras."""

from __future__ import annotations

from tunefork.workflows.doctor import extras


def test_every_extra_is_read_whatever_its_name() -> None:
    found = extras(
        [
            "torch<2.14,>=2.8",
            "bitsandbytes<0.51,>=0.49; extra == 'qlora'",
            'fastapi<1,>=0.115; extra == "server-postgres"',
            "psycopg[binary]<4,>=3.2; extra == 'server-postgres'",
            "pytest<10,>=8.3; extra == 'test'",
        ]
    )
    assert found == {"qlora": ["bitsandbytes"], "server-postgres": ["fastapi", "psycopg"]}
