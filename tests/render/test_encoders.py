"""Masked language models and classification heads."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from tests.render.scenes import task
from tests.tiny import MASKED
from tunefork.data.rows import Row
from tunefork.errors import DataError, RecipeError
from tunefork.render import Renderer
from tunefork.tasks import Example

CLOZE = Example("a.csv:2", prompt="a fine film . It was [MASK].", candidates=(" bad", " great"), gold=1)


@pytest.fixture(params=MASKED)
def tokenizer(request: pytest.FixtureRequest, tiny):
    return AutoTokenizer.from_pretrained(tiny(request.param))


def masked(tokenizer, limit: int = 100, name: str = "sst2") -> Renderer:
    return Renderer(tokenizer, "masked", task(name, kind="masked"), limit, False)


def test_the_mask_stands_where_the_wording_has_it_and_is_read_there(tokenizer) -> None:
    r = masked(tokenizer)
    (one,) = r.render(CLOZE)
    written = CLOZE.prompt.replace(" [MASK]", tokenizer.mask_token)
    assert list(one.ids) == tokenizer(written)["input_ids"]
    assert one.read_at is not None and one.ids[one.read_at] == tokenizer.mask_token_id
    assert one.ids.count(tokenizer.mask_token_id) == 1
    words = [tokenizer.decode(list(c)).strip() for c in one.candidates]
    assert words == ["bad", "great"] and not one.fanned_out
    batch = r.batch([one])
    assert batch.read_at is not None and batch.read_at.tolist() == [one.read_at]


def test_a_word_is_read_with_the_space_it_carries_inside_a_text(tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("roberta"))
    for prompt in (CLOZE.prompt, "[MASK]: who are you ?"):
        (one,) = masked(tokenizer).render(replace(CLOZE, prompt=prompt))
        assert tokenizer.convert_ids_to_tokens([c[0] for c in one.candidates]) == ["Ġbad", "Ġgreat"]


def test_a_verbalizer_of_several_tokens_is_refused_by_name(tokenizer) -> None:
    with pytest.raises(RecipeError, match=r"one token.*'unbelievable"):
        masked(tokenizer).render(replace(CLOZE, candidates=(" bad", " unbelievable-zq")))


@pytest.mark.parametrize("prompt", ["word " * 60 + "It was [MASK].", "[MASK]: " + "word " * 60])
def test_cutting_keeps_the_mask_and_the_special_tokens(tokenizer, prompt: str) -> None:
    (one,) = masked(tokenizer, 24).render(replace(CLOZE, prompt=prompt))
    (full,) = masked(tokenizer, 1000).render(replace(CLOZE, prompt=prompt))
    assert len(one.ids) == 24 and one.cut == len(full.ids) - 24
    assert one.read_at is not None and one.ids[one.read_at] == tokenizer.mask_token_id
    assert one.ids[0] == tokenizer.cls_token_id and one.ids[-1] == tokenizer.sep_token_id
    assert one.cut_side == ("left" if prompt.endswith("[MASK].") else "right")


def test_a_text_that_holds_the_mask_itself_is_refused() -> None:
    asked, row = task("sst2", kind="masked"), {"text": "a fine film ", "label": 1}
    with pytest.raises(DataError, match=r"a\.csv:2.*\[MASK\]"):
        asked.example(Row({**row, "text": "a [MASK] of a film"}, "a.csv", 2))
    assert asked.example(Row(row, "a.csv", 2)).prompt == "a fine film It was [MASK]."


def test_a_head_reads_the_text_between_special_tokens_cut_from_the_right(tokenizer) -> None:
    asked = task("sst2", kind="encoder")
    text = "word " * 40
    example = Example("row", prompt=text, text=text, candidates=(" terrible", " great"), gold=0)
    (one,) = Renderer(tokenizer, "encoder", asked, 20, False).render(example)
    (full,) = Renderer(tokenizer, "encoder", asked, 300, False).render(example)
    assert list(full.ids) == tokenizer(text)["input_ids"]
    assert one.ids == (*full.ids[:19], full.ids[-1]) and one.cut == len(full.ids) - 20 and one.cut_side == "right"
    batch = Renderer(tokenizer, "encoder", asked, 20, False).batch([one, full])
    assert batch.head and batch.gold is not None and batch.gold.tolist() == [0, 0]
    assert batch.weights.tolist() == [1, 1] and batch.tokens == 20 + len(full.ids)


def test_a_tokenizer_without_a_mask_is_refused(tiny) -> None:
    with pytest.raises(RecipeError, match="mask token"):
        masked(AutoTokenizer.from_pretrained(tiny("llama")))
