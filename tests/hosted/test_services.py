"""Names, keys and prices: what goes where, and what is refused before anything is sent."""

from __future__ import annotations

from pathlib import Path

import keyring
import keyring.backend
import keyring.backends.fail
import pytest

from tunefork.errors import HostedError, RecipeError
from tunefork.hosted import find_model, is_hosted
from tunefork.hosted.prices import Budget, Price, estimate_requests, find_price
from tunefork.hosted.services import find_key, find_service


def test_names_are_told_from_folders_and_hub_names() -> None:
    hosted = ["openai:gpt-4.1-mini", "openai:ft:gpt-4.1-mini:org::1", "azure:mine", "nebius:Qwen/Q", "https://h/v1#m"]
    local = ["embedded", "Qwen/Qwen3-0.6B", "models/openai", "C:\\models\\x", "openai", "together:x"]
    assert [is_hosted(name) for name in (*hosted, *local)] == [True] * 5 + [False] * 4 + [True, False]


def test_a_tuned_model_knows_its_base() -> None:
    model = find_model("openai:ft:gpt-4o-mini-2024-07-18:acme::AbC123")
    assert (model.id, model.base) == ("ft:gpt-4o-mini-2024-07-18:acme::AbC123", "gpt-4o-mini-2024-07-18")
    assert model.sibling("gpt-4o").name == "openai:gpt-4o"
    assert find_model("nebius:gpt-4.1.ft-b044a9").base == "gpt-4.1"  # as Azure names them
    url = find_model("http://127.0.0.1:8000/v1#ft:fork-tiny:tunefork:x:1")
    assert (url.service.base_url, url.base) == ("http://127.0.0.1:8000/v1", "fork-tiny")


@pytest.mark.parametrize("name", ["openai:", "https://host/v1", "https://host/v1#", "openai"])
def test_a_model_must_be_named(name: str) -> None:
    with pytest.raises(RecipeError, match="URL#MODEL"):
        find_model(name)


def test_a_password_in_an_address_is_refused() -> None:
    for name in ("https://me:secret@host/v1#m", "https://host/v1?key=secret#m"):
        with pytest.raises(RecipeError, match="must not hold a password or a query") as caught:
            find_model(name)
        assert "secret" not in str(caught.value)


def test_azure_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT", raising=False)
    with pytest.raises(RecipeError, match="AZURE_OPENAI_ENDPOINT"):
        find_service("azure")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://us.openai.azure.com/")
    assert find_service("azure").base_url == "https://us.openai.azure.com/openai/v1"
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://us.services.ai.azure.com/openai/v1/")
    assert find_service("azure").base_url == "https://us.services.ai.azure.com/openai/v1"


class Ring(keyring.backend.KeyringBackend):
    priority = 1  # type: ignore[assignment]

    def get_password(self, service: str, username: str) -> str | None:
        return "sk-ring" if (service, username) == ("tunefork", "openai") else None

    def set_password(self, service: str, username: str, password: str) -> None: ...
    def delete_password(self, service: str, username: str) -> None: ...


def test_keys_come_from_the_environment_then_the_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "NEBIUS_API_KEY", "TUNEFORK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    before = keyring.get_keyring()
    keyring.set_keyring(Ring())
    try:
        assert find_key(find_service("openai")) == "sk-ring"
        with pytest.raises(RecipeError, match="keyring set tunefork nebius"):
            find_key(find_service("nebius"))
        with pytest.raises(RecipeError, match="TUNEFORK_API_KEY"):
            find_key(find_service("https://example.org/v1"))  # never another service's key
        assert find_key(find_service("http://localhost:8000/v1")) == "none"
        keyring.set_keyring(keyring.backends.fail.Keyring())  # a machine without one
        assert find_key(find_service("http://localhost:8000/v1")) == "none"
    finally:
        keyring.set_keyring(before)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env\n")
    assert find_key(find_service("openai")) == "sk-env"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env sk-other")
    with pytest.raises(RecipeError) as caught:
        find_key(find_service("openai"))
    assert "sk-" not in str(caught.value)


