"""What makes the slopes of rows along a direction differ: how much of it are their labels, and what stratifying saves.

    python benchmarks/zo_rows.py DATA [--rows 480] [--at 0 3000 10000 25000] [--seed 0] [--folder FOLDER]

The testbed trec_prompted of `zo_learning.py`, before training and after so many row-forwards of `default`. Along each
of its fifteen directions: the variance of single rows' slopes within labels, and that of the mean over a step's rows
where these are stratified, each over what it is without regard to labels.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from tunefork.methods.zo import BatchRows, ZerothOrder
from tunefork.tasks import row_losses
from tunefork.train.sampler import Sampler
from tunefork.zo import ZO
from tunefork.zo.calibrate import LAST
from tunefork.zo.engine import Uninterrupted
from tunefork.zo.probes import BatchProbe
from zo_learning import PRESETS, Bed, bed_of, tune_on_prompts

EPSILON = 1e-3
AT_ONCE = 24
SIZES = (2, PRESETS["default"].batch, 12, 24)  # of steps


def slopes(bed: Bed, opt: ZO, rows: np.ndarray) -> np.ndarray:
    """[queries, rows]; nothing is learned."""
    rendered, found = bed.job.rendered["train"], list[np.ndarray]()
    for some in np.array_split(rows, -(-len(rows) // AT_ONCE)):
        batch = bed.job.renderer.batch([rendered[i] for i in some], learn=True)
        probe = BatchProbe(opt.engine.model, row_losses, (batch,), BatchRows(), opt.stacking)
        with Uninterrupted() as signals:
            by_row = opt.engine.measure(probe, signals, (1, -1), LAST, EPSILON).by_row
        assert by_row is not None
        found.append(np.array([by_row(query) for query in range(opt.engine.queries)]) / (2 * EPSILON))
    return np.concatenate(found, axis=1)


def spread(slope: np.ndarray, size: int, labels: np.ndarray | None) -> float:
    """Mean square of what the mean over a step of `size` rows is off by."""
    sampler = Sampler(slope.shape[1], size, 0, None if labels is None else labels.tolist())
    steps = [sampler.step(i) for i in range(20 * sampler.steps_per_epoch)]
    off = [slope[:, rows].mean(axis=1) - slope.mean(axis=1) for rows in steps if len(rows) == size]
    return float(np.mean(np.square(off)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--at", type=int, nargs="*", default=[0, 3000, 10_000, 25_000], help="row-forwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the model tuned on prompts, for the next time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "tuned" / "model").exists():
            tune_on_prompts(options.data, folder)
        bed = bed_of("trec_prompted", options.data, folder, "cpu")
    model = copy.deepcopy(bed.model)
    method = ZerothOrder(model, bed.job.recipe, ZO(model, seed=options.seed))
    rendered = bed.job.rendered["train"]
    rows = np.random.default_rng(0).permutation(len(rendered))[: options.rows]
    labels = np.array([rendered[i].example.gold for i in rows])
    used, batches = 0, bed.batches(options.seed, "default")
    for mark in sorted(options.at):
        while used < mark:
            used += method.step([next(batches)], row_losses, 1.0).forwards
        slope = slopes(bed, method.optimizer, rows)
        within = sum(np.mean(labels == k) * slope[:, labels == k].var(axis=1) for k in np.unique(labels))
        saved = " ".join(f"{n}: {spread(slope, n, labels) / spread(slope, n, None):.2f}" for n in SIZES)
        inside = np.mean(within) / np.mean(slope.var(axis=1))
        print(f"{used:6d} row-forwards: within labels {inside:.2f}; steps of {saved}", flush=True)


if __name__ == "__main__":
    main()
