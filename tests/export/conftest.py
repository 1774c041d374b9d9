from collections.abc import Callable
from pathlib import Path

import pytest

from tests.export.scenes import MakeRun, run_maker


@pytest.fixture(scope="session")
def run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A finished run on a tiny model; never write into it."""
    return run_maker(tmp_path_factory.mktemp("exports"), tiny)
