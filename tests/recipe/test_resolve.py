"""Every `auto` becomes a value with a reason, and what was given stays."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunefork.recipe import Recipe, all_paths, make_recipe, resolve
from tunefork.recipe.resolve import Situation

SITUATIONS: Any = st.builds(
    Situation,
    model_kind=st.sampled_from(["causal", "masked", "encoder"]),
    parameters=st.integers(10_000, 10**11),
    max_positions=st.integers(8, 100_000),
    max_length=st.just(8),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
    dtype=st.sampled_from(["fp32", "bf16", "fp16"]),
    dtype_reason=st.just("d"),
    kind_reason=st.just("k"),
    form=st.sampled_from(["verbalizer", "choice", "head", "text", "chat"]),
    train_rows=st.integers(1, 10**6),
    longest=st.integers(1, 10_000),
    sequences_per_row=st.integers(1, 80),
    has_dev=st.booleans(),
    quantized=st.booleans(),
    baselines=st.sampled_from([(), ("majority",), ("zero_shot", "lead3")]),
    checkpointing_needed=st.booleans(),
)


def values(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump()
    found = {}
    for path, _ in all_paths():
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        found[path] = value
    return found


@given(SITUATIONS)
def test_nothing_stays_automatic_and_every_choice_has_a_reason(now: Situation) -> None:
    asked = make_recipe({"task": "sst2"})
    found = resolve(asked, now)
    before, after = values(asked), values(found.recipe)
    allowed = {"task.form", "task.objective", "data.layout", "adapter.targets"}  # resolved by task, data and adapter
    assert {path for path, value in after.items() if value == "auto"} <= allowed
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {reason.path for reason in found.reasons}
    assert all(reason.why for reason in found.reasons)
    assert found.steps >= 1
    assert after["train.micro_batch_size"] <= after["train.batch_size"]


@given(SITUATIONS)
def test_resolving_again_changes_nothing(now: Situation) -> None:
    once = resolve(make_recipe({"task": "sst2"}), now)
    again = resolve(once.recipe, now)
    assert again.recipe == once.recipe
    assert again.steps == once.steps
    assert again.reasons == ()


@given(SITUATIONS)
def test_what_was_given_stays(now: Situation) -> None:
    given_recipe = make_recipe(
        {"task": "sst2", "adapter": "dora", "train": {"learning_rate": 0.01, "batch_size": 3, "max_steps": 7}}
    )
    found = resolve(given_recipe, now).recipe
    assert (found.adapter.name, found.train.learning_rate, found.train.batch_size) == ("dora", 0.01, 3)
    assert resolve(given_recipe, now).steps <= 7
