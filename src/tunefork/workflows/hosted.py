"""`--method hosted`: the same recipe on somebody else's machine. Checked here, trained there, measured here."""

from __future__ import annotations

import secrets
import sys
import time
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunefork.errors import HostedError, Interrupted, RecipeError, RunError
from tunefork.evaluate.baselines import BaselineResult, run_plain_baselines
from tunefork.evaluate.summary import measure
from tunefork.files import make_folder, write_atomic, write_json
from tunefork.hosted import jobs
from tunefork.hosted.asking import asking_hosted
from tunefork.hosted.client import Client, overlay
from tunefork.hosted.formats import as_bytes
from tunefork.hosted.prices import find_price, require_confirmed
from tunefork.recipe import Reason, Recipe, dump_recipe, load_recipe
from tunefork.run import HOSTED_STATE, RunFolder
from tunefork.tasks import Prediction
from tunefork.train.interrupt import Interrupt
from tunefork.train.loop import Event
from tunefork.train.prepare import refuse_errors
from tunefork.workflows.finetune import Listener, RunResult, finish_report, free_folder, keep_result, refuse_changes
from tunefork.workflows.hosted_plan import ASKED, SPLITS, HostedPlan, plan_hosted, questions_of
from tunefork.workflows.tuned import read_state, tuned_name


def finetune_hosted(recipe: Recipe, *, resume: bool, listener: Listener) -> RunResult:
    """Uploads, trains, follows and measures. A run that was stopped goes on with the same job, by `resume`.

    Raises HostedError where the service refuses or the job fails; Interrupted leaves the job running.
    """
    if not resume:
        recipe = recipe if recipe.out is not None else recipe.model_copy(update={"out": str(free_folder(recipe))})
        _refuse_second_job(Path(str(recipe.out)))
        plan = plan_hosted(recipe)
        listener.hosted(plan)
        refuse_errors(plan.findings)
        client = Client(plan.model.service, on_wait=listener.stage)
        require_confirmed(plan.estimate, recipe.hosted.limit, listener.confirm)
        cost, limit = plan.estimate.cost, recipe.hosted.limit
        if limit is not None and (cost is None or cost > limit):
            raise RecipeError(
                f"The whole must stay below `hosted.limit`. Received ${limit:,.6g}. {plan.estimate.says()} "
                "Try a higher limit, or fewer rows."
            )
        created = RunFolder.create(Path(str(recipe.out)), dump_recipe(recipe))
        with created as run, Interrupt() as interrupt:
            write_json(run.path / HOSTED_STATE, {"model": plan.model.name, "run": secrets.token_hex(6), "job": None})
            return _run(run, plan, client, listener, interrupt)
    if recipe.out is None:
        raise RunError("`resume` needs the run's folder. Received no `out`. Try --out runs/NAME.")
    with RunFolder.open(Path(recipe.out), write=True) as run, Interrupt() as interrupt:
        kept = load_recipe(run.recipe_path)
        refuse_changes(recipe, kept)
        if not run.finished:
            plan = plan_hosted(kept.model_copy(update={"out": str(run.path)}))
            return _run(run, plan, Client(plan.model.service, on_wait=listener.stage), listener, interrupt)
        if not run.report_path.exists():
            finish_report(run)
        return RunResult(run.path, run.read_result())


def _run(run: RunFolder, plan: HostedPlan, client: Client, listener: Listener, interrupt: Interrupt) -> RunResult:
    state = read_state(run.path) or {}
    job = _train(run, plan, client, state, listener, interrupt)
    table = [line for id in job.get("result_files") or () for line in _result_file(run, client, id)]
    started = time.perf_counter()
    listener.stage("measuring on the test rows")
    test = plan.examples["test"]
    predictions, notes, spent = _ask_tuned(run, plan, client, state) if test else ([], [], 0.0)
    listener.stage("measuring the baselines")
    baselines = _baselines(plan, client)
    result: dict[str, Any] = {
        **_about(plan, job, tuned_name(state), client, table),
        "seconds": {"train": _seconds(job), "evaluate": time.perf_counter() - started},
        "baselines": {name: dict(b.metrics) for name, b in baselines.items()},
        "baseline_notes": {name: {"seconds": b.seconds, "notes": list(b.notes)} for name, b in baselines.items()},
        "test": measure(plan.task, predictions, plan.recipe.evaluate, plan.recipe.seed),
    }
    result["train"]["notes"] += notes
    result["hosted"]["spent_on_test_rows"] = spent
    if plan.task.metric not in result["test"]:  # a service tells no loss
        result["metric"] = next(iter(result["test"]), plan.task.metric)
    return keep_result(run, result, predictions, test, baselines, listener)


