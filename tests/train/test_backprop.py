"""Back-propagation: the full batch's gradient however it is cut, and Hugging Face Trainer's loss curve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from tunefork.batch import Batch
from tunefork.errors import TrainingError
from tunefork.methods.backprop import Backprop
from tunefork.recipe import DataSection, TaskSection, TrainSection
from tunefork.recipe.schema import Recipe
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, make_task, row_losses
from tunefork.train.sampler import Sampler, micro_batches
from tunefork.train.schedule import learning_rate

TEXTS = [
    ("The delivery was", " fast and the box arrived in one piece."),
    ("I would not buy", " this again."),
    ("It was great!", " Truly wonderful service, thank you. It was great, it was great."),
    ("Yes", " no"),
    ("Anna and Tom will meet", " at noon to talk about the report."),
    ("So what happened", " as a result? He could not open the door because he lost his keys."),
    ("Hello", ", how can I help you today?"),
    ("The screen broke", " after two days."),
]


def options(**changes: Any) -> TrainSection:
    return TrainSection.model_validate({"learning_rate": 1e-3, **changes})


def model_and_renderer(folder: Path) -> tuple[Any, Renderer]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    task = make_task(TaskSection(name="generation"), DataSection(), "causal", ())
    return model, Renderer(AutoTokenizer.from_pretrained(folder), "causal", task, 256, False)


def rendered(renderer: Renderer) -> list[Rendered]:
    return [renderer.render(Example(f"t:{i}", prompt=p, answer=a))[0] for i, (p, a) in enumerate(TEXTS)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 7), min_size=8, max_size=8))
def test_accumulated_gradient_is_the_full_batch_gradient(tiny: Callable[[str], Path], cuts: list[int]) -> None:
    model, renderer = model_and_renderer(tiny("llama"))
    rows = rendered(renderer)
    groups = [[r for r, c in zip(rows, cuts, strict=True) if c == k] for k in sorted(set(cuts))]

    def gradient(batches: list[Batch]) -> torch.Tensor:
        """From momentum-free first moments: with beta 0 the first moment is the gradient itself."""
        method = Backprop(model, options(betas=(0.0, 0.999), max_grad_norm=None), autocast=None)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        method.step(batches, row_losses, 0.0)
        model.load_state_dict(before)
        state = method.state()
        return torch.cat([state[k].flatten() for k in sorted(state) if k.startswith("exp_avg/")])

    whole = gradient([renderer.batch(rows, learn=True)])
    parts = gradient([renderer.batch(group, learn=True) for group in groups])
    assert (whole - parts).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_curve_is_that_of_hugging_face_trainer(
    tiny: Callable[[str], Path], tmp_path: Path, kind: str, schedule: str
) -> None:
    """50 steps, same model, rows, order and settings: losses equal to 1e-5 relative."""
    steps, size = 50, 3
    model, renderer = model_and_renderer(tiny(kind))
    model.eval()  # GPT-2's dropout is switched off on both sides, as the two draw from different generators
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = rendered(renderer)
    sampler = Sampler(len(rows), size, 0)
    order = [sampler.step(step) for step in range(steps)]
    lengths = [len(r.ids) for r in rows]
    method = Backprop(model, options(weight_decay=0.1), autocast=None)
    ours = []
    for step, indices in enumerate(order):
        groups = micro_batches(indices, lengths, 2)
        batches = [renderer.batch([rows[i] for i in group], learn=True) for group in groups]
        rate = learning_rate(step, peak=1e-3, steps=steps, warmup=0.0, schedule=schedule)
        ours.append(method.step(batches, row_losses, rate).loss)

    theirs = trainer_losses(tiny(kind), tmp_path, renderer, rows, order, schedule)
    assert len(theirs) == steps
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < 0.8 * ours[0]


def trainer_losses(
    folder: Path, out: Path, renderer: Renderer, rows: list[Rendered], order: list[list[int]], schedule: str
) -> list[float]:
    """The same training by transformers' Trainer, one step an order entry."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def collate(items: list[list[int]]) -> dict[str, torch.Tensor]:
        chosen = [rows[i] for i in items[0]]
        batch = renderer.batch(chosen, learn=True)
        labels = torch.full_like(batch.input_ids, -100)
        for s, r in enumerate(chosen):
            for t, use in enumerate(r.trained):
                if use:
                    labels[s, t] = r.ids[t]
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}

    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=1,
        max_steps=len(order),
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type=schedule,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=order)  # type: ignore[arg-type]
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_state_round_trip_is_bitwise(tiny: Callable[[str], Path]) -> None:
    def run(stop_at: int | None) -> torch.Tensor:
        model, renderer = model_and_renderer(tiny("llama"))
        rows = rendered(renderer)
        method = Backprop(model, options(weight_decay=0.01), autocast=None)
        for step in range(6):
            if step == stop_at:
                weights, state = {k: v.clone() for k, v in model.state_dict().items()}, method.state()
                model, _ = model_and_renderer(tiny("llama"))
                model.load_state_dict(weights)
                method = Backprop(model, options(weight_decay=0.01), autocast=None)
                method.load_state(state)
            method.step([renderer.batch(rows, learn=True)], row_losses, 1e-3)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(None), run(3))


def test_biases_and_norms_are_not_decayed(tiny: Callable[[str], Path]) -> None:
    model, _ = model_and_renderer(tiny("gpt2"))
    method = Backprop(model, options(weight_decay=0.5), autocast=None)
    decayed, plain = method.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0
    assert len(plain["params"]) > 0


def test_fp16_overflow_halves_the_scale_and_skips_the_step(tiny: Callable[[str], Path]) -> None:
    model, renderer = model_and_renderer(tiny("llama"))
    method = Backprop(model, options(), autocast=torch.float16)
    method.scale = 2.0**40
    before = [p.detach().clone() for p in model.parameters()]
    method.step([renderer.batch(rendered(renderer), learn=True)], row_losses, 1e-3)
    assert method.scale == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_refused(tiny: Callable[[str], Path]) -> None:
    model, renderer = model_and_renderer(tiny("llama"))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    method = Backprop(model, options(), autocast=None)
    with pytest.raises(TrainingError, match="finite"):
        method.step([renderer.batch(rendered(renderer), learn=True)], row_losses, 1e-3)


def test_train_section_is_what_the_recipe_holds() -> None:
    assert isinstance(Recipe(task=TaskSection(name="sst2")).train, TrainSection)
