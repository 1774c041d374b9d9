"""The check of rendered rows: every finding that can refuse a run, and none on sound rows."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.render.scenes import CHATML, NO_STOP, chat, embedded_tokenizer, task, with_template
from tunefork.data.rows import Finding, Row
from tunefork.recipe.schema import DataSection
from tunefork.render import Renderer
from tunefork.tasks import Example
from tunefork.tasks.check import check_rendered

TALK = chat(("user", "Open?"), ("assistant", "Yes."))


def check(renderer: Renderer, *examples: Example, split: str = "train", **limits: Any) -> dict[str, Finding]:
    rendered = [r for e in examples for r in renderer.render(e)]
    found = check_rendered({split: rendered}, renderer.task, renderer, DataSection(**limits))
    return {f.code: f for f in found}


def of(asked: Any, tokenizer: Any = None, limit: int = 512) -> Renderer:
    return Renderer(tokenizer or embedded_tokenizer(), "causal", asked, limit, False)


@pytest.mark.parametrize("tokenizer", [embedded_tokenizer(), with_template(CHATML)])
def test_sound_rows_have_no_findings(tokenizer: Any) -> None:
    assert check(of(task(), tokenizer), TALK, TALK) == {}
    answered = Example("r", prompt="1 + 1?\nAnswer:", answer=" 2 #### 2")
    assert check(of(task("gsm8k"), tokenizer), answered) == {}


def test_cut_rows_are_counted_by_side_and_refused_past_the_threshold() -> None:
    long = Example("a.csv:9", prompt="word " * 50 + "Answer:", answer=" 2 #### 2")
    short = Example("a.csv:8", prompt="Answer:", answer=" 2 #### 2")
    found = check(of(task("gsm8k"), limit=32), long, *[short] * 9)
    assert found["cut-row"].level == "warning" and found["cut-row"].count == 1
    assert "from the left" in found["cut-row"].message and "a.csv:9" in found["cut-row"].examples[0]
    assert check(of(task("gsm8k"), limit=32), long, short)["cut-row"].level == "error"
    assert check(of(task("gsm8k"), limit=32), long, short, max_cut=0.5)["cut-row"].level == "warning"


def test_an_answer_that_does_not_fit_is_an_error_past_the_threshold() -> None:
    long = Example("a.csv:9", prompt="Answer:", answer=" word" * 50)
    found = check(of(task("gsm8k"), limit=32), long)
    assert found["nothing-trained"].level == "error" and "does not fit" in found["nothing-trained"].examples[0]
    assert "cut-row" not in found


def test_a_stop_token_that_is_never_trained_is_an_error() -> None:
    found = check(of(task(), with_template(NO_STOP)), TALK, TALK)
    assert found["stop-not-trained"].level == "error" and found["stop-not-trained"].count == 2
    assert "<|im_end|>" in found["stop-not-trained"].message


def test_a_reply_of_weight_zero_at_the_end_is_no_error() -> None:
    silent = chat(("user", "Open?"), ("assistant", "Yes."), ("user", "Now?"))
    assert check(of(task()), silent) == {}


def test_candidates_of_the_same_tokens_are_an_error(tiny: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))  # lower-cases
    asked = task("classification", labels=("Good", "good"), kind="masked")
    renderer = Renderer(tokenizer, "masked", asked, 100, False)
    found = check(renderer, Example("r", prompt="It was [MASK].", candidates=(" Good", " good"), gold=0))
    assert found["same-candidates"].level == "error" and "'Good' and 'good'" in found["same-candidates"].examples[0]


def test_candidates_that_begin_alike_are_said() -> None:
    r = of(task("copa"))
    nested = Example("r", prompt="So", candidates=(" the cat", " the cat sat"), gold=0)
    alike = Example("r", prompt="So", candidates=(" the cat", " the dog"), gold=0)
    assert check(r, nested)["candidate-in-candidate"].level == "warning"
    assert check(r, alike)["shared-prefix"].level == "info"
    assert check(r, alike, split="test") == {}


def test_a_prompt_whose_end_merges_with_the_answer_is_said() -> None:
    r = of(task("gsm8k"))
    merged = Example("r", prompt="Answer: ", answer="Paris")
    assert check(r, merged)["prompt-boundary"].count == 1


def test_texts_the_tokenizer_does_not_know_are_said(tiny: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert"))
    asked = task("sst2", kind="encoder")
    renderer = Renderer(tokenizer, "encoder", asked, 100, False)
    strange = Example("r:3", prompt="это было хорошо", candidates=(" terrible", " great"), gold=0)
    found = check(renderer, strange)
    assert found["unknown-tokens"].count == 1 and "r:3" in found["unknown-tokens"].examples[0]
    assert check(renderer, Example("r", prompt="it was good", gold=0)) == {}


def test_a_text_that_spells_a_special_token_is_said() -> None:
    r = of(task(), with_template(CHATML))
    forged = chat(("user", "Open? <|im_end|>"), ("assistant", "Yes."), text="Open? <|im_end|>\nYes.")
    found = check(r, forged, chat(("user", "Open? <im_end>"), ("assistant", "Yes."), text="Open? <im_end>\nYes."))
    assert found["special-token"].level == "warning" and found["special-token"].count == 1
    assert "<|im_end|>" in found["special-token"].examples[0]


def test_a_special_token_of_the_wording_is_meant(tiny: Any) -> None:
    asked = task("classification", labels=("bad", "good"), kind="masked", masked_prompt="{{ title }}? It was [MASK].")
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny("bert")), "masked", asked, 100, False)
    example = asked.example(Row({"title": "the film", "label": "good"}, "a.csv", 2))
    assert "[MASK]" in example.text
    assert "special-token" not in check(renderer, example)
