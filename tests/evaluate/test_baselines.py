"""Baselines learn from train alone, on the same rows, the same way every time; what does not fit is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluate.scenes import Scene, choices, reviews, rows, scene
from tunefork.errors import UnsupportedError
from tunefork.evaluate.baselines import (
    BaselineResult,
    check_baselines,
    fitting_baselines,
    list_baselines,
    run_baselines,
)
from tunefork.evaluate.demonstrations import choose_demonstrations
from tunefork.evaluate.harness import predict_examples
from tunefork.metrics import lead_n
from tunefork.recipe.schema import BaselineName, EvaluateSection, TaskSection
from tunefork.tasks import Example

Tiny = Callable[[str], Path]
CLASSIFY = TaskSection(name="classification")
SECTION = EvaluateSection(bootstrap=100, demonstrations=4)

THINGS = ("screen", "film", "service", "box", "report", "delivery", "answer", "start", "door", "result")
WORDS = {"good": ("great", "wonderful", "fast"), "bad": ("terrible", "bad", "broke")}


def toy(file: str, seed: int, count: int, share: float = 0.5) -> list[Any]:
    """Rows whose label follows from one word, `share` of them bad."""
    generator = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        label = "bad" if i < share * count else "good"
        word, thing = generator.choice(WORDS[label]), generator.choice(THINGS)
        pairs.append((f"The {thing} {i} was {word}.", label))
    return reviews([pairs[i] for i in generator.permutation(count)], file)


def run(s: Scene, names: Sequence[str], tokens_per_batch: int = 512, **more: Any) -> dict[str, BaselineResult]:
    how: dict[str, Any] = {
        "train": s.examples,
        "dev": [],
        "test": s.examples,
        "model_provider": lambda: s.model,
        "section": SECTION,
        "seed": 0,
    }
    return run_baselines(names, s.asking(tokens_per_batch), **(how | more))


def separable(tiny: Tiny, kind: str = "llama") -> tuple[Scene, list[Example], list[Example]]:
    """A scene with training rows (two in three bad), and dev and test rows."""
    s = scene(tiny(kind), kind, CLASSIFY, toy("train.csv", 0, 120, 2 / 3))
    dev = [s.task.example(row) for row in toy("dev.csv", 1, 20)]
    test = [s.task.example(row) for row in toy("test.csv", 2, 40)]
    return s, dev, test


def loud(examples: Sequence[Example]) -> list[Example]:
    """The telling word said three times more: a tiny random model hears badly."""
    return [replace(e, text=f"{e.text.split()[-1]} " * 3 + e.text) for e in examples]


def no_model() -> torch.nn.Module:
    raise AssertionError("this baseline needs no model")


@pytest.mark.parametrize("with_dev", [True, False])
def test_tfidf_learns_what_majority_cannot(tiny: Tiny, with_dev: bool) -> None:
    s, dev, test = separable(tiny)
    found = run(s, ["majority", "tfidf"], dev=dev if with_dev else [], test=test, model_provider=no_model)
    assert found["majority"].metrics["accuracy"]["value"] == 0.5
    assert found["tfidf"].metrics["accuracy"]["value"] >= 0.95
    assert ("on dev" in found["tfidf"].notes[0]) == with_dev
    assert [p.source for p in found["tfidf"].predictions] == [e.source for e in test]
    assert all(sum(p.probabilities) == pytest.approx(1) for p in found["tfidf"].predictions)


def test_majority_says_what_train_says_most(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    (result,) = run(s, ["majority"], test=test).values()
    assert {p.predicted for p in result.predictions} == {"bad"}
    assert result.predictions[0].probabilities == pytest.approx((2 / 3, 1 / 3))
    assert "66.7%" in result.notes[0]


def test_majority_of_a_choice_is_the_most_frequent_place_a_row_has(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", TaskSection(name="choice"), choices())
    train = [replace(s.examples[1], gold=2, golds=(2,))] * 3 + [replace(s.examples[1], gold=1, golds=(1,))] * 2
    (result,) = run(s, ["majority"], train=train).values()
    expected = [2 if len(e.candidates) == 3 else 1 for e in s.examples]
    assert [p.index for p in result.predictions] == expected


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_probe_reads_frozen_features(tiny: Tiny, kind: str) -> None:
    s, dev, test = separable(tiny, kind)
    dev, test, s = loud(dev), loud(test), replace(s, examples=loud(s.examples))
    before = {name: p.clone() for name, p in s.model.named_parameters()}
    found = run(s, ["majority", "probe"], dev=dev, test=test)
    assert found["probe"].metrics["accuracy"]["value"] >= 0.8 > found["majority"].metrics["accuracy"]["value"]
    assert all(torch.equal(before[name], p) for name, p in s.model.named_parameters())
    one_by_one = run(s, ["probe"], dev=dev, test=test, tokens_per_batch=64)["probe"]
    for a, b in zip(found["probe"].predictions, one_by_one.predictions, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-3)


def test_test_labels_change_no_prediction(tiny: Tiny) -> None:
    s, dev, test = separable(tiny)
    names = ["majority", "tfidf", "zero_shot", "in_context", "probe"]
    swapped = [replace(e, gold=1 - (e.gold or 0)) for e in test]
    found, other = run(s, names, dev=dev, test=test), run(s, names, dev=dev, test=swapped)
    for name in names:
        said = [(p.predicted, p.probabilities) for p in found[name].predictions]
        assert said == [(p.predicted, p.probabilities) for p in other[name].predictions]


def test_the_same_seed_gives_the_same_and_the_global_state_is_left_alone(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    names = list(fitting_baselines(s.task))
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = run(s, names, test=test, seed=3), run(s, names, test=test, seed=3)
    for name in names:
        assert first[name].predictions == second[name].predictions
        assert (first[name].metrics, first[name].notes) == (second[name].metrics, second[name].notes)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


def test_zero_shot_is_the_untrained_model_and_is_loaded_once(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    loads: list[int] = []

    def provide() -> torch.nn.Module:
        loads.append(1)
        return s.model

    found = run(s, ["majority", "zero_shot", "in_context"], test=test, model_provider=provide)
    assert len(loads) == 1
    asked = predict_examples(s.model, s.asking(512), test)
    assert found["zero_shot"].predictions == asked
    assert found["in_context"].predictions != asked


def texts_seen(
    s: Scene, test: Sequence[Example], section: EvaluateSection = SECTION
) -> tuple[list[str], BaselineResult]:
    """What in_context showed the model, row by row, decoded from the ids it was given."""
    seen: list[str] = []
    tokenizer = s.renderer.tokenizer

    def look(_module: torch.nn.Module, _args: Any, kwargs: Any) -> None:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))

    hook = s.model.register_forward_pre_hook(look, with_kwargs=True)
    (result,) = run(s, ["in_context"], test=test, section=section, tokens_per_batch=64).values()
    hook.remove()
    return seen, result


def test_in_context_shows_exactly_the_demonstrations(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    shown = choose_demonstrations(s.task, s.examples, test, 4, 0)
    wording = "\n\n".join(e.prompt + e.candidates[e.gold or 0] for e in shown)
    seen, result = texts_seen(s, test[:5])
    assert sorted(seen) == sorted(f"{wording}\n\n{e.prompt}" for e in test[:5])
    assert all(e.source in result.notes[0] for e in shown)


def test_demonstrations_take_turns_over_labels_and_never_give_a_row_away(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    leaked = [*s.examples[:30], *(replace(e, source="train.csv:99", text=e.text.upper()) for e in test)]
    for seed in range(8):
        shown = choose_demonstrations(s.task, leaked, test, 6, seed)
        assert Counter(e.gold for e in shown) == {0: 3, 1: 3}
        assert len({e.source for e in shown}) == 6
        odd = Counter(e.gold for e in choose_demonstrations(s.task, leaked, test, 5, seed))
        assert sorted(odd.values()) == [2, 3]
        assert not {e.text.casefold() for e in shown} & {e.text.casefold() for e in test}
    orders = {tuple(e.source for e in choose_demonstrations(s.task, leaked, test, 6, seed)) for seed in range(8)}
    assert len(orders) > 1


def test_demonstrations_that_do_not_fit_are_dropped_from_the_left_and_counted(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    longest = max(len(s.renderer.render(e)[0].ids) for e in test[:3])
    short = replace(s, renderer=type(s.renderer)(s.renderer.tokenizer, "causal", s.task, 2 * longest + 12, False))
    shown = choose_demonstrations(s.task, s.examples, test[:3], 4, 0)
    seen, result = texts_seen(short, test[:3])
    full = [e.prompt + e.candidates[e.gold or 0] for e in shown]
    dropped = 0
    for text in seen:
        kept = text.split("\n\n")[:-1]
        assert 0 < len(kept) < 4
        assert kept == full[len(full) - len(kept) :]
        dropped += 4 - len(kept)
    assert f"{dropped} did not fit, in 3 of 3 rows" in " ".join(result.notes)


def test_too_few_training_rows_are_said(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    (result,) = run(s, ["in_context"], train=s.examples[:2], test=test[:2]).values()
    assert "2 demonstrations" in result.notes[0] and "4 were asked for" in result.notes[1]


def test_a_masked_models_demonstrations_hold_the_answer_in_the_masks_place(tiny: Tiny) -> None:
    s, _, test = separable(tiny, "bert")
    seen, _ = texts_seen(s, test[:2], EvaluateSection(bootstrap=100, demonstrations=2))
    for text in seen:
        assert "answer : good." in text.replace(" .", ".") and "answer : bad." in text.replace(" .", ".")
        assert text.replace(" .", ".").count("answer :") == 3


def test_in_context_text_stops_at_its_own_separator(tiny: Tiny) -> None:
    section = TaskSection(name="generation", max_new_tokens=6, metric="f1")
    given = rows([{"prompt": f"Say {word}", "answer": word} for word in ("great", "good", "bad", "Paris", "noon")])
    s = scene(tiny("llama"), "llama", section, given)
    (result,) = run(s, ["in_context"], train=s.examples[:3], test=s.examples[3:]).values()
    assert len(result.predictions) == 2
    assert all("\n\n" not in p.predicted and p.loss is not None for p in result.predictions)


def test_lead3_is_the_first_three_sentences(tiny: Tiny) -> None:
    document = "Anna came at noon. Tom was late. They met. Then they left. It was great."
    given = rows([{"prompt": document, "answer": "Anna and Tom met."}])
    s = scene(tiny("llama"), "llama", TaskSection(name="generation", metric="rougeL"), given)
    (result,) = run(s, ["lead3"], model_provider=no_model).values()
    assert result.predictions[0].predicted == lead_n(document, 3) == "Anna came at noon. Tom was late. They met."
    assert "loss" not in result.metrics and 0 < result.metrics["rougeL"]["value"] < 1


def test_a_single_label_in_train_is_said_always(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    (result,) = run(s, ["tfidf"], train=[e for e in s.examples if e.gold == 0], test=test).values()
    assert {p.index for p in result.predictions} == {0}
    assert "same label" in result.notes[0]


def test_texts_without_words_fall_back_to_the_majority(tiny: Tiny) -> None:
    s, _, test = separable(tiny)
    (result,) = run(s, ["tfidf"], train=[replace(e, text="!?") for e in s.examples], test=test).values()
    assert {p.predicted for p in result.predictions} == {"bad"}
    assert "No words" in result.notes[0]


@pytest.mark.parametrize(
    ("name", "task"),
    [("tfidf", "choice"), ("probe", "generation"), ("lead3", "classification"), ("majority", "generation")],
)
def test_what_does_not_fit_is_refused_by_name(tiny: Tiny, name: str, task: str) -> None:
    given = {"choice": choices(), "classification": reviews()}.get(task, rows([{"prompt": "Say", "answer": "no"}]))
    s = scene(tiny("llama"), "llama", TaskSection(name=task), given)
    assert name not in fitting_baselines(s.task)
    with pytest.raises(UnsupportedError, match=f"`{name}`"):
        run(s, [name], model_provider=no_model)


def test_lead3_is_only_for_tasks_measured_by_rouge(tiny: Tiny) -> None:
    given = rows([{"question": "What?", "context": "Paris.", "answers": ["Paris"], "title": "", "id": "1"}])
    s = scene(tiny("llama"), "llama", TaskSection(name="squad"), given)
    with pytest.raises(UnsupportedError, match="rouge"):
        check_baselines(["lead3"], s.task)


def test_an_unknown_name_is_refused_with_a_hint(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    with pytest.raises(UnsupportedError, match="Did you mean `majority`"):
        check_baselines(["majorty"], s.task)


def test_the_registry_is_what_a_recipe_may_name() -> None:
    assert {info.name for info in list_baselines()} == set(BaselineName.__args__)  # type: ignore[attr-defined]


def test_no_test_rows_no_results(tiny: Tiny) -> None:
    s = scene(tiny("llama"), "llama", CLASSIFY, reviews())
    assert run(s, ["majority", "zero_shot"], test=[], model_provider=no_model) == {}
