"""What a zeroth-order step needs in memory beyond the passes that it makes, and a model of 1B trained in 1.5 GiB.

    python benchmarks/zo_memory.py [--cells WORD ...] [--json]

A random Llama of 552M parameters (hidden 1536, 16 layers, ffn 4096, 32,000 words) is saved and loaded. One process
makes plain passes without gradients, another zeroth-order steps on the same batch (4 x 64 tokens, the loss of the last
position from logits there only); both import the same. Low-rank cells read the weights where the file is mapped, as
transformers loads them; dense ones, which write weights, hold them in memory in both processes.

`passes` and `step` are peaks of anonymous memory, exact to what the kernel counts: the peak of resident memory (VmHWM,
reset before each pass or step) less the file pages (RssFile), which hardly change once the weights were read. For the
step the smaller number of file pages is taken off, for the passes the larger, so rounding is never in our favour.
Both processes have glibc's thresholds fixed at their documented start, 128 KiB: by default they grow, and freed memory
that is kept blurs a peak by some 16 MiB.
`allowed` is the factors (U in fp32, V as signs of one byte) or, of a dense direction in 16 bit, the remainders; one
module's scratch; and 2 % of the passes' peak.

The last cell loads a random Llama of TinyLlama's shape (1.1B parameters, hidden 2048, 22 layers, ffn 5632, 32,000
words) from a saved NF4 checkpoint and trains it; its limit is on the process as a whole, file pages and imports
included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tunefork.models.quantize import guard_quantized, nf4_settings
from tunefork.zo import ZO
from tunefork.zo.kernels import accumulate_, draw
from tunefork.zo.noise import Stream
from zo_step import VOCAB, batch_of, row_losses

ROWS, LENGTH, STEPS = 4, 64, 4
MIB = 1 << 20
SHAPES: dict[str, dict[str, int]] = {
    "552M": {"hidden_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 12, "intermediate_size": 4096},
    "1.1B": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "intermediate_size": 5632},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
LOW_RANK = {"direction": "low_rank", "queries": 1, "rows": "shared"}
DENSE = {"direction": "rademacher", "queries": 1, "rows": "shared"}
WHOLE_LIMIT = 1536  # MiB, of the NF4 cell
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Cell(NamedTuple):
    """One line of the table; `bounded`: the step's peak has a limit, else it is only reported."""

    model: str
    dtype: str
    kind: str
    options: dict[str, Any]
    bounded: bool

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} {self.kind}"

    @property
    def dense(self) -> bool:
        return self.options["direction"] != "low_rank"


CELLS = [
    Cell("552M", "fp32", "low-rank, side after side", {**LOW_RANK, "stack": 1}, True),
    Cell("552M", "fp32", "low-rank, stacked", LOW_RANK, False),
    Cell("552M", "bf16", "low-rank, side after side", {**LOW_RANK, "stack": 1}, True),
    Cell("552M", "bf16", "low-rank, stacked", LOW_RANK, False),
    Cell("552M", "fp32", "dense", DENSE, True),
    Cell("552M", "bf16", "dense", DENSE, True),
    Cell("1.1B", "nf4", "low-rank, side after side", {**LOW_RANK, "stack": 1}, True),
    Cell("1.1B", "nf4", "low-rank, stacked", LOW_RANK, False),
]


def save_model(name: str, dtype: str, path: Path) -> None:
    heads = {"num_key_value_heads": 4} if name == "1.1B" else {}
    config = LlamaConfig(
        **SHAPES[name], **heads, vocab_size=VOCAB, max_position_embeddings=512, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[dtype])
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if dtype != "nf4":
        model.save_pretrained(path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as plain:
        model.save_pretrained(plain)
        del model
        settings: BitsAndBytesConfig = nf4_settings(["lm_head"], DTYPES[dtype])
        quantised = LlamaForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=DTYPES[dtype])
    quantised.save_pretrained(path)


def resident() -> dict[str, int]:
    """This process's VmHWM, RssAnon, RssFile and RssShmem, in bytes."""
    pairs = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {p[0][:-1]: int(p[1]) * 1024 for p in pairs if p[0][:-1] in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}


