"""What a zeroth-order step costs beside the two forward passes that it must make, and beside MeZO's published step.

    python benchmarks/zo_step.py [--cells WORD ...] [--repeats 5] [--device cuda] [--json]

Random Llamas, saved to disk and loaded: A (hidden 768, 12 layers, ffn 2048) and B (hidden 2048, 8 layers, ffn 5632),
both with 32,000 words. The loss is that of the last position, from logits at that position only, for all three. Every
repeat times the three one after the other; the figures are medians. Low-rank steps are timed once every base of the
pool is in use. `bound` is MeZO over two passes: no step that makes those one after the other can gain more on it, one
that has both in one pass may; `share` is how much of that is had. `default` is the preset's step, 6 rows in 16 sides
(15 directions and the middle), beside two passes of as many rows, 48.

On a GPU the cells are others: C is a Llama of TinyLlama's shape (1.1B parameters), and `added` is what a step takes in
memory beyond the passes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from mezo import MeZO
from tunefork.zo import ZO
from tunefork.zo.estimators import ESTIMATORS
from tunefork.zo.options import preset_of

VOCAB = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "A": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "B": {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 5632},
    "C": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOW_RANK = {"direction": "low_rank", "queries": 1, "rows": "shared"}
SPLIT = {"direction": "low_rank", "queries": 8, "rows": "split"}
PRESET = preset_of("default")
SIDES = ESTIMATORS[PRESET.options["estimator"]].forwards(PRESET.options["queries"])
PASS_ROWS = PRESET.batch * SIDES // 2  # of two passes that see as many rows as a step of the preset
DENSE = {"direction": "rademacher", "queries": 1, "rows": "shared"}
WARM_UP = 9  # steps: the pool has 8 bases


class Cell(NamedTuple):
    """One line of the table; `limit` is what the step may cost, in two passes."""

    model: str
    dtype: str
    rows: int
    length: int
    kind: str
    options: dict[str, Any]
    limit: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} {self.rows}x{self.length} {self.kind}"


CELLS = [
    Cell("A", "fp32", 8, 64, "low-rank", LOW_RANK, 1.12),
    Cell("A", "bf16", 8, 64, "low-rank", LOW_RANK, 1.12),
    Cell("A", "fp32", 8, 64, "low-rank, 8 queries split", SPLIT, None),
    Cell("A", "fp32", 8, 64, "dense", DENSE, 1.25),
    Cell("A", "bf16", 8, 64, "dense", DENSE, 1.25),
    Cell("A", "fp32", 1, 32, "low-rank", LOW_RANK, 0.95),
    Cell("A", "bf16", 1, 32, "low-rank", LOW_RANK, 0.95),
    Cell("A", "fp32", 1, 32, "low-rank, closure", LOW_RANK, None),
    Cell("A", "fp32", 1, 8, "low-rank", LOW_RANK, 0.95),
    Cell("A", "bf16", 1, 8, "low-rank", LOW_RANK, 0.95),
    Cell("A", "fp32", 1, 8, "low-rank, closure", LOW_RANK, None),
    Cell("A", "fp32", PASS_ROWS, 64, "default", {}),
    Cell("A", "bf16", PASS_ROWS, 64, "default", {}),
    Cell("B", "fp32", 8, 64, "low-rank", LOW_RANK, 1.05),
    Cell("B", "bf16", 8, 64, "low-rank", LOW_RANK, 1.05),
]

GPU_CELLS = [
    Cell("A", "fp32", 8, 64, "low-rank", LOW_RANK),
    Cell("A", "bf16", 8, 64, "low-rank", LOW_RANK),
    Cell("A", "bf16", 1, 32, "low-rank", LOW_RANK),
    Cell("B", "bf16", 8, 64, "low-rank", LOW_RANK),
    Cell("C", "bf16", 16, 128, "low-rank", LOW_RANK),
    Cell("C", "bf16", 16, 512, "low-rank", LOW_RANK),
    Cell("C", "bf16", 16, 512, "low-rank, 8 queries split", SPLIT),
    Cell("C", "bf16", PASS_ROWS, 128, "default", {}),
    Cell("C", "bf16", PASS_ROWS, 512, "default", {}),
    Cell("C", "bf16", 16, 512, "dense", DENSE),
]


def llama(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SHAPES[name], vocab_size=VOCAB, max_position_embeddings=512, tie_word_embeddings=False)
    )


def saved_model(name: str, folder: Path) -> Path:
    """The folder of a random Llama, made on first use."""
    path = folder / name
    if not path.exists():
        llama(name).save_pretrained(path)
    return path


def loaded(name: str, folder: Path, dtype: torch.dtype, device: str = "cpu") -> torch.nn.Module:
    if device != "cpu":
        with torch.device(device):
            return llama(name).to(dtype).eval()
    return LlamaForCausalLM.from_pretrained(saved_model(name, folder), dtype=dtype).eval()


def batch_of(rows: int, length: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :-1].contiguous().to(device), "labels": ids[:, -1].contiguous().to(device)}


def row_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """fp32 [rows], from logits at the last position only."""
    logits = model(input_ids=batch["input_ids"], logits_to_keep=1, use_cache=False).logits[:, -1].float()
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def seconds(work: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def measured(cell: Cell, folder: Path, repeats: int, device: str) -> dict[str, Any]:
    """Medians of one cell, in milliseconds, and their ratios."""
    dtype, batch = DTYPES[cell.dtype], batch_of(cell.rows, cell.length, device)
    few = batch_of(PRESET.batch if cell.kind == "default" else cell.rows, cell.length, device)
    plain, ours, theirs = (loaded(cell.model, folder, dtype, device) for _ in range(3))
    mezo = MeZO(theirs, lr=1e-7, epsilon=1e-3)
    start = torch.cuda.memory_allocated() if device == "cuda" else 0
    opt = ZO(ours, lr=1e-6, epsilon=1e-3, **cell.options)

    def two_passes() -> None:
        with torch.no_grad():
            for _ in range(2):
                row_losses(plain, batch).mean().item()

    def step() -> None:
        if "closure" in cell.kind:
            opt.step(lambda: row_losses(ours, batch).mean())
        else:
            opt.step_batch(row_losses, few)

    def published() -> None:
        mezo.step(lambda: row_losses(theirs, batch).mean())

    for _ in range(WARM_UP):
        step()
    two_passes()
    added = None
    if device == "cuda":
        held, peaks = torch.cuda.memory_allocated(), []
        for work in (two_passes, step):
            torch.cuda.reset_peak_memory_stats()
            work()
            peaks.append(torch.cuda.max_memory_allocated() - held)
        added = round((held - start + peaks[1] - peaks[0]) / 2**20, 1)
    published()
    times = 1 if cell.rows * cell.length >= 256 else 4
    found: dict[str, list[float]] = {"two_passes": [], "step": [], "mezo": []}
    for _ in range(repeats):
        found["two_passes"].append(seconds(two_passes, times))
        found["step"].append(seconds(step, times))
        found["mezo"].append(seconds(published, 1))
    passes, ours_s, mezo_s = (statistics.median(found[name]) for name in ("two_passes", "step", "mezo"))
    return {
        "cell": cell.name,
        "mode": opt.mode,
        **{f"{name}_ms": round(1000 * statistics.median(values), 2) for name, values in found.items()},
        "spread": round(max(max(v) / min(v) for v in found.values()), 2),
        "step_over_passes": round(ours_s / passes, 3),
        "limit": cell.limit,
        "mezo_over_step": round(mezo_s / ours_s, 2),
        "bound": round(mezo_s / passes, 2),
        "share": round(passes / ours_s, 3),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "added_mib": added,
    }


def table(cells: list[Cell], repeats: int, device: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            yield measured(cell, Path(folder), repeats, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cells", nargs="*", default=[], help="words that a cell's name must hold, e.g. A fp32 1x8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="machine-readable results alone on stdout")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    screen = sys.stderr if options.json else sys.stdout
    print(f"{'cell':40} {'2 passes':>9} {'step':>9} {'MeZO':>9}   step/passes  MeZO/step  of at most", file=screen)
    found = []
    cells = GPU_CELLS if options.device == "cuda" else CELLS
    chosen = [c for c in cells if all(word in c.name.split() for word in options.cells)]
    for row in table(chosen, options.repeats, options.device):
        found.append(row)
        limit = "" if row["limit"] is None else f"<= {row['limit']}"
        print(
            f"{row['cell']:40} {row['two_passes_ms']:9.1f} {row['step_ms']:9.1f} {row['mezo_ms']:9.1f}   "
            f"{row['step_over_passes']:5.3f} {limit:7} {row['mezo_over_step']:8.2f} {row['bound']:9.2f}   "
            f"{row['mode']}" + ("" if row["added_mib"] is None else f"; {row['added_mib']} MiB added"),
            file=screen,
            flush=True,
        )
    if options.json:
        json.dump({"threads": options.threads, "torch": torch.__version__, "rows": found}, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
