"""Causal models: prompts, candidates and answers as token ids."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.render.scenes import CHATML, embedded_tokenizer, learned, renderer, task, with_template
from tests.tiny import CAUSAL
from tunefork.errors import DataError, UnsupportedError
from tunefork.tasks import Example

QUESTION = Example("a.csv:2", prompt="The film was fine. It was", candidates=(" terrible", " great"), gold=1)


@pytest.fixture(params=CAUSAL)
def tokenizer(request: pytest.FixtureRequest, tiny):
    return AutoTokenizer.from_pretrained(tiny(request.param))


def test_the_start_token_stands_once_if_the_tokenizer_adds_it_and_no_end_token_follows(tokenizer) -> None:
    (one,) = renderer(tokenizer, task("sst2")).render(QUESTION)
    alone = tokenizer(QUESTION.prompt)["input_ids"]
    assert list(one.ids) == alone[: len(one.ids)]
    adds = alone[0] == tokenizer.bos_token_id
    assert one.ids.count(tokenizer.bos_token_id) == (1 if adds and tokenizer.bos_token_id is not None else 0)
    assert tokenizer.eos_token_id not in one.ids


def test_prompt_and_candidate_are_the_whole_text(tokenizer) -> None:
    (one,) = renderer(tokenizer, task("sst2")).render(QUESTION)
    for text, candidate in zip(QUESTION.candidates, one.candidates, strict=True):
        assert list(one.ids + candidate) == tokenizer(QUESTION.prompt + text)["input_ids"]


pieces = st.one_of(st.text(max_size=6), st.sampled_from([" ", "\n", "  ", " a", "It was", "?\n", "Answer:", "'s", "1"]))
texts = st.lists(pieces, min_size=1, max_size=8).map("".join).filter(bool)


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(texts, min_size=2, max_size=4, unique=True))
def test_any_prompt_and_candidates_are_the_whole_texts(prompt: str, candidates: list[str]) -> None:
    tokenizer = EMBEDDED
    assume("<|" not in prompt + "".join(candidates))
    example = Example("row", prompt=prompt, candidates=tuple(candidates), gold=0)
    (one,) = renderer(tokenizer, task("sst2")).render(example)
    for text, candidate in zip(candidates, one.candidates, strict=True):
        assert candidate and list(one.ids + candidate) == tokenizer(prompt + text)["input_ids"]


EMBEDDED = embedded_tokenizer()


def test_candidates_of_one_token_each_are_read_at_the_last_token() -> None:
    r = renderer(EMBEDDED, task("rte"))
    example = Example("row", prompt="Is it so? Yes or No?\n", candidates=("Yes", "No"), gold=1)
    (one,) = r.render(example)
    batch = r.batch([one])
    assert one.read_at == len(one.ids) - 1 and not one.fanned_out
    assert batch.options is not None and batch.targets is None and batch.input_ids.shape == (1, len(one.ids))
    assert EMBEDDED.convert_ids_to_tokens(batch.options[0].tolist()) == ["Yes", "No"]


def test_candidates_of_several_tokens_are_a_sequence_each_and_their_tokens_are_targets() -> None:
    r = renderer(EMBEDDED, task("sst2"))
    (one,) = r.render(QUESTION)
    batch = r.batch([one, one])
    assert one.fanned_out and batch.row.tolist() == [0, 0, 1, 1] and batch.targets is not None
    for s, candidate in enumerate(one.candidates * 2):
        asked = batch.targets[s][batch.targets[s] != -100].tolist()
        assert asked == list(candidate)
        at = (batch.targets[s] != -100).nonzero().flatten().tolist()
        assert [int(batch.input_ids[s, t + 1]) for t in at] == asked  # predicted one position before


def test_learning_the_answer_takes_the_right_candidate_alone() -> None:
    r = renderer(EMBEDDED, task("sst2", objective="answer"))
    (one,) = r.render(QUESTION)
    batch = r.batch([one], learn=True)
    assert batch.gold is None and batch.targets is not None and batch.input_ids.shape[0] == 1
    assert batch.targets[batch.targets != -100].tolist() == list(one.candidates[1])
    assert batch.weights.tolist() == [len(one.candidates[1])]
    assert r.batch([one]).input_ids.shape[0] == 2  # measured over all candidates as ever
    with pytest.raises(DataError, match=r"a\.csv:2.*label"):
        r.batch([replace(one, example=replace(QUESTION, gold=None))], learn=True)


def test_many_labels_are_learned_by_answer_unless_each_is_one_token() -> None:
    short = tuple("abcdefghijk")
    long = tuple(f"category number {letter}" for letter in short)
    few = long[:3]
    assert renderer(EMBEDDED, task("classification", labels=short)).objective == "candidates"
    assert renderer(EMBEDDED, task("classification", labels=long)).objective == "answer"
    assert renderer(EMBEDDED, task("classification", labels=few)).objective == "candidates"
    assert renderer(EMBEDDED, task("classification", labels=short, objective="answer")).objective == "answer"


def test_an_answer_is_trained_with_its_end_token(tokenizer) -> None:
    r = renderer(tokenizer, task("gsm8k"))
    (one,) = r.render(Example("row", prompt="Question: 1 + 1?\nAnswer:", answer=" Two. #### 2"))
    assert learned(tokenizer, one) == [" Two. #### 2" + tokenizer.eos_token]
    assert r.prompt(one.example).ids == one.ids[: one.trained.index(True)]


def test_an_example_without_answer_can_be_generated_from_and_trains_nothing() -> None:
    (one,) = renderer(EMBEDDED, task("gsm8k")).render(Example("row", prompt="Question: 1 + 1?\nAnswer:"))
    assert not any(one.trained) and one.ids


def test_the_chat_template_wraps_the_prompt_as_user_and_the_answer_as_assistant() -> None:
    tokenizer = with_template(CHATML)
    r = renderer(tokenizer, task("gsm8k"), template=True)
    (one,) = r.render(Example("row", prompt="1 + 1?", answer=" Two."))
    assert tokenizer.decode(one.ids) == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    assert learned(tokenizer, one) == ["Two.<|im_end|>"]
    assert r.prompt(one.example).ids == one.ids[: one.trained.index(True)]
    choosing = renderer(tokenizer, task("sst2"), template=True)
    (two,) = choosing.render(QUESTION)
    text = "<|im_start|>user\nThe film was fine. It was<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(two.ids) == text
    assert [tokenizer.decode(c) for c in two.candidates] == ["terrible", "great"]
    assert EMBEDDED.bos_token_id not in one.ids  # the template decides


def test_a_chat_template_for_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="chat_template"):
        renderer(with_template(CHATML), task("sst2", form="head"), template=True)


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 60), st.integers(0, 60), st.integers(1, 20))
def test_cutting_keeps_start_token_and_answer_whole(limit: int, words: int, answer_words: int) -> None:
    prompt, answer = "word " * words + "Answer:", " yes" * answer_words
    r, whole = renderer(EMBEDDED, task("gsm8k"), limit), renderer(EMBEDDED, task("gsm8k"), 1000)
    example = Example("row", prompt=prompt, answer=answer)
    (one,), (full,) = r.render(example), whole.render(example)
    assert len(one.ids) <= limit and one.ids[0] == EMBEDDED.bos_token_id and one.length == full.length
    fits = sum(full.trained) + 1 <= limit or len(full.ids) <= limit
    if fits:
        assert learned(EMBEDDED, one) == [answer + "<|end|>"]
        assert one.cut == len(full.ids) - len(one.ids) and one.cut_side == ("left" if one.cut else "")
        assert one.ids[1:] == full.ids[len(full.ids) - len(one.ids) + 1 :]
    else:
        assert not any(one.trained) and one.answer_cut


def test_cutting_keeps_candidates_whole_and_refuses_what_never_fits() -> None:
    long = replace(QUESTION, prompt="word " * 100 + QUESTION.prompt)
    (one,) = renderer(EMBEDDED, task("sst2"), 24).render(long)
    (full,) = renderer(EMBEDDED, task("sst2"), 1000).render(long)
    assert one.longest == 24 and one.candidates == full.candidates and one.length == full.length
    assert one.ids[0] == EMBEDDED.bos_token_id and one.ids[1:] == full.ids[-len(one.ids) + 1 :]
    with pytest.raises(DataError, match=r"a\.csv:2.*must fit 8 tokens"):
        renderer(EMBEDDED, task("sst2"), 8).render(replace(QUESTION, candidates=(" no " * 20, " yes")))


def test_a_candidate_needs_something_before_it(tiny) -> None:
    bare = AutoTokenizer.from_pretrained(tiny("qwen"))  # no start token
    with pytest.raises(DataError, match="at least one token"):
        renderer(bare, task("sst2")).render(replace(QUESTION, prompt=""))


def test_the_description_changes_with_anything_that_changes_the_ids() -> None:
    def mark(*arguments: object, **more: object) -> str:
        return renderer(*arguments, **more).describe()["fingerprint"]  # type: ignore[arg-type]

    same = mark(EMBEDDED, task("sst2"))
    assert same == mark(embedded_tokenizer(), task("sst2"))
    others = [
        mark(EMBEDDED, task("sst2", prompt="{{ text }} All in all")),
        mark(EMBEDDED, task("mr", labels=("great", "terrible"))),
        mark(EMBEDDED, task("sst2"), 100),
        mark(with_template(CHATML), task("sst2")),
        mark(with_template(CHATML), task("sst2"), template=True),
    ]
    assert len({same, *others}) == 6


def test_every_token_is_explained() -> None:
    r = renderer(EMBEDDED, task("sst2"), 24)
    (one,) = r.render(replace(QUESTION, prompt="word " * 100 + QUESTION.prompt))
    lines = r.explain(one)
    assert [role for _, _, role in lines[:3]] == ["masked", "cut", "masked"]
    assert {role for _, _, role in lines} == {"masked", "cut", "candidate 0", "right 1"}
    assert "".join(text for text, _, role in lines if role == "right 1") == " great"
    answered = renderer(EMBEDDED, task("gsm8k"))
    (two,) = answered.render(Example("row", prompt="Why?", answer=" So."))
    assert "".join(text for text, _, role in answered.explain(two) if role == "trained") == " So.<|end|>"
