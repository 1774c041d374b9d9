"""The names of `tunefork` stay what they are, whatever has been imported before."""

import importlib
import inspect

import pytest

import tunefork


@pytest.mark.parametrize("name", tunefork.__all__)
def test_every_name_is_what_it_says_however_often(name: str) -> None:
    importlib.import_module("tunefork.cli.app")
    for room in ("evaluate.harness", "export.merge", "workflows"):
        importlib.import_module(f"tunefork.{room}")
    first = getattr(tunefork, name)
    assert not inspect.ismodule(first)
    assert callable(first)
    assert getattr(tunefork, name) is first