def test_a_tuned_model_has_its_own_price() -> None:
    base, tuned = find_model("openai:gpt-4.1-mini-2025-04-14"), find_model("openai:ft:gpt-4.1-mini-2025-04-14:o::1")
    plain, dear = find_price(base), find_price(tuned)
    assert plain is not None and dear is not None
    assert (plain.input, dear.input, dear.train, dear.date) == (0.4, 0.8, 5.0, "2026-06-21")
    other = find_price(find_model("openai:gpt-4o"))
    assert other is not None and other.date == "2026-03"  # a line's own date stands before the table's
    assert find_price(find_model("openai:gpt-4.1-mini-search")) is None
    assert find_price(find_model("nebius:gpt-4.1-mini")) is None
    free = find_price(find_model("http://127.0.0.1:1/v1#m"))
    assert free is not None and (free.input, free.train) == (0, 0)


def test_a_table_of_ones_own_wins_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "p.yaml"
    table.write_text("date: today\nsource: us\nmodels: {openai: {gpt-4.1-mini: {input: 7, output: 8}}}")
    own = find_price(find_model("openai:ft:gpt-4.1-mini:o::1"), table)
    assert own is not None and (own.input, own.output, own.train, own.date) == (7, 8, None, "today")
    kept = find_price(find_model("openai:gpt-4o"), table)
    assert kept is not None and kept.input == 2.5
    table.write_text("date: today\nsource: us\nmodels: {openai: {gpt-4.1-mini: {input: 7, outptu: 8}}}")
    with pytest.raises(RecipeError, match="outptu"):
        find_price(find_model("openai:gpt-4.1-mini"), table)


def test_an_estimate_says_its_date_and_a_limit_needs_a_price() -> None:
    price = Price(1.0, 10.0, None, "2026-11-26", "x")
    body = {"messages": [{"role": "user", "content": "a" * 360}], "max_tokens": 100}
    estimate = estimate_requests([body, body], price)
    assert (estimate.requests, estimate.input_tokens, estimate.output_tokens) == (2, 208, 200)
    assert estimate.cost == pytest.approx((208 * 1 + 200 * 10) / 1e6)
    assert "2026-11-26" in estimate.says()
    assert "no price is known" in estimate_requests([body], None).says()
    with pytest.raises(RecipeError, match="needs the model's price"):
        Budget(None, 1.0)


def test_what_is_under_way_counts_against_the_limit() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100}
    budget = Budget(Price(0.0, 10.0, None, "", ""), 0.0025)
    with budget.reserved(body) as settle, budget.reserved(body):
        with pytest.raises(HostedError, match="Spending"), budget.reserved(body):
            pass
        settle({"completion_tokens": 1}, 1)
    assert budget.spent == pytest.approx(0.001 + 0.00001)
    with budget.reserved(body):
        pass


def asked(*parts: dict[str, object], **others: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 10, **others}


IMAGE = {"type": "image_url", "image_url": {"url": "https://host/" + "x" * 5000}}


def test_an_image_counts_by_the_tokens_it_has_at_most() -> None:
    price = find_price(find_model("openai:ft:gpt-4o-2024-08-06:o::1"))
    assert price is not None and price.image == 1445
    text = {"type": "text", "text": "what is it?"}
    plain, seen = (Budget(price, 1.0).most(asked(text, *images)) for images in ((), (IMAGE, IMAGE)))
    assert seen - plain == pytest.approx(2 * 1445 * price.input / 1e6)
    assert estimate_requests([asked(text, IMAGE)], price).input_tokens == pytest.approx(1445 + 7, abs=2)


@pytest.mark.parametrize(
    ("body", "said"),
    [(asked(IMAGE), "image_url"), (asked({"type": "file"}), "file"), (asked(max_tokens=None), "how long its answer")],
)
def test_what_has_no_bound_is_refused_under_a_limit(body: dict[str, object], said: str) -> None:
    price = Price(1.0, 1.0, None, "", "")
    with pytest.raises(HostedError, match=said), Budget(price, 5.0).reserved(body):
        pass
    assert estimate_requests([body], price).cost is None
    with Budget(price, None).reserved(body), Budget(Price(0.0, 0.0, None, "", ""), 0.0).reserved(body):
        pass  # without a limit, or where nothing is paid for, it is sent
