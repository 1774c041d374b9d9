"""Chats: exactly the replies and their stop tokens are trained, whatever the template."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.render.scenes import (
    CHATML,
    NO_STOP,
    NO_SYSTEM,
    OPENS_REASONING,
    SAME_EACH_TIME,
    STRIPS_REASONING,
    TOOLS,
    chat,
    embedded_tokenizer,
    learned,
    renderer,
    task,
    with_template,
)
from tunefork.errors import DataError, RecipeError
from tunefork.render import Renderer
from tunefork.tasks import Example, Message

TALK = chat(
    ("system", "Be brief."),
    ("user", "Are you open?"),
    ("assistant", "Yes, until six."),
    ("user", "And on Sunday?"),
    ("assistant", "No.\n    Monday is fine."),
)
REPLIES = ["Yes, until six.", "No.\n    Monday is fine."]


@pytest.mark.parametrize("name", SAME_EACH_TIME)
def test_the_replies_and_their_stop_tokens_are_trained_and_nothing_else(name: str) -> None:
    tokenizer = with_template(SAME_EACH_TIME[name])
    (one,) = renderer(tokenizer).render(TALK)
    assert learned(tokenizer, one) == [reply + "<|im_end|>" for reply in REPLIES]
    assert tokenizer.decode(one.ids) == tokenizer.apply_chat_template(_plain(TALK), tokenize=False)


def test_the_embedded_model_learns_its_end_token() -> None:
    tokenizer = embedded_tokenizer()
    (one,) = renderer(tokenizer).render(TALK)
    assert learned(tokenizer, one) == [reply + "<|end|>" for reply in REPLIES]
    assert one.ids.count(tokenizer.bos_token_id) == 1 and one.ids[0] == tokenizer.bos_token_id


def test_a_template_without_system_role_is_refused_with_its_own_words_and_the_row() -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:3.*System role not supported"):
        renderer(with_template(NO_SYSTEM)).render(TALK)
    tokenizer = with_template(NO_SYSTEM)
    (one,) = renderer(tokenizer).render(replace(TALK, messages=TALK.messages[1:]))
    assert [text.strip() for text in learned(tokenizer, one)] == [reply + "<|im_end|>" for reply in REPLIES]


def test_a_template_that_strips_earlier_reasoning_gives_one_text_a_reply() -> None:
    tokenizer = with_template(STRIPS_REASONING)
    talk = chat(
        ("user", "2 + 2?"), ("assistant", "<think>easy</think>4"), ("user", "+ 1?"), ("assistant", "<think>so</think>5")
    )
    first, second = renderer(tokenizer).render(talk)
    assert learned(tokenizer, first) == ["<think>easy</think>4<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>so</think>5<|im_end|>"]
    assert "easy" not in tokenizer.decode(second.ids)  # as the model will meet it
    assert first.example is talk and second.example is talk


def test_a_template_under_which_no_reply_continues_its_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:3: a reply must continue"):
        renderer(with_template(OPENS_REASONING)).render(TALK)


def test_turns_of_weight_zero_are_read_and_not_learned() -> None:
    tokenizer = with_template(CHATML)
    silent = replace(TALK, messages=(*TALK.messages[:2], replace(TALK.messages[2], trained=False), *TALK.messages[3:]))
    (one,) = renderer(tokenizer).render(silent)
    assert learned(tokenizer, one) == [REPLIES[1] + "<|im_end|>"]
    assert REPLIES[0] in tokenizer.decode(one.ids)


def test_tools_reach_the_template() -> None:
    tokenizer = with_template(TOOLS)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    (one,) = renderer(tokenizer).render(replace(TALK, tools=(tool,)))
    assert tokenizer.decode(one.ids).startswith("tools: look_up\n")


def test_no_template_is_refused_and_not_made_up() -> None:
    with pytest.raises(RecipeError, match="chat template"):
        renderer(with_template(None))


def test_the_prompt_is_what_training_saw_before_the_last_reply() -> None:
    for tokenizer in (with_template(CHATML), embedded_tokenizer()):
        r = renderer(tokenizer)
        (one,) = r.render(TALK)
        asked = r.prompt(TALK).ids
        assert one.ids[: len(asked)] == asked
        assert one.trained[len(asked)] and not one.trained[len(asked) - 1]


def test_stop_tokens_come_from_the_template_and_the_tokenizer() -> None:
    tokenizer = embedded_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML  # ends turns with a token that is not the end token, as Gemma's does
    ids = renderer(tokenizer).stop_ids
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<|im_end|>", "<|end|>"]
    plain = with_template(NO_STOP)
    assert plain.convert_ids_to_tokens(list(renderer(plain).stop_ids)) == ["<|im_end|>"]


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).map(str.strip)
contents = words.filter(lambda text: text and "<|" not in text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_conversation_trains_its_replies_only(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SAME_EACH_TIME)))
    pairs = data.draw(st.lists(st.tuples(contents, contents, st.booleans()), min_size=1, max_size=4))
    turns = [m for ask, reply, use in pairs for m in (Message("user", ask), Message("assistant", reply, use))]
    tokenizer = TOKENIZERS[name]
    (one,) = renderer(tokenizer, max_length=4000).render(Example("row", messages=tuple(turns)))
    assert "".join(learned(tokenizer, one)) == "".join(reply + "<|im_end|>" for _, reply, use in pairs if use)


TOKENIZERS = {name: with_template(template) for name, template in SAME_EACH_TIME.items()}


def test_a_long_chat_loses_its_oldest_exchanges_and_keeps_the_system_message() -> None:
    tokenizer = with_template(CHATML)
    turns = [("system", "Be brief.")]
    for i in range(12):
        turns += [("user", f"Question {i}?"), ("assistant", f"Answer {i}.")]
    whole = renderer(tokenizer).render(chat(*turns))[0]
    (one,) = renderer(tokenizer, max_length=100).render(chat(*turns))
    text = tokenizer.decode(one.ids)
    assert len(one.ids) <= 100 and one.cut == len(whole.ids) - len(one.ids) and one.cut_side == "turns"
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion")
    kept = learned(tokenizer, one)
    assert kept == [f"Answer {i}.<|im_end|>" for i in range(12 - len(kept), 12)] and 0 < len(kept) < 12
    asked = renderer(tokenizer, max_length=100).prompt(chat(*turns))
    assert tokenizer.decode(asked.ids).endswith("Question 11?<|im_end|>\n<|im_start|>assistant\n")
    assert (
        asked.cut_side == "turns"
        and asked.length == len(whole.ids) - len(tokenizer("Answer 11.<|im_end|>\n")["input_ids"]) + 1
    )


def test_one_long_exchange_is_cut_from_the_left_and_never_into_the_reply() -> None:
    tokenizer = embedded_tokenizer()
    long = chat(("user", "word " * 200), ("assistant", "Short."))
    (one,) = renderer(tokenizer, max_length=64).render(long)
    assert len(one.ids) == 64 and one.cut_side == "left" and one.ids[0] == tokenizer.bos_token_id
    assert learned(tokenizer, one) == ["Short.<|end|>"]


def test_a_reply_that_does_not_fit_teaches_nothing_and_says_so() -> None:
    tokenizer = embedded_tokenizer()
    (one,) = renderer(tokenizer, max_length=32).render(chat(("user", "Go on."), ("assistant", "word " * 200)))
    assert not any(one.trained) and one.answer_cut and len(one.ids) == 32 and one.length > 200


def test_rewritten_chats_are_shortened_reply_by_reply() -> None:
    tokenizer = with_template(STRIPS_REASONING)
    turns = [t for i in range(8) for t in (("user", f"Question {i}?"), ("assistant", f"<think>hm</think>Answer {i}."))]
    full = renderer(tokenizer).render(chat(*turns))
    short = renderer(tokenizer, max_length=60).render(chat(*turns))
    assert [learned(tokenizer, r) for r in short] == [learned(tokenizer, r) for r in full]
    assert max(len(r.ids) for r in short) <= 60 < max(len(r.ids) for r in full)


@pytest.mark.shared
def test_real_conversations_train_only_what_the_assistant_says(shared: Path) -> None:
    tokenizer = embedded_tokenizer()
    with (shared / "data/chat_identity_multiturn/train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    asked = Renderer(tokenizer, "causal", task(), 4096, False)
    for messages in rows[:100]:
        (one,) = asked.render(chat(*((m["role"], m["content"]) for m in messages)))
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        assert "".join(learned(tokenizer, one)) == "".join(reply + "<|end|>" for reply in replies)


def _plain(example: Example) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in example.messages]
