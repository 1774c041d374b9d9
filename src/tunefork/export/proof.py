"""The proof of a merge: on held-out rows the merged model must say what the trained one says.

|merged - trained| / |trained - base| over the logits at the positions the task reads: 0 for a perfect merge, 1 for an
untouched base. All models compute in fp32, so that the figure tells of weights alone, not of 16-bit arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from tunefork.batch import Batch
from tunefork.data import read_files
from tunefork.errors import DataError, ExportError
from tunefork.evaluate.batching import choice_tokens, pack
from tunefork.evaluate.harness import Asking, predict_examples
from tunefork.models.quantize import guard_quantized, quantized_layers
from tunefork.recipe import Recipe
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, Prediction, Task, build_examples, split_rows
from tunefork.tasks.loss import IGNORED, logits_at

LIMIT = 0.05
"""The largest ratio that passes."""

ROWS, POSITIONS = 64, 512  # at most; the logits of three models at these positions are kept in memory
TEXT_TOLERANCE = 0.02  # nats, or a metric of generated text: a near tie may end one row of 64 otherwise
TIE = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.01}  # probability by which a candidate must lead not to be a tie
UNCHANGED = 1e-5  # |trained - base| / |base| below which fp32 arithmetic alone could be the difference

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class HeldOut:
    """Rows that were not trained on, rendered as in training."""

    split: str
    task: Task
    renderer: Renderer
    examples: Sequence[Example]
    rendered: Sequence[Rendered]
    tokens_per_batch: int


@dataclass(frozen=True)
class Answers:
    """What a model says about the held-out rows."""

    logits: torch.Tensor  # [N, V] fp32 on the CPU: N read positions, V words or classes
    predictions: Sequence[Prediction]


@dataclass(frozen=True, slots=True)
class Proof:
    """The figures of one merge."""

    ratio: float  # |merged - trained| / |trained - base|, fp32 arithmetic
    limit: float
    change: float  # |trained - base| / |base|: how much was learned
    rows: int
    positions: int
    split: str
    dtype: str  # of the merged weights
    metrics: Mapping[str, Mapping[str, float]]  # name -> {trained, merged}
    ties: int  # rows on which they differ, for the trained model a tie; the metrics take its choice
    ratio_in_own_arithmetic: float | None = None  # the same, the merged model computing in its 16 bit

    @property
    def unequal(self) -> list[str]:
        """Metrics that differ. Of generated text and losses, those that differ by more than TEXT_TOLERANCE."""
        return [name for name, pair in self.metrics.items() if not pair["equal"]]

    @property
    def computes(self) -> bool:
        """Whether the merged model does not overflow in its own number format."""
        return self.ratio_in_own_arithmetic is None or math.isfinite(self.ratio_in_own_arithmetic)

    @property
    def passed(self) -> bool:
        return self.ratio <= self.limit and self.computes and not self.unequal

    def summary(self) -> dict[str, Any]:
        """The proof as JSON."""
        return {**asdict(self), "passed": self.passed}


def held_out(recipe: Recipe, task: Task, renderer: Renderer) -> HeldOut:
    """Up to ROWS dev rows of the run, evenly spread; training rows where there are none.

    Raises MissingFileError or DataError when the run's data are not there any more, or none is usable.
    """
    data = recipe.data
    if data.dev is not None:
        data = data.model_copy(update={"train": None, "test": None})
    splits, _ = split_rows(task, read_files(data), data)
    for split in ("dev", "train"):
        examples, _ = build_examples(task, getattr(splits, split), data, labelled=True)
        pairs = [(e, r) for e in examples for r in renderer.render(e)]
        teaching = {id(e) for e, r in pairs if e.gold is not None or any(r.trained[1:])}
        usable = [e for e in examples if id(e) in teaching]
        if usable:
            count = min(ROWS, len(usable))
            chosen = [usable[i * len(usable) // count] for i in range(count)]
            kept = {id(e) for e in chosen}
            rendered = [r for e, r in pairs if id(e) in kept and (e.gold is not None or any(r.trained[1:]))]
            return HeldOut(split, task, renderer, chosen, rendered, recipe.evaluate.tokens_per_batch)
    raise DataError(
        "A merge is proven on rows of the run's data. Received none that is usable. "
        "Try it where the files named in the run's recipe.yaml are."
    )


def in_fp32(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights, NF4 ones included, computing in fp32."""
    torch.nn.Module.float(model)  # transformers refuses its own for NF4, which this leaves as it is
    guard_quantized(model, torch.float32)
    for layer in quantized_layers(model):
        layer.weight.quant_state.dtype = torch.float32  # which NF4 stands for exactly; 16 bit would round it
    return model.requires_grad_(False).eval()


