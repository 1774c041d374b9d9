"""Rows of jobs as the API shows them."""

from __future__ import annotations

from typing import Any

from tunefork.server.jobs.states import FINISHED, PAUSING, RUNNING
from tunefork.server.settings import Settings
from tunefork.server.store import Event, Job, Model, Permission


def show_job(row: Job, settings: Settings) -> dict[str, Any]:
    kind, chosen = row.method["type"], row.method["hyperparameters"]
    details = {**row.method.get("given", {}), "hyperparameters": chosen}
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "model": row.base,
        "fine_tuned_model": row.model_name if row.status == "succeeded" else None,
        "organization_id": f"org-{settings.organization}",
        "status": RUNNING if row.status == PAUSING else row.status,
        "training_file": row.training_file,
        "validation_file": row.validation_file,
        "result_files": [row.result_file] if row.result_file else [],
        "trained_tokens": row.trained_tokens if row.status in FINISHED else None,
        "seed": row.seed,
        "error": row.error,
        "hyperparameters": {k: chosen[k] for k in ("batch_size", "learning_rate_multiplier", "n_epochs")},
        "method": {"type": kind, kind: details},
        "integrations": row.integrations or [],
        "estimated_finish": row.estimated_finish if row.status == RUNNING else None,
        "metadata": row.meta,
        "user_provided_suffix": row.suffix,
        "usage_metrics": None,
        "shared_with_openai": False,
        "tunefork": {"requested_model": row.asked_model, "step": row.step, **(row.extension or {})},
    }


def show_event(row: Event) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "created_at": row.created_at,
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data or {},
    }


def show_checkpoint(row: Model) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": row.created_at,
        "fine_tuned_model_checkpoint": row.name,
        "step_number": row.step,
        "metrics": row.metrics or {},
        "fine_tuning_job_id": row.job_id,
    }


def show_permission(row: Permission) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "checkpoint.permission",
        "created_at": row.created_at,
        "project_id": row.project_id,
    }
