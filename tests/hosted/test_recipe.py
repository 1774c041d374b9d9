"""recipes/latif_zhai_2024 runs offline: an encoder and a tuned chat model on one item, our own service as the host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.scenes import server_process

SYSTEMS = ["majority", "tfidf", "encoder", "chat, zero-shot", "chat, tuned"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_scoring_papers_protocol(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "asap"
    (source / "prompts").mkdir(parents=True)
    prompt = "Data Set #5\nRubric range:0-3\nList four steps.\nRubric for it\n3 points: all\n"
    (source / "prompts" / "set_5.txt").write_text(prompt)
    steps = ["copy", "move", "read", "link"]
    rows = [{"id": str(i), "essay_set": 5, "text": f"{' then '.join(steps[: i % 4 + 1])} {i}"} for i in range(48)]
    train = [row | {"score1": i % 4, "score2": (i % 4 + (i % 9 == 0)) % 4} for i, row in enumerate(rows[:36])]
    test = [row | {"score": i % 4} for i, row in enumerate(rows[36:])]
    for name, part in (("train", train), ("test", test)):
        (source / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with server_process(tmp_path / "data") as (_, url):
        command = [sys.executable, str(ROOT / "recipes" / "latif_zhai_2024" / "run.py"), str(source)]
        command += [str(tmp_path / "out"), "--items", "5", "--hosted", f"{url}#fork-tiny"]
        command += ["--encoder", str(tiny("bert")), "--epochs", "1"]
        first, again = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == 0, first.stderr
    lines = [line for line in again.stdout.splitlines() if line.startswith("5 ")]
    assert [line[5:20].strip() for line in lines] == SYSTEMS
    assert "$0.00" in lines[4]
    assert all(line.endswith(lines[0].partition("  ")[2].rpartition("  ")[2]) for line in lines)
    assert sum(line.startswith("mean ") for line in again.stdout.splitlines()) == 5
    result = json.loads((tmp_path / "out" / "item-5" / "hosted" / "result.json").read_text())
    assert result["test"].keys() >= {"qwk", "exact_agreement"}
