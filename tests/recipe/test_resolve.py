"""Every `auto` becomes a value with a reason, and what was given stays."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefork.errors import RecipeError
from tunefork.recipe import Recipe, all_paths, make_recipe, resolve
from tunefork.recipe.resolve import Situation, UsualBatch

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
    objective=st.sampled_from(["candidates", "answer"]),
    layout=st.sampled_from(["columns", "text", "openai"]),
    targets=st.just(lambda: ["q_proj", "v_proj"]),
    needs_backward=st.booleans(),
    usual_batch=st.sampled_from([UsualBatch(), UsualBatch(6, "few", "stratified", 16)]),
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
    assert {path for path, value in after.items() if value == "auto"} == set()
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
    now = replace(now, needs_backward=True)
    given_recipe = make_recipe(
        {"task": "sst2", "adapter": "dora", "train": {"learning_rate": 0.01, "batch_size": 3, "max_steps": 7}}
    )
    found = resolve(given_recipe, now).recipe
    assert (found.adapter.name, found.train.learning_rate, found.train.batch_size) == ("dora", 0.01, 3)
    assert resolve(given_recipe, now).steps <= 7


CAUSAL = Situation(
    model_kind="causal",
    parameters=10**6,
    max_positions=256,
    max_length=256,
    device="cpu",
    dtype="fp32",
    dtype_reason="d",
    kind_reason="k",
    form="verbalizer",
    objective="candidates",
    layout="columns",
    targets=lambda: ["q_proj", "v_proj"],
    train_rows=100,
    longest=30,
    sequences_per_row=1,
    has_dev=True,
    quantized=False,
    baselines=("majority",),
    checkpointing_needed=False,
)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"targets": ["nope"]}, "`adapter.targets`"),
        ({"name": "none", "rank": 4}, "`adapter.rank`"),
        ({"name": "head", "dropout": 0.1}, "`adapter.dropout`"),
        ({"name": "prefix", "alpha": 7}, "`adapter.alpha`"),
        ({"name": "lora", "prefix_tokens": 3}, "`adapter.prefix_tokens`"),
    ],
)
def test_what_the_adapter_does_not_read_is_refused(adapter: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        resolve(make_recipe({"task": "sst2", "adapter": adapter}), CAUSAL)


def test_a_head_start_needs_a_head() -> None:
    recipe = make_recipe({"task": "sst2", "train": {"head_start": "random"}})
    assert resolve(recipe, replace(CAUSAL, form="head")).recipe.train.head_start == "random"
    with pytest.raises(RecipeError, match="head_start"):
        resolve(recipe, CAUSAL)


def test_stratified_sampling_needs_a_right_candidate_a_row() -> None:
    usual = replace(CAUSAL, usual_batch=UsualBatch(6, "", "stratified", 16))
    text = {"form": "text"}
    assert resolve(make_recipe({"task": "sst2"}), usual).recipe.train.sampling == "stratified"
    assert resolve(make_recipe({"task": "sst2"}), CAUSAL).recipe.train.sampling == "shuffled"
    assert resolve(make_recipe({"task": "generation"}), replace(usual, **text)).recipe.train.sampling == "shuffled"
    asked = {"train": {"sampling": "stratified"}}
    assert resolve(make_recipe({"task": "sst2", **asked}), CAUSAL).recipe.train.sampling == "stratified"
    with pytest.raises(RecipeError, match=r"train\.sampling"):
        resolve(make_recipe({"task": "generation", **asked}), replace(CAUSAL, **text))


@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(600, 6, 1700), (600, 12, 850), (9_900, 6, 1667), (67_000, 6, 1667)]
)
def test_a_run_without_gradients_has_a_budget_of_row_forwards(rows: int, batch: int, steps: int) -> None:
    now = replace(CAUSAL, needs_backward=False, train_rows=rows, usual_batch=UsualBatch(6, "", "stratified", 16))
    found = resolve(make_recipe({"task": "sst2", "train": {"batch_size": batch}}), now)
    assert found.steps == pytest.approx(steps, rel=0.02)  # whole epochs, or less than one
    assert any("160,000 row-forwards" in reason.why for reason in found.reasons)


def test_a_null_rate_is_filled_for_back_propagation_and_stays_for_zo() -> None:
    asked = make_recipe({"task": "sst2", "train": {"learning_rate": None}})
    assert resolve(asked, CAUSAL).recipe.train.learning_rate
    assert resolve(asked, replace(CAUSAL, needs_backward=False)).recipe.train.learning_rate is None


def test_what_has_no_use_is_null_and_comes_back_with_another_adapter_or_task() -> None:
    kept = resolve(make_recipe({"task": "generation", "adapter": "none"}), replace(CAUSAL, form="text")).recipe
    assert (kept.task.form, kept.task.objective, kept.adapter.alpha, kept.adapter.targets) == (None,) * 4
    tree = kept.model_dump()
    again = make_recipe(
        {**tree, "task": {**tree["task"], "name": "sst2"}, "adapter": {**tree["adapter"], "name": "lora"}}
    )
    found = resolve(again, CAUSAL).recipe
    assert (found.task.form, found.task.objective) == ("verbalizer", "candidates")
    assert (found.adapter.alpha, found.adapter.targets) == (32, ("q_proj", "v_proj"))
