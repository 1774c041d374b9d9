"""Progress while a run works: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from tunefork.cli.screen import escape
from tunefork.cli.show import show_findings, show_plan
from tunefork.hosted.prices import Estimate
from tunefork.train.loop import Event
from tunefork.words import decimal, duration, size
from tunefork.workflows.finetune import Listener, Plan
from tunefork.workflows.hosted_plan import HostedPlan

PLAIN_EVERY_SECONDS = 10.0
HOSTED_SECONDS = 2.0  # between two steps that a service tells of


class Watcher(Listener):
    """Shows the plan, then steps with ETA, loss, the last look at dev, tokens/s, and peak memory so far, as the result
    counts it.
    """

    def __init__(self, console: Console, agree: Callable[[Estimate], bool] = lambda estimate: False) -> None:
        self.console, self.agree = console, agree
        self.steps, self.first, self.last_look, self.last_line = 0, None, "", 0.0
        self.started, self.tokens_before, self.forwards = 0.0, 0, 0.0
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def plan(self, plan: Plan) -> None:
        show_plan(self.console, plan)
        self.steps = plan.job.resolved.steps

    def stage(self, text: str) -> None:
        self._close()
        self.console.print(f"[dim]{text} …[/]")

    def hosted(self, plan: HostedPlan) -> None:
        for name, count in plan.counts().items():
            where = escape(plan.origin.get(name, ""))
            self.console.print(
                f"[bold]{name:5}[/] {count['rows']:,} rows, about {count['tokens']:,} tokens [dim]{where}[/]",
                soft_wrap=True,
            )
        show_findings(self.console, plan.findings)

    def confirm(self, estimate: Estimate) -> bool:
        return self.agree(estimate)

    def event(self, event: Event) -> None:
        if event.kind == "step":
            self._step(event)
        elif event.kind == "look":
            better = " (best so far)" if event.values["better"] else ""
            self.last_look = f"dev {event.values['metric']} {decimal(float(event.values['value']))}"
            if self.bar is None:
                self.console.print(f"step {event.step:,}: {self.last_look}{better}")
        elif event.kind == "resume":
            self.console.print(f"resumed at step {event.step:,}")
            for path, why in event.values["skipped"]:
                self.console.print(f"[yellow]skipped[/] {escape(f'{path}: {why}')}", soft_wrap=True)
            for difference in event.values["differences"]:
                self.console.print(f"[yellow]not as before[/] {escape(difference)}", soft_wrap=True)
        elif event.kind == "note" or (event.kind == "metrics" and time.monotonic() > self.last_line + HOSTED_SECONDS):
            self.last_line = time.monotonic()
            self.console.print(escape(event.values["text"]), soft_wrap=True)
        elif event.kind == "stop":
            self._close()

    def _step(self, event: Event) -> None:
        now = time.monotonic()
        tokens = int(event.values["tokens"])
        if self.first is None:
            self.first, self.started, self.tokens_before, self.last_line = event.step, now, tokens, now
            self.forwards = 0.0  # those of the first step were before the clock
            if self.console.is_terminal:
                self._open()
        done = event.step - self.first
        speed = (tokens - self.tokens_before) / (now - self.started) if now > self.started and done else 0.0
        peak = event.values["peak_memory_bytes"]
        memory = f" · peak {size(peak)}" if peak is not None else ""
        look = f" · {self.last_look}" if self.last_look else ""
        rate = f"{speed:,.0f} tokens/s"
        if "projected_gradient" in event.values:  # zeroth-order: what is measured along how many directions
            self.forwards += event.values["row_forwards"] if done else 0.0
            forwards = self.forwards / (now - self.started) if done else 0.0
            slope, queries = event.values["projected_gradient"], event.values["queries"]
            along = f"{queries:.0f} {'query' if queries == 1 else 'queries'}"
            rate = f"|g| {slope:.3g} · {along} · {forwards:,.0f} row-forwards/s"
        goal = "objective" if "objective" in event.values else "loss"
        text = f"{goal} {event.values[goal]:.4f}{look} · {rate}{memory}"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=event.step, detail=text)
        elif now - self.last_line >= PLAIN_EVERY_SECONDS or event.step == self.steps:
            left = (self.steps - event.step) * (now - self.started) / done if done else None
            said = f"step {event.step:,}/{self.steps:,} · {text} · {duration(left)} left"
            self.console.print(said, soft_wrap=True)
            self.last_line = now

    def _open(self) -> None:
        self.bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=self.console,
            expand=True,  # so that it is the end of the text that a narrow terminal leaves out
        )
        self.task = self.bar.add_task("training", total=self.steps, detail="")
        self.bar.start()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar, self.task = None, None
        self.first = None