def answers(model: torch.nn.Module, rows: HeldOut, device: torch.device) -> Answers:
    """Logits and predictions of a model that computes in its own number format."""
    predictions = predict_examples(model, Asking(rows.renderer, device, rows.tokens_per_batch), rows.examples)
    return Answers(read_logits(model, rows, device), predictions)


def read_logits(model: torch.nn.Module, rows: HeldOut, device: torch.device) -> torch.Tensor:
    """[N, V] fp32 on the CPU: the logits where the task reads them, at most POSITIONS of them."""
    share = max(1, POSITIONS // len(rows.rendered))
    found: list[torch.Tensor] = []
    fans = [len(r.candidates) if r.fanned_out else 1 for r in rows.rendered]
    budget = choice_tokens(model, device, rows.tokens_per_batch, rows.renderer, rows.rendered)
    with torch.inference_mode():
        for group in pack([r.longest for r in rows.rendered], budget, fans):
            batch = rows.renderer.batch([rows.rendered[k] for k in group]).to(device)
            found.append(_logits(model, batch, share).to(_CPU))
    return torch.cat(found)


def compare(
    base: torch.Tensor,
    trained: Answers,
    merged: Answers,
    rows: HeldOut,
    dtype: str,
    own_arithmetic: torch.Tensor | None = None,
) -> Proof:
    """The proof, passed or not. Raises ExportError where it is undefined: trained equals base, or is not finite."""
    learned = _norm(trained.logits - base)
    change = learned / max(_norm(base), 1e-30)
    if not math.isfinite(learned):
        raise ExportError(
            "The trained model's logits must be finite to be compared. Received others on held-out rows. "
            "Try training with a smaller learning rate."
        )
    if change <= UNCHANGED:
        raise ExportError(
            f"A merge can be proven only where training changed something. On {len(rows.examples)} held-out rows the "
            f"trained model's logits are those of its base (relative difference {change:.1e}). "
            "Try more steps or a larger learning rate, or --to adapter."
        )
    kept = [_unless_tied(a, b, TIE[dtype]) for a, b in zip(trained.predictions, merged.predictions, strict=True)]
    mine, theirs = (
        {s.name: s(np.arange(len(p))) for s in rows.task.statistics(p)} for p in (trained.predictions, kept)
    )
    metrics = {
        name: {"trained": mine[name], "merged": value, "equal": _equal(rows.task, mine[name], value)}
        for name, value in theirs.items()
        if name in mine
    }
    return Proof(
        ratio=_norm(merged.logits - trained.logits) / learned,
        limit=LIMIT,
        change=change,
        rows=len(rows.examples),
        positions=len(base),
        split=rows.split,
        dtype=dtype,
        metrics=metrics,
        ties=sum(a is not b for a, b in zip(kept, merged.predictions, strict=True)),
        ratio_in_own_arithmetic=None if own_arithmetic is None else _norm(own_arithmetic - trained.logits) / learned,
    )


def _unless_tied(trained: Prediction, merged: Prediction, tie: float) -> Prediction:
    """The merged model's prediction, or the trained one's where it is a tie: 16 bit cannot tell which is first."""
    chance = trained.probabilities
    if trained.index is None or merged.index is None or trained.index == merged.index or not chance:
        return merged
    return trained if chance[trained.index] - chance[merged.index] <= tie else merged


def _equal(task: Task, a: float, b: float) -> bool:
    """Of candidates exactly; free text within the tolerance. A metric undefined for both is equal."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= (TEXT_TOLERANCE if task.form in ("text", "chat") else 1e-9)


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _logits(model: torch.nn.Module, batch: Batch, share: int) -> torch.Tensor:
    """[N, V] fp32. Text and candidates of several tokens: at most `share` positions a row, evenly spread."""
    if batch.head:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    if batch.read_at is not None:
        at = torch.stack([torch.arange(len(batch.read_at), device=batch.read_at.device), batch.read_at], dim=1)
    else:
        assert batch.targets is not None
        wanted = (batch.targets != IGNORED).nonzero()  # [P, (sequence, position)]
        places = [(batch.row[wanted[:, 0]] == row).nonzero().squeeze(1) for row in range(batch.rows)]
        spread = [p[torch.linspace(0, len(p) - 1, min(share, len(p))).round().long().to(p.device)] for p in places]
        at = wanted[torch.cat(spread)]
    return logits_at(model, batch, at[:, 0], at[:, 1])
