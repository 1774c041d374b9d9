"""models.yaml, and what a model's name means."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.server.scenes import client_of, serving, settings_in
from tunefork.errors import MissingFileError, RecipeError
from tunefork.server import Catalogue, load_catalogue, serve
from tunefork.server.models import tuned_name


def test_bases_and_aliases_are_listed_and_told(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  small: embedded\n  big: {name: org/big, dtype: bf16}\naliases: {gpt-4o-mini: small}\n")
    catalogue = load_catalogue(path)
    assert (catalogue.base_of("gpt-4o-mini"), catalogue.base_of("big"), catalogue.base_of("x")) == (
        "small",
        "big",
        None,
    )
    assert catalogue.models["big"].dtype == "bf16"
    with serving(settings_in(tmp_path / "data", catalogue=catalogue)) as url:
        client = client_of(url)
        assert {model.id for model in client.models.list()} == {"small", "big", "gpt-4o-mini"}
        assert client.models.retrieve("gpt-4o-mini").model_extra["tunefork"] == {"base": "small"}  # type: ignore[index]
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve("gpt-9")
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    "text",
    [
        "models: {a: {nme: x}}",
        "models: {'a/b': x}",
        "models: {'ft:a': x}",
        "models: {'..': x}",
        "aliases: {a: nowhere}",
        "aliases: {fork-tiny: fork-tiny}",
        "other: 1",
        "models: [",
        "- a",
    ],
)
def test_a_catalogue_that_cannot_be_meant_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_catalogue(path)


def test_a_catalogue_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        load_catalogue(tmp_path / "models.yaml")


def test_a_server_does_not_start_with_a_model_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"models: {{small: embedded, large: {tmp_path}/nowhere}}")
    with pytest.raises(MissingFileError, match="nowhere"):
        serve(data=tmp_path / "data", models=path)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        (None, ""),
        ("my model", "my-model"),
        ("../../etc", "etc"),
        ("a:b:c", "a-b-c"),
        ("日本", ""),
        ("x" * 64, "x" * 64),
    ],
)
def test_names_of_tuned_models_are_safe(tmp_path: Path, suffix: str | None, part: str) -> None:
    settings = settings_in(tmp_path / "data", catalogue=Catalogue())
    assert tuned_name(settings, "fork-tiny", suffix, "abc") == f"ft:fork-tiny:tunefork:{part}:abc"
