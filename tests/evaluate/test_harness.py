"""Predictions: the shared prefix is exact, and neither batching nor order changes what is predicted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from tests.evaluate.scenes import REVIEWS, Scene, choices, reviews, rows, scene
from tests.tiny import CAUSAL, KINDS
from tunefork.errors import DataError, Interrupted
from tunefork.evaluate import batching
from tunefork.evaluate.batching import pack
from tunefork.evaluate.harness import look_metrics, mean_loss, predict_examples
from tunefork.evaluate.prefix import can_share_prefix
from tunefork.recipe.schema import TaskSection
from tunefork.tasks import row_losses, row_scores

Tiny = Callable[[str], Path]
CLASSIFY = TaskSection(name="classification")


def whole_sequences(s: Scene) -> list[list[float]]:
    """Probabilities from one forward pass over each row's whole sequences, with nothing shared."""
    found = []
    with torch.inference_mode():
        for example in s.examples:
            found.append(row_scores(s.model, s.renderer.batch(s.renderer.render(example)))[0].exp().tolist())
    return found


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_shared_prefix_scores_as_whole_sequences_do(tiny: Tiny, kind: str) -> None:
    s = scene(tiny(kind), kind, TaskSection(name="choice"), choices())
    assert can_share_prefix(s.model)
    assert all(s.renderer.render(e)[0].fanned_out for e in s.examples)
    for budget in (64, 150, 4096):
        predictions = predict_examples(s.model, s.asking(budget), s.examples)
        for prediction, expected in zip(predictions, whole_sequences(s), strict=True):
            assert prediction.probabilities == pytest.approx(expected, abs=1e-5)
            assert prediction.index == int(np.argmax(expected))


def test_a_prefix_longer_than_the_sliding_window_is_shared_rightly(tiny: Tiny) -> None:
    long = [replace(r, values={**r.values, "question": "The delivery was fast. " * 30}) for r in choices()]
    s = scene(tiny("gemma"), "gemma", TaskSection(name="choice"), long, max_length=250)
    assert len(s.renderer.render(s.examples[0])[0].ids) > s.model.config.sliding_window  # type: ignore[union-attr,operator]
    predictions = predict_examples(s.model, s.asking(), s.examples)
    for prediction, expected in zip(predictions, whole_sequences(s), strict=True):
        assert prediction.probabilities == pytest.approx(expected, abs=1e-5)


def test_sharing_a_prefix_forwards_fewer_tokens(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", TaskSection(name="choice"), choices())
    seen: list[int] = []
    hook = s.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _module, inputs, _output: seen.append(inputs[0].numel())
    )
    predict_examples(s.model, s.asking(64), s.examples)
    shared, _ = sum(seen), seen.clear()
    whole_sequences(s)
    hook.remove()
    assert shared < 0.8 * sum(seen)


def test_models_that_cannot_share_a_prefix_are_known_beforehand(tiny: Tiny) -> None:
    masked = scene(tiny("bert"), "bert", CLASSIFY, reviews())
    assert not can_share_prefix(masked.model)
    s = scene(tiny("llama"), "llama", TaskSection(name="choice"), choices())
    lora = get_peft_model(s.model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))  # type: ignore[arg-type]
    assert can_share_prefix(lora)


def test_prefix_tuning_falls_back_to_whole_sequences(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", TaskSection(name="choice"), choices())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = get_peft_model(s.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))  # type: ignore[arg-type]
    wrapped.eval()
    assert not can_share_prefix(wrapped)
    s = replace(s, model=wrapped)
    predictions = predict_examples(wrapped, s.asking(), s.examples)
    for prediction, expected in zip(predictions, whole_sequences(s), strict=True):
        assert prediction.probabilities == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["verbalizer", "head"])