def _ask_tuned(
    run: RunFolder, plan: HostedPlan, client: Client, state: Mapping[str, Any]
) -> tuple[list[Prediction], list[str], float]:
    """Predictions of the test rows, notes, and what they cost. Raises HostedError where nothing answers yet."""
    said, made, name = "no name of it", state["job"].get("fine_tuned_model"), tuned_name(state)
    if name is not None:
        with asking_hosted(plan.model.sibling(name), plan.task, plan.recipe.hosted, client) as asking:
            try:
                return (*asking.predict(plan.examples["test"]), asking.budget.spent)
            except HostedError as error:
                if error.status != 404:
                    raise
                said = str(error)
    raise HostedError(
        f"The tuned model must answer before it is measured. Received: {said} Where {client.service.name} wants a "
        f"deployment first, deploy {made or state['job']['id']} and say its name by `tunefork hosted deployed "
        f"{run.path} NAME`; then try `tunefork train {run.path} --resume`.",
        status=404,
    )


def _train(
    run: RunFolder, plan: HostedPlan, client: Client, state: dict[str, Any], listener: Listener, interrupt: Interrupt
) -> dict[str, Any]:
    """The job, succeeded. Each thing that was made is in hosted.json before the next; what is lost is found again."""

    def keep(**values: Any) -> None:
        state.update(values)
        write_json(run.path / HOSTED_STATE, state)

    def wait(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            interrupt.check()
            time.sleep(0.1)

    for split, key in (("train", "training_file"), ("dev", "validation_file")):
        if plan.lines[split] and key not in state:
            listener.stage(f"uploading {split}.jsonl")
            content = BOM_UTF8 * client.service.mark + as_bytes(plan.lines[split])
            write_atomic(run.path / f"{split}.jsonl", content)
            keep(**{key: jobs.upload(client, f"tunefork-{state['run']}-{split}.jsonl", content, wait)})
            interrupt.check()
    keep(job=state["job"] or jobs.begin(client, state["training_file"], plan.model.id, _request(plan, state)))
    begun = state["job"]
    id = begun["id"]
    listener.stage(f"following {id}")
    seen, step = [entry["id"] for entry in run.read_log() if "id" in entry], [0]

    def on_event(event: Mapping[str, Any]) -> None:
        data: dict[str, Any] = event.get("data") or {}
        step[0] = max(step[0], int(data.get("step") or 0))
        kind = "step" if event.get("type") == "metrics" else "event"
        told = {"loss": data.get("train_loss"), "valid_loss": data.get("full_valid_loss", data.get("valid_loss"))}
        values = {"id": event["id"], "level": event["level"], "text": event["message"], "at": event["created_at"]}
        run.append_log(step[0], kind, values | ({k: v for k, v in told.items() if v is not None} if data else {}))
        listener.event(Event("metrics" if kind == "step" else "note", step[0], {"text": event["message"]}))

    try:
        job = jobs.follow(client, id, seen, on_event, wait)
    except Interrupted as stop:
        raise Interrupted(
            f"{stop} The job {id} goes on at {client.service.name}. Try `tunefork train {run.path} --resume` to follow "
            f"it again, or `tunefork hosted cancel {run.path}`."
        ) from None
    keep(job=job)
    if job["status"] != "succeeded":
        error: dict[str, Any] = job.get("error") or {}
        why = str(error.get("message") or "no reason was given").strip().rstrip(".")
        raise HostedError(
            f"The job {id} must succeed. Received {job['status']}: {why}. Try a new run once that is mended.",
            code=error.get("code"),
        )
    if "checkpoints" not in state:
        keep(checkpoints=jobs.checkpoints(client, id))
    return job


def _request(plan: HostedPlan, state: Mapping[str, Any]) -> dict[str, Any]:
    train, hosted = plan.recipe.train, plan.recipe.hosted
    chosen: dict[str, Any] = {
        "n_epochs": None if train.epochs == "auto" else int(train.epochs),
        "batch_size": None if train.batch_size == "auto" else train.batch_size,
        "learning_rate_multiplier": hosted.learning_rate_multiplier,
    }
    kind = "dpo" if plan.task.objective == "preference" else "supervised"
    chosen |= {"beta": plan.task.beta} if kind == "dpo" else {}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    request: dict[str, Any] = {"seed": plan.recipe.seed, "suffix": hosted.suffix}
    request |= {"validation_file": state.get("validation_file")}
    if plan.model.service.flat:
        request["hyperparameters"] = chosen
    else:
        request["method"] = {"type": kind, kind: {"hyperparameters": chosen}}
    return overlay({key: value for key, value in request.items() if value is not None}, hosted.job)


def _result_file(run: RunFolder, client: Client, id: str) -> list[dict[str, float]]:
    content = jobs.read_result_file(client, id)
    if content is None:
        return []
    make_folder(run.path / "result_files")
    write_atomic(run.path / "result_files" / f"{id}.csv", content)
    return jobs.metrics_by_step(content)


def _baselines(plan: HostedPlan, client: Client) -> dict[str, BaselineResult]:
    """Those without a model here, those of the untrained model there, in the order asked for."""
    recipe, examples = plan.recipe, plan.examples
    plain = [name for name in plan.baselines if name not in ASKED]
    splits = {name: examples[name] for name in SPLITS}
    found = run_plain_baselines(plain, plan.task, **splits, section=recipe.evaluate, seed=recipe.seed)
    if len(plain) == len(plan.baselines):
        return found
    with asking_hosted(plan.model, plan.task, recipe.hosted, client) as asking:
        for name in (name for name in plan.baselines if name in ASKED):
            started = time.perf_counter()
            asked, stops = questions_of(plan.task, recipe, examples, name)
            predictions, notes = asking.predict(asked, stops=stops)
            figures = measure(plan.task, predictions, recipe.evaluate, recipe.seed)
            seconds = time.perf_counter() - started
            found[name] = BaselineResult(predictions, figures, seconds, (*notes, asking.cost()))
    return {name: found[name] for name in plan.baselines}


def _about(
    plan: HostedPlan,
    job: Mapping[str, Any],
    tuned: str | None,
    client: Client,
    table: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """What result.json says of a hosted run beside its figures."""
    import openai

    chosen = _hyperparameters(job)
    epochs, batch = chosen.get("n_epochs"), chosen.get("batch_size")
    known: dict[str, Any] = {"epochs": float(epochs)} if isinstance(epochs, int) else {}
    known |= {"batch_size": batch} if isinstance(batch, int) else {}
    train = plan.recipe.train.model_copy(update=known)
    kind = plan.recipe.model.model_copy(update={"kind": "causal"})
    recipe = plan.recipe.model_copy(update={"train": train, "model": kind})
    trained, price = job.get("trained_tokens"), find_price(plan.model, plan.recipe.hosted.prices)
    rate = None if price is None else price.train
    cost = None if rate is None or trained is None else trained * rate / 1e6
    steps = int(max((line.get("step", 0) for line in table), default=0))
    unknown = {"kind": "causal", "parameters": None, "fingerprint": ""}
    return {
        "recipe": recipe.model_dump(mode="json"),
        "reasons": [
            asdict(Reason(f"train.{k}", v, f"{client.service.name} chose it"))
            for k, v in known.items()
            if getattr(plan.recipe.train, k) == "auto"
        ],
        "data": {"counts": plan.counts(), "origin": dict(plan.origin), "findings": [asdict(f) for f in plan.findings]},
        "model": {"name": plan.model.name, "architecture": f"hosted by {client.service.name}", **unknown},
        "rendering": {"form": plan.task.form, "wording": dict(plan.task.wording), "system": plan.recipe.hosted.system},
        "steps": steps,
        "forwards": len(plan.lines["train"]) * (epochs if isinstance(epochs, int) else 0),
        "peak_memory_bytes": {"kind": "not on this machine", "value": None, "forecast": None},
        "train": {"stopped_early": False, "weights_from_step": steps, "looks": _looks(table), "notes": []},
        "metric": plan.task.metric,
        "labels": list(plan.task.labels),
        "environment": {"device": client.service.name, "openai": openai.__version__, "python": sys.version.split()[0]},
        "hosted": {
            "base_url": client.service.base_url,
            "base": plan.model.id,
            "model": tuned,
            "job": job["id"],
            "hyperparameters": chosen,
            "trained_tokens": trained,
            "training_cost": cost,
            "prices": None if price is None else {"date": price.date, "source": price.source},
        },
    }


def _hyperparameters(job: Mapping[str, Any]) -> dict[str, Any]:
    method: dict[str, Any] = job.get("method") or {}
    inside: dict[str, Any] = method.get(str(method.get("type"))) or {}
    return dict(inside.get("hyperparameters") or job.get("hyperparameters") or {})


def _looks(table: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Losses on the validation file, as a run of one's own tells them."""
    looks: list[dict[str, Any]] = []
    for line in table:
        if (loss := line.get("valid_loss")) is not None:
            better = all(loss < look["value"] for look in looks)
            figures = {"metric": "loss", "value": loss, "metrics": {"loss": loss}}
            looks.append({"step": int(line["step"]), "better": better, **figures})
    return looks


def _seconds(job: Mapping[str, Any]) -> float:
    return float((job.get("finished_at") or job["created_at"]) - job["created_at"])


def _refuse_second_job(out: Path) -> None:
    state = read_state(out)
    job: dict[str, Any] = {} if state is None else state["job"] or {}
    if state is not None and job.get("status") not in ("failed", "cancelled"):
        raise RunError(
            f"{out} has a job at a service already, or may have. Received no --resume. Try --resume, or another --out."
        )
