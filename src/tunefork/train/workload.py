"""What a run will compute: its micro-batches and its looks at dev, and which of them are simulated."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunefork.evaluate.batching import choice_tokens, pack, text_tokens
from tunefork.evaluate.generate import answer_renderer, generate
from tunefork.evaluate.harness import LOSS, UNGENERATED, nothing
from tunefork.evaluate.prefix import can_share_prefix, prefix_scores
from tunefork.models import autocast, torch_dtype
from tunefork.render import Rendered
from tunefork.tasks import row_losses, row_scores
from tunefork.train.prepare import Job
from tunefork.train.sampler import micro_batches, sampler_of
from tunefork.train.simulation import Simulation, Work

_MOST_STEPS = 5000  # looked at one by one; a longer run has the same batches again


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The run's micro-batches, by how many padded tokens they have."""

    steps: int
    micro_batches: float  # of the whole run
    mean_padded: float
    heaviest: Sequence[Sequence[Rendered]]  # the two heaviest micro-batches of the heaviest step, or its only one
    heaviest_padded: int
    step_sizes: Sequence[int]  # padded tokens of each step's heaviest micro-batch, in the order of the steps
    typical: Sequence[Rendered]  # the one nearest the mean
    typical_padded: int


@dataclass(frozen=True, slots=True)
class Looks:
    """All looks at dev: work that was simulated, and how many times as large each batch of a look is."""

    count: int = 0
    batches: tuple[tuple[Work, tuple[float, ...]], ...] = ()


def plan_batches(job: Job) -> BatchPlan:
    """The micro-batches training will form, in the order it will form them."""
    options, rows = job.recipe.train, job.rendered["train"]
    sampler = sampler_of(rows, options, job.recipe.seed)
    lengths = [len(r.ids) for r in rows]
    looked_at = min(job.resolved.steps, _MOST_STEPS)
    steps = [micro_batches(sampler.step(s), lengths, int(options.micro_batch_size)) for s in range(looked_at)]
    fan = not (job.task.objective == "answer" or job.task.form in ("text", "chat"))
    sizes = [[padded([rows[i] for i in group], fan) for group in groups] for groups in steps]
    heaviest = max(range(looked_at), key=lambda s: (max(sizes[s]), len(sizes[s])))
    ranked = sorted(zip(sizes[heaviest], steps[heaviest], strict=True), key=lambda pair: pair[0])
    every = [
        (size, group) for s, groups in zip(sizes, steps, strict=True) for size, group in zip(s, groups, strict=True)
    ]
    mean = sum(size for size, _ in every) / len(every)
    typical = min(every, key=lambda pair: abs(pair[0] - mean))
    return BatchPlan(
        steps=job.resolved.steps,
        micro_batches=len(every) * job.resolved.steps / looked_at,
        mean_padded=mean,
        heaviest=[[rows[i] for i in group] for _, group in ranked[-2:]],
        heaviest_padded=ranked[-1][0],
        step_sizes=[max(some) for some in sizes],
        typical=[rows[i] for i in typical[1]],
        typical_padded=typical[0],
    )


def padded(rows: Sequence[Rendered], fan: bool) -> int:
    """Tokens of the rows as a batch, padding included; with `fan` a row is as many sequences as it has candidates."""
    sequences = sum(len(r.candidates) if fan and r.fanned_out else 1 for r in rows)
    return sequences * max(r.longest for r in rows)


def simulate_look(job: Job, model: torch.nn.Module, simulation: Simulation) -> Looks:
    """Evaluates the heaviest batch of dev as `look_metrics` would; from its work follows that of all."""
    section, task, dev = job.recipe.evaluate, job.task, job.rendered["dev"]
    compute = functools.partial(autocast, job.device, torch_dtype(job.recipe.model.dtype))
    common: dict[str, Any] = {"device": job.device, "tokens_per_batch": section.tokens_per_batch}
    common |= {"compute": compute, "check": nothing}
    texts = task.form in ("text", "chat") or task.metric == LOSS
    share = any(r.fanned_out for r in dev) and can_share_prefix(model) and not texts
    fans = [len(r.candidates) if r.fanned_out and not share else 1 for r in dev]
    budget = section.tokens_per_batch
    if texts:
        budget = text_tokens(model, job.device, budget)
    elif not share:
        budget = choice_tokens(model, job.device, budget, job.renderer, dev)
    groups = pack([r.longest for r in dev], budget, fans)
    sizes = [padded([dev[i] for i in group], not share) for group in groups]
    heaviest = max(range(len(groups)), key=lambda g: sizes[g])
    rows = [dev[i] for i in groups[heaviest]]
    training, before = model.training, simulation.work.copy()
    model.eval()
    with torch.no_grad():  # in inference mode operations would come undivided, and what they do inside be missed
        if share:
            prompts, candidates = [r.ids for r in rows], [r.candidates for r in rows]
            prefix_scores(model, prompts, candidates, pad=job.renderer.pad, **common)
        else:
            batch = job.renderer.batch(rows, learn=texts).to(job.device)
            with compute():
                row_losses(model, batch) if texts else row_scores(model, batch)
        found = [(simulation.work.since(before), tuple(size / sizes[heaviest] for size in sizes))]
        if texts and task.metric != LOSS and any(metric not in UNGENERATED for metric in task.metrics):
            found += _simulate_answers(job, model, simulation, common)
    model.train(training)
    return Looks(1 + math.ceil(job.resolved.steps / int(job.recipe.train.evaluate_every)), tuple(found))


def simulate_start(job: Job, model: torch.nn.Module) -> None:
    """The heaviest batch of training rows on whose features a head's start is fitted."""
    rows, section = job.rendered["train"], job.recipe.evaluate
    groups = pack([len(r.ids) for r in rows], section.tokens_per_batch)
    heaviest = max(groups, key=lambda group: padded([rows[i] for i in group], fan=False))
    batch = job.renderer.batch([rows[i] for i in heaviest], learn=False).to(job.device)
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(job.device, torch_dtype(job.recipe.model.dtype)):
        row_scores(model, batch)
    model.train(training)


def _simulate_answers(
    job: Job, model: torch.nn.Module, simulation: Simulation, common: dict[str, Any]
) -> list[tuple[Work, tuple[float, ...]]]:
    """Generating every dev answer at full length: prompts, then tokens. The heaviest batch, its cache as at the end."""
    renderer, new = answer_renderer(model, job.renderer), job.task.max_new_tokens
    prompts = [renderer.prompt(e).ids for e in job.examples["dev"]]
    groups = pack([len(p) + new for p in prompts], common["tokens_per_batch"])
    full = [(*prompts[i], *([renderer.pad] * (new - 1))) for i in groups[0]]
    before = simulation.work.copy()
    generate(model, renderer, full, max_new_tokens=1, stop=(), **common)
    reading = simulation.work.since(before)
    before = simulation.work.copy()
    with common["compute"]():
        model(input_ids=torch.ones(len(full), 1, dtype=torch.int64, device=job.device))
    writing = simulation.work.since(before)
    size, rows = len(full) * len(full[0]), len(full)
    read = tuple(len(group) * len(prompts[group[0]]) / size for group in groups)
    written = tuple(len(group) / rows for group in groups for _ in range(new))
    return [(reading, read), (writing, written)]