def test_order_and_batches_do_not_change_predictions(tiny: Tiny, kind: str, form: str) -> None:
    s = scene(tiny(kind), kind, TaskSection(name="classification", form=form), reviews())  # type: ignore[arg-type]
    if form == "head" and s.model.config.pad_token_id is None:  # type: ignore[union-attr]
        s.model.config.pad_token_id = s.renderer.pad  # type: ignore[union-attr]
    straight = predict_examples(s.model, s.asking(4096), s.examples)
    backwards = predict_examples(s.model, s.asking(64), s.examples[::-1])
    assert [p.source for p in straight] == [e.source for e in s.examples]
    for one, other in zip(straight, backwards[::-1], strict=True):
        assert (one.source, one.predicted, one.gold) == (other.source, other.predicted, other.gold)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert sum(one.probabilities) == pytest.approx(1)
        assert one.predicted in ("good", "bad")


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_a_pass_of_a_large_vocabulary_has_few_logits(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = scene(tiny(kind), kind, CLASSIFY, reviews())
    words = s.model.config.vocab_size  # type: ignore[union-attr]
    sizes: list[int] = []
    hook = s.model.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.logits.numel()))
    usual = predict_examples(s.model, s.asking(4096), s.examples)
    passes = len(sizes)
    monkeypatch.setattr(batching, "LOGITS", {"cpu": words * 50})
    fewer = predict_examples(s.model, s.asking(4096), s.examples)
    hook.remove()
    assert max(sizes[passes:]) <= words * 50
    assert (len(sizes) > 2 * passes) == (kind == "roberta")  # a decoder computes those at one place of a row alone
    for one, other in zip(usual, fewer, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_rendering_beforehand_changes_nothing(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    rendered = [r for e in reversed(s.examples) for r in s.renderer.render(e)]
    again = predict_examples(s.model, s.asking(), s.examples, rendered=rendered)
    assert again == predict_examples(s.model, s.asking(), s.examples)


def test_a_row_without_a_label_is_predicted(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    bare = replace(s.examples[0], gold=None)
    labelled, unlabelled = predict_examples(s.model, s.asking(), [s.examples[0], bare])
    assert unlabelled.gold is None and unlabelled.gold_index is None
    assert unlabelled.predicted == labelled.predicted


def test_text_has_the_loss_of_the_right_answer(tiny: Tiny) -> None:
    section = TaskSection(name="generation", metric="loss")
    pairs = [{"prompt": "Say it", "answer": "It was great"}, {"prompt": "The capital of France", "answer": "Paris."}]
    s = scene(tiny("gpt2"), "gpt2", section, rows(pairs))
    predictions = predict_examples(s.model, s.asking(), s.examples, generated=False)
    for prediction, example in zip(predictions, s.examples, strict=True):
        batch = s.renderer.batch(s.renderer.render(example), learn=True)
        with torch.inference_mode():
            expected = row_losses(s.model, batch).item() / batch.weights.item()
        assert prediction.loss == pytest.approx(expected, rel=1e-5)
        assert prediction.predicted == "" and prediction.stopped is None


def test_the_mean_loss_weighs_by_token(tiny: Tiny) -> None:
    pairs = [{"prompt": "Say", "answer": "no"}, {"prompt": "Say", "answer": "It was great! Truly wonderful service"}]
    s = scene(tiny("llama"), "llama", TaskSection(name="generation"), rows(pairs))
    rendered = [r for e in s.examples for r in s.renderer.render(e)]
    losses, weights = [], []
    for r in rendered:
        batch = s.renderer.batch([r], learn=True)
        with torch.inference_mode():
            losses.append(row_losses(s.model, batch).item())
        weights.append(batch.weights.item())
    assert weights[0] != weights[1]
    found = mean_loss(s.model, s.asking(), rendered)
    assert found == pytest.approx(sum(losses) / sum(weights), rel=1e-5)


def test_a_look_at_labels_gives_the_tasks_metrics(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    rendered = [r for e in s.examples for r in s.renderer.render(e)]
    metric, value, higher, values = look_metrics(s.model, s.asking(), s.examples, rendered)
    predictions = predict_examples(s.model, s.asking(), s.examples)
    right = sum(p.predicted == label for p, (_, label) in zip(predictions, REVIEWS, strict=True))
    assert (metric, higher) == ("accuracy", True)
    assert value == values["accuracy"] == right / len(REVIEWS)


def test_a_look_at_text_is_its_loss_and_generates_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    s = scene(tiny("llama"), "llama", TaskSection(name="generation"), rows([{"prompt": "Say", "answer": "no"}]))
    monkeypatch.setattr(type(s.model), "generate", None)
    rendered = [r for e in s.examples for r in s.renderer.render(e)]
    metric, value, higher, values = look_metrics(s.model, s.asking(), s.examples, rendered)
    assert (metric, higher) == ("loss", False)
    batch = s.renderer.batch(rendered, learn=True)
    likeliest = s.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(-1)
    assert batch.targets is not None
    learned = batch.targets != -100
    assert values["token_accuracy"] == (likeliest == batch.targets)[learned].float().mean().item()
    assert 0 < value < 2 * math.log(len(s.renderer.tokenizer))


def test_a_look_without_known_answers_is_refused(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    bare = [replace(e, gold=None) for e in s.examples]
    with pytest.raises(DataError, match="known answer"):
        look_metrics(s.model, s.asking(), bare, [r for e in bare for r in s.renderer.render(e)])


def test_an_interrupt_between_batches_comes_through_and_restores_the_mode(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    s.model.train()
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interrupted("Stopped.")

    with pytest.raises(Interrupted):
        predict_examples(s.model, s.asking(64, check=check), s.examples)
    assert calls == 2
    assert s.model.training


def test_the_random_state_is_left_alone(tiny: Tiny) -> None:
    s = scene(
        tiny("llama"),
        "llama",
        TaskSection(name="generation", max_new_tokens=4),
        rows([{"prompt": "Say", "answer": "no"}]),
    )
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    predict_examples(s.model, s.asking(), s.examples, generated=True)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 5)), max_size=40), st.integers(64, 400))
def test_batches_hold_every_row_once_within_the_budget(rows: list[tuple[int, int]], budget: int) -> None:
    lengths, fans = [length for length, _ in rows], [fan for _, fan in rows]
    groups = pack(lengths, budget, fans)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        padded = max(lengths[i] for i in group) * sum(fans[i] for i in group)
        assert padded <= budget or len(group) == 1
