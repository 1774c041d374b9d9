"""The scoring paper's protocol on public items: an encoder beside a tuned chat model, accuracy and agreement.

python recipes/latif_zhai_2024/run.py ASAP_SAS OUT [--items 1 2 5 6] [--hosted URL#MODEL] [--encoder MODEL]
    [--train-rows N] [--test-rows N] [--limit DOLLARS]

ASAP_SAS holds train.jsonl (id, essay_set, text, score1, score2), test.jsonl (… score) and prompts/set_N.txt.
Run again with the same OUT it goes on: finished runs are read back, and a hosted job is never begun twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tunefork.metrics.agreement import exact_agreement, qwk
from tunefork.recipe import load_recipe
from tunefork.run import RunFolder
from tunefork.workflows import Listener, finetune

HERE = Path(__file__).parent


class Told(Listener):
    def stage(self, text: str) -> None:
        print(f"  {text}", flush=True)


def read(path: Path, item: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["essay_set"] == item]


def question(path: Path) -> str:
    """The item's question: what stands between its heading and its rubric."""
    text = path.read_text(encoding="utf-8", errors="replace").partition("Rubric range:")[2]
    return text.partition("\n")[2].partition("Rubric for")[0].strip()


def prepare(source: Path, out: Path, item: int) -> dict[str, str]:
    """Train rows carry the first rater's score, which is the official one; test rows the published gold."""
    asked = question(source / "prompts" / f"set_{item}.txt")
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, field in (("train", "score1"), ("test", "score")):
        rows = [
            {"id": r["id"], "question": asked, "text": r["text"], "label": r[field]}
            for r in read(source / f"{split}.jsonl", item)
        ]
        files[split] = str(out / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def run(recipe: str, files: dict[str, str], out: Path, given: argparse.Namespace, **sets: Any) -> dict[str, Any]:
    overrides = {"data.train": files["train"], "data.test": files["test"], "out": str(out), **sets}
    overrides |= {f"data.{k}_rows": v for k, v in (("train", given.train_rows), ("test", given.test_rows)) if v}
    resume = (out / "recipe.yaml").exists()
    if resume and RunFolder(out, None).finished:
        return RunFolder(out, None).read_result()
    return dict(finetune(load_recipe(HERE / recipe, overrides), resume=resume, listener=Told()).result)


def ceiling(source: Path, item: int) -> tuple[float, float]:
    """Agreement of the two raters of the training answers: exact, and QWK."""
    rows = read(source / "train.jsonl", item)
    first, second = [r["score1"] for r in rows], [r["score2"] for r in rows]
    return exact_agreement(first, second), qwk(first, second, low=0, high=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, nargs="+", default=[1, 2, 5, 6])
    parser.add_argument("--hosted", default="openai:gpt-4.1-mini")
    parser.add_argument("--encoder", default="google-bert/bert-base-uncased")
    parser.add_argument("--train-rows", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--epochs", type=float, help="of the hosted job; default: the service's choice")
    parser.add_argument("--limit", type=float, default=0.0, help="US dollars an item")
    given = parser.parse_args()
    print("item system          accuracy            QWK                 seconds  cost    human exact / QWK")
    accuracy: dict[str, list[float]] = {}
    for item in given.items:
        folder = given.out / f"item-{item}"
        files = prepare(given.source, folder, item)
        human = "{:.3f} / {:.3f}".format(*ceiling(given.source, item))
        started = time.perf_counter()
        encoder = run("encoder.yaml", files, folder / "encoder", given, **{"model.name": given.encoder})
        middle = time.perf_counter()
        sets = {"model.name": given.hosted, "hosted.limit": given.limit, "hosted.cache": str(folder / "cache")}
        sets |= {"train.epochs": given.epochs} if given.epochs else {}
        hosted = run("hosted.yaml", files, folder / "hosted", given, **sets)
        spent = (hosted["hosted"]["training_cost"] or 0) + hosted["hosted"]["spent_on_test_rows"]
        lines = [(name, encoder["baselines"][name], None, None) for name in ("majority", "tfidf")]
        lines += [("encoder", encoder["test"], middle - started, None)]
        lines += [("chat, zero-shot", hosted["baselines"]["zero_shot"], None, None)]
        lines += [("chat, tuned", hosted["test"], time.perf_counter() - middle, spent)]
        for name, figures, seconds, cost in lines:
            accuracy.setdefault(name, []).append(figures["exact_agreement"]["value"])
            shown = [
                f"{figures[m]['value']:.3f} ({figures[m]['low']:.3f}-{figures[m]['high']:.3f})"
                for m in ("exact_agreement", "qwk")
            ]
            took = "" if seconds is None else f"{seconds:.0f}"
            paid = "" if cost is None else f"${cost:.2f}"
            print(f"{item:<4} {name:15} {shown[0]} {shown[1]} {took:>7}  {paid:6}  {human}", flush=True)
    for name, values in accuracy.items():  # the paper's form: the mean over items, and its standard deviation
        spread = f" (SD {statistics.stdev(values):.3f})" if len(values) > 1 else ""
        print(f"mean {name:15} {statistics.fmean(values):.3f}{spread}")


if __name__ == "__main__":
    main()