def peak(work: Callable[[], object], *, high: bool) -> int:
    """Peak of anonymous memory while `work` runs, rounded up (`high`) or down by what file pages came and went."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    work()
    after = resident()
    files = (min if high else max)(r["RssFile"] + r["RssShmem"] for r in (before, after))
    return after["VmHWM"] - files


def child(cell: Cell, role: str, path: Path) -> dict[str, Any]:
    """Peaks of one process: plain passes, or steps after one plain pass."""
    accumulate_(draw(Stream(0), (8,)), Stream(1), 1.0)  # loads the kernels' compiler, in both roles
    model = LlamaForCausalLM.from_pretrained(path, dtype=DTYPES[cell.dtype]).eval()
    guard_quantized(model, DTYPES[cell.dtype])
    if cell.dense:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    batch = batch_of(ROWS, LENGTH)

    def passes() -> None:
        with torch.no_grad():
            for _ in range(2):
                row_losses(model, batch).mean().item()

    found: dict[str, Any] = {"loaded": resident()["VmHWM"]}
    passes()  # reads every weight
    start = time.perf_counter()
    if role == "passes":
        return found | {"peaks": [peak(passes, high=False) for _ in range(STEPS)], "whole": resident()["VmHWM"]}
    opts: list[ZO] = []
    peaks = [peak(lambda: opts.append(ZO(model, lr=1e-6, epsilon=1e-3, **cell.options)), high=True)]
    opt = opts[0]
    whole = 0
    for _ in range(STEPS):
        peaks.append(peak(lambda: opt.step_batch(row_losses, batch), high=True))
        whole = max(whole, resident()["VmHWM"])
    seconds = (time.perf_counter() - start) / STEPS
    return found | {"peaks": peaks, "whole": whole, "mode": opt.mode, "seconds": seconds, **needs(cell, opt)}


def needs(cell: Cell, opt: ZO) -> dict[str, int]:
    """Bytes that the method must keep, and the scratch of its largest module."""
    learned = [v for k, v in opt.learned().items() if "/weight/" not in k]
    stored = sum(v.numel() * v.element_size() for v in learned)
    if cell.dense:
        return {"stored": stored, "scratch": max(s.parameter.nbytes for s in opt.sites)}
    shapes, places, ranks = [site.shape for site in opt.sites], ROWS * LENGTH, opt.options.max_rank
    both, size = ranks + opt.options.rank, 4 if cell.dtype == "fp32" else 2
    scratch = size * max(places * both + ranks * i + both * o for o, i in shapes)
    return {"stored": stored + sum(ranks * i for _, i in shapes), "scratch": scratch}


def table(cells: list[Cell]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            path = Path(folder) / f"{cell.model}-{cell.dtype}"
            if not path.exists():
                ask("save", cell, path)
            passes, step = (ask(role, cell, path) for role in ("passes", "step"))
            base, used = max(passes["peaks"]), max(step["peaks"])
            allowed = step["stored"] + step["scratch"] + base // 50
            yield {
                "cell": cell.name,
                "mode": step["mode"],
                "passes_mib": base / MIB,
                "step_mib": used / MIB,
                "added_mib": (used - base) / MIB,
                "allowed_mib": allowed / MIB if cell.bounded else None,
                "stored_mib": step["stored"] / MIB,
                "scratch_mib": step["scratch"] / MIB,
                "loading_mib": step["loaded"] / MIB,
                "whole_mib": max(step["loaded"], step["whole"]) / MIB,
                "whole_limit_mib": WHOLE_LIMIT if cell.dtype == "nf4" else None,
                "peaks_mib": [p / MIB for p in step["peaks"]],
                "seconds": step["seconds"],
            }


def ask(role: str, cell: Cell, path: Path) -> dict[str, Any]:
    """What a process of its own found."""
    command = [sys.executable, __file__, "--role", role, "--cell", str(CELLS.index(cell)), "--path", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **MALLOC})
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cells", nargs="*", default=[], help="words that a cell's name must hold, e.g. bf16 dense")
    parser.add_argument("--json", action="store_true", help="machine-readable results alone on stdout")
    for name in ("--role", "--cell", "--path"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.role:
        cell = CELLS[int(options.cell)]
        if options.role == "save":
            save_model(cell.model, cell.dtype, Path(options.path))
        json.dump({} if options.role == "save" else child(cell, options.role, Path(options.path)), sys.stdout)
        return
    screen = sys.stderr if options.json else sys.stdout
    heads = ("passes", "step", "added", "allowed", "factors", "scratch", "process")
    print(f"{'cell, MiB':40}" + "".join(f"{head:>9}" for head in heads), file=screen)
    found = []
    chosen = [c for c in CELLS if all(word in c.name.replace(",", "").split() for word in options.cells)]
    for row in table(chosen):
        found.append(row)
        columns = ("passes", "step", "added", "allowed", "stored", "scratch", "whole")
        numbers = (row[f"{name}_mib"] for name in columns)
        print(f"{row['cell']:40}" + "".join("        -" if n is None else f"{n:9.1f}" for n in numbers), file=screen)
        screen.flush()
    if options.json:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": ROWS, "length": LENGTH}
        json.dump({**facts, "cells": found}, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
