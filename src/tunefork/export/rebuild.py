"""From a base model and the trajectory of a zeroth-order run to the model that the run trained, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError

from tunefork.batch import Batch
from tunefork.errors import RunError
from tunefork.evaluate.trained import trained_task
from tunefork.methods import learns_beside
from tunefork.methods.zo import put_start, rebuild
from tunefork.models import choose_device, load_model, load_tokenizer, save_artefact, torch_dtype
from tunefork.models.artefact import base_facts
from tunefork.recipe import ModelSection, make_recipe
from tunefork.render import Renderer
from tunefork.zo import Reader


def rebuild_artefact(
    trajectory: Reader,
    folder: Path,
    *,
    base: str | None = None,
    step: int | None = None,
    learned: Mapping[str, torch.Tensor] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_begin: Callable[[], None] = lambda: None,
) -> None:
    """Writes the model after `step` steps of `trajectory` (None: all) into `folder`, as a run's `model` holds it.

    Args:
        base: where the model that was trained is now; None: where it was then.
        learned: a checkpoint's weights, of a step up to that one, from which the replay may go on.
        trust_remote_code: whether a base that brings its own code may run it: for the caller to say, not the file.
        on_begin: called once the base and its tokenizer are known to be the run's.

    Raises RunError for another base, tokenizer or step, and for a file that only the Python optimizer wrote;
    UnsupportedError for a base whose own code is not asked for.
    """
    about = trajectory.header.about
    if "recipe" not in about:
        raise RunError(
            f"A trajectory must say which run it is of. {trajectory.path} was written by the optimizer alone. "
            "Try `tunefork.zo.ZO.from_trajectory` in Python."
        )
    try:
        known, rendering, recipe = about["base"], about["rendering"], make_recipe(about["recipe"])
        facts = base_facts(known, None if base == known["name"] else base, trust_remote_code=trust_remote_code)
        _, task = trained_task(rendering, facts)
        tokenizer = load_tokenizer(facts)
        renderer = Renderer(tokenizer, facts.kind, task, rendering["max_length"], rendering["task"]["chat_template"])
        wanted, dtype = rendering["rendering"]["fingerprint"], rendering["dtype"]
        section = ModelSection.model_validate({"device": device, "dtype": dtype})
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise RunError(
            f"A trajectory must say how its run asked which model. {trajectory.path} does not, as of here: "
            f"{type(error).__name__} {error}. Try the file that Tunefork wrote."
        ) from error
    if renderer.describe()["fingerprint"] != wanted:
        raise RunError(
            f"A model must be asked with the tokenizer it was trained with. {facts.folder} has another. "
            "Try the original model's folder."
        )
    on_begin()
    place, _ = choose_device(section)
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    model = load_model(
        facts,
        form=task.form,
        labels=task.labels,
        adapter=recipe.adapter,
        device=place,
        dtype=torch_dtype(dtype),
        seed=recipe.seed,
        activation_checkpointing=False,
        prefix_examples=Batch(nothing, torch.ones_like(nothing), nothing[0], torch.ones(1)),  # the start replaces it
        frozen=recipe.adapter.name in learns_beside(recipe),
    )
    put_start(model, trajectory)
    save_artefact(rebuild(model, recipe, trajectory, step, learned), tokenizer, facts, folder, rendering)
