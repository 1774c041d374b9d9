"""Greedy answers end where they should, alone or in company."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evaluate.scenes import CPU, Scene, reviews, rows, scene
from tests.tiny import CAUSAL
from tunefork.errors import Interrupted, UnsupportedError
from tunefork.evaluate.generate import generate
from tunefork.evaluate.harness import predict_examples
from tunefork.evaluate.summary import measure
from tunefork.recipe.schema import EvaluateSection, TaskSection
from tunefork.tasks import Message

Tiny = Callable[[str], Path]

PROMPTS = (
    "The delivery was fast and the box",
    "Question: What is",
    "It was",
    "Because the man lost his keys, he could not open the door. So what happened as a result? Anna and Tom",
)


def asked(tiny: Tiny, kind: str = "llama", new: int = 12) -> Scene:
    section = TaskSection(name="generation", max_new_tokens=new)
    return scene(tiny(kind), kind, section, rows([{"prompt": p, "answer": "It was great"} for p in PROMPTS]))


def said(s: Scene, prompts: list[list[int]], **more: Any) -> list[Any]:
    how: dict[str, Any] = {
        "max_new_tokens": 12,
        "stop": (),
        "device": CPU,
        "tokens_per_batch": 4096,
        "compute": nullcontext,
        "check": lambda: None,
    }
    with torch.inference_mode():
        return generate(s.model, s.renderer, prompts, **(how | more))


def free_running(s: Scene, ids: list[int], new: int = 12) -> list[int]:
    """The most likely next token, again and again, with the whole text run every time."""
    text = list(ids)
    with torch.inference_mode():
        for _ in range(new):
            text.append(int(s.model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("kind", CAUSAL)
def test_answers_are_greedy_and_the_same_alone_and_in_company(tiny: Tiny, kind: str) -> None:
    s = asked(tiny, kind)
    prompts = [list(s.renderer.prompt(e).ids) for e in s.examples]
    together = said(s, prompts)
    for answer, prompt in zip(together, prompts, strict=True):
        expected = free_running(s, prompt)
        end = s.renderer.tokenizer.eos_token_id
        expected = expected[: expected.index(end)] if end in expected else expected
        assert answer.text == s.renderer.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert [answer] == said(s, [prompt])
    assert together == said(s, prompts, tokens_per_batch=64)


def test_an_answer_ends_at_the_end_token_or_is_cut_off(tiny: Tiny) -> None:
    s = asked(tiny)
    prompt = list(s.renderer.prompt(s.examples[0]).ids)
    free = free_running(s, prompt)
    (whole,) = said(s, [prompt])
    assert not whole.stopped
    config = s.model.generation_config
    config.eos_token_id = [free[3]]  # type: ignore[union-attr]
    (ended,) = said(s, [prompt])
    assert ended.stopped
    assert ended.text == s.renderer.tokenizer.decode(free[: free.index(free[3])], skip_special_tokens=True).strip()


def test_an_answer_ends_before_a_stop_string(tiny: Tiny) -> None:
    s = asked(tiny)
    prompts = [list(s.renderer.prompt(e).ids) for e in s.examples]
    whole = [answer.text for answer in said(s, prompts)]
    stop = next(text[len(text) // 2 :][:3] for text in whole if len(text) > 8)
    for answer, text in zip(said(s, prompts, stop=(stop,)), whole, strict=True):
        assert answer.stopped == (stop in text)
        assert answer.text == text.partition(stop)[0].strip()


def test_a_stop_string_that_ends_the_prompt_stops_nothing(tiny: Tiny) -> None:
    s = asked(tiny)
    prompt = list(s.renderer.prompt(s.examples[0]).ids)
    (plain,) = said(s, [prompt])
    stop = "the box\n"
    assert s.renderer.tokenizer.decode(prompt).endswith(stop) and stop not in plain.text
    assert said(s, [prompt], stop=(stop,)) == [plain]


def test_sampling_settings_of_the_model_are_not_used(tiny: Tiny) -> None:
    s = asked(tiny)
    prompts = [list(s.renderer.prompt(e).ids) for e in s.examples]
    plain = said(s, prompts)
    config: Any = s.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.no_repeat_ngram_size = True, 5.0, 9.0, 1
    assert said(s, prompts) == plain


def test_generated_text_is_measured(tiny: Tiny) -> None:
    s = asked(tiny)
    predictions = predict_examples(s.model, s.asking(), s.examples)
    assert all(p.loss is not None and p.stopped is not None and p.gold == "It was great" for p in predictions)
    assert any(p.predicted for p in predictions)
    metrics = measure(s.task, predictions, EvaluateSection(bootstrap=100), 0)
    assert list(metrics) == list(s.task.metrics)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_long_prompt_leaves_room_for_the_answer_and_says_what_was_cut(tiny: Tiny, kind: str) -> None:
    section = TaskSection(name="generation", max_new_tokens=40)
    given = rows([{"prompt": "The delivery was fast. " * 80, "answer": "no"}, {"prompt": "It was", "answer": "no"}])
    s = scene(tiny(kind), kind, section, given, max_length=256)
    long, short = predict_examples(s.model, s.asking(), s.examples)
    assert long.cut > 0 and short.cut == 0
    prompt = s.renderer.tokenizer(s.examples[0].prompt)["input_ids"]
    assert long.cut == len(prompt) - (256 - 40)


def test_chats_are_answered_where_asked(tiny: Tiny) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "how can I help you today?"}]
    s = scene(tiny("llama"), "llama", TaskSection(name="chat", max_new_tokens=6), rows([{"messages": messages}]))
    assert s.examples[0].messages[-1] == Message("assistant", "how can I help you today?")
    (quiet,) = predict_examples(s.model, s.asking(), s.examples)
    assert quiet.loss is not None and quiet.stopped is None and quiet.predicted == ""
    (spoken,) = predict_examples(s.model, s.asking(), s.examples, generated=True)
    assert spoken.loss == quiet.loss and spoken.stopped is not None
    tokenizer = s.renderer.tokenizer
    opening = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    free = free_running(s, tokenizer(opening, add_special_tokens=False)["input_ids"], 6)
    assert spoken.predicted == tokenizer.decode(free, skip_special_tokens=True).strip() or spoken.stopped


def test_an_interrupt_comes_through_between_two_tokens(tiny: Tiny) -> None:
    s = asked(tiny)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Interrupted("Stopped.")

    with pytest.raises(Interrupted):
        said(s, [list(s.renderer.prompt(s.examples[0]).ids)], check=check)


def test_a_masked_model_is_refused(tiny: Tiny) -> None:
    s = scene(tiny("bert"), "bert", TaskSection(name="classification"), reviews())
    with pytest.raises(UnsupportedError, match="causal"):
        said(s, [[1, 2, 3]])
