"""Presets: the wordings the MeZO paper publishes, the columns files have, and real rows."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.render.scenes import embedded_tokenizer
from tests.tasks.rows import made, only, read, rows
from tunefork.recipe.schema import DataSection
from tunefork.render import Renderer
from tunefork.tasks import build_examples, list_tasks

MASKED = {"sst2", "sst5", "mr", "trec", "rte", "cb"}
KINDS = ["chat", "choice", "classification", "generation", "preference", "scoring"]


# (preset, row, prompt, candidates as they follow it, right one): Malladi et al. 2023, tables 13 and 14
WORDINGS: list[tuple[str, dict[str, Any], str, list[str], int]] = [
    ("sst2", {"sentence": "a fine film ", "label": 1, "idx": 7}, "a fine film It was", [" terrible", " great"], 1),
    (
        "rte",
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        ["Yes", "No"],
        1,
    ),
    (
        "cb",
        {"premise": "It rains.", "hypothesis": "it is wet", "label": 2},
        'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        2,
    ),
    (
        "boolq",
        {"question": "is rain wet", "passage": "Rain -- is water.", "answer": False},
        "Rain -- is water. Is rain wet?\n",
        ["Yes", "No"],
        1,
    ),
    (
        "wsc",
        {"text": "Ann told Eve She left.", "span1_text": "Ann", "span2_text": "She", "label": 1},
        'Ann told Eve She left.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        ["No", "Yes"],
        1,
    ),
    (
        "wic",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A rich bank.", "label": False},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA rich bank.\n',
        ["No", "Yes"],
        0,
    ),
    (
        "multirc",
        {"paragraph": "It rained.", "question": "What fell?", "answer": "Rain", "label": 1},
        'It rained.\nQuestion: What fell?\nI found this answer "Rain". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        1,
    ),
    (
        "copa",
        {
            "premise": "The grass was wet.",
            "choice1": "It rained.",
            "choice2": "I slept.",
            "question": "cause",
            "label": 0,
        },
        "The grass was wet because",
        [" it rained.", " I slept."],
        0,
    ),
    (
        "record",
        {
            "passage": "Ann met Bob.\n@highlight\nAnn left",
            "query": "@placeholder went home",
            "entities": ["Ann", "Bob"],
            "answers": ["Ann"],
        },
        "Ann met Bob.\n- Ann left\n-",
        [" Ann went home", " Bob went home"],
        0,
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "candidates", "gold"), WORDINGS, ids=[w[0] for w in WORDINGS])
def test_the_wording_is_the_published_one(
    name: str, row: dict[str, Any], prompt: str, candidates: list[str], gold: int
) -> None:
    example = only(made(name), row)
    assert example.prompt == prompt and list(example.candidates) == candidates and example.gold == gold


@pytest.mark.parametrize(
    ("name", "row", "prompt", "labels", "label"),
    [
        ("sst2", {"text": "a fine film", "label": 0}, "a fine film It was [MASK].", "terrible great", "terrible"),
        ("mr", {"text": "a fine film", "label": 1}, "a fine film It was [MASK].", "terrible great", "great"),
        (
            "sst5",
            {"text": "a fine film", "label": 2},
            "a fine film It was [MASK].",
            "terrible bad okay good great",
            "okay",
        ),
        (
            "trec",
            {"text": "Who ?", "label": "HUM"},
            "[MASK]: Who ?",
            "Description Entity Expression Human Location Number",
            "Human",
        ),
        (
            "rte",
            {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
            "It rains? [MASK], It is wet.",
            "Yes No",
            "Yes",
        ),
        (
            "cb",
            {"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral"},
            "It rains? [MASK], it is wet",
            "Yes No Maybe",
            "Maybe",
        ),
    ],
)
def test_masked_models_get_the_wording_with_a_mask(
    name: str, row: dict[str, Any], prompt: str, labels: str, label: str
) -> None:
    task = made(name, kind="masked")
    example = only(task, row)
    assert example.prompt == prompt and task.labels == tuple(labels.split())
    assert example.gold is not None and task.labels[example.gold] == label


def test_squad_asks_with_title_context_and_question() -> None:
    row = {
        "title": "Rain",
        "context": "Rain is water.",
        "question": " What is rain?",
        "answers": {"text": ["water", "Water", "water"], "answer_start": [8, 8, 8]},
    }
    task = made("squad")
    example = only(task, row)
    assert example.prompt == "Title: Rain\nContext: Rain is water.\nQuestion: What is rain?\nAnswer:"
    assert example.answer == " water" and example.references == ("water", "Water") and "\n" in task.stop
    assert only(task, {k: v for k, v in row.items() if k != "title"}).prompt.startswith("Context: ")


def test_nested_questions_are_a_row_each_and_share_their_passage() -> None:
    answers = [{"text": "Rain", "idx": 0, "label": 1}, {"text": "Snow", "idx": 1, "label": 0}]
    passage = {"text": "It rained.", "questions": [{"question": "What fell?", "answers": answers}] * 2}
    task = made("multirc")
    parts = task.rows(rows({"idx": 0, "passage": passage}, {"idx": 1, "passage": {**passage, "text": "It snowed."}}))
    examples = [task.example(part) for part in parts]
    assert [e.source for e in examples][:5] == ["a.csv:2#1", "a.csv:2#2", "a.csv:2#3", "a.csv:2#4", "a.csv:3#1"]
    assert [e.gold for e in examples[:2]] == [1, 0]
    assert len({e.group for e in examples[:4]}) == 1 and examples[4].group != examples[0].group


def test_a_passage_without_questions_is_counted_and_not_lost() -> None:
    task = made("multirc")
    examples, findings = build_examples(
        task, rows({"passage": {"text": "It rained.", "questions": []}}), DataSection(), labelled=True
    )
    assert not examples and findings[0].code == "unusable-row" and "does not have" in findings[0].examples[0]


A, B, C = {"start": 0, "end": 0}, {"start": 2, "end": 2}, [{"text": "C"}]  # letters of "A B", and one that is not


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("choice", {"question": "?", "choices": ["red", "green"], "label": "pink"}),
        ("record", {"passage": {"text": "A B", "entities": [A, B]}, "qas": [{"query": "?", "answers": C}]}),
        ("gsm8k", {"question": "1 + 1?", "answer": "two"}),
        ("scoring", {"text": "Fine.", "score": "ten"}),
    ],
)
def test_wrong_answers_are_not_looked_at_where_none_is_needed(name: str, values: dict[str, Any]) -> None:
    task = made(name, names=("0", "1", "2"))
    for labelled, usable in ((True, 0), (False, 1)):
        examples, _ = build_examples(task, rows(values), DataSection(), labelled=labelled)
        assert [(e.gold, e.answer, e.references) for e in examples] == [(None, None, ())] * usable


def test_record_takes_every_mention_of_the_right_entity() -> None:
    text = "Ann Smith met Bob.\n@highlight\nAnn left"
    spans = [{"start": 0, "end": 8}, {"start": 14, "end": 16}, {"start": 30, "end": 32}, {"start": 14, "end": 16}]
    qas = [{"query": "@placeholder left", "answers": [{"text": "Ann Smith"}, {"text": "Ann"}]}]
    example = only(made("record"), {"passage": {"text": text, "entities": spans}, "qas": qas})
    assert example.candidates == (" Ann Smith left", " Bob left", " Ann left")
    assert example.golds == (0, 2) and example.gold == 0


def test_kinds_come_first_and_every_preset_says_where_it_comes_from() -> None:
    infos = list_tasks()
    assert [i.name for i in infos[: len(KINDS)]] == KINDS
    presets = infos[len(KINDS) :]
    needed = "sst2 sst5 trec mr rte cb boolq wsc wic multirc copa record squad ag_news banking77 gsm8k dialogsum"
    assert set(needed.split()) <= {i.name for i in presets}
    paper = {"sst2", "sst5", "trec", "mr", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad"}
    assert all("2305.17333" in i.source for i in presets if i.name in paper)


FILES = {
    "sst2": "sst2/train.jsonl",
    "sst5": "sst5/train.jsonl",
    "trec": "trec/test.jsonl",
    "mr": "mr/train.jsonl",
    "rte": "rte/train.jsonl",
    "cb": "cb/train.jsonl",
    "boolq": "boolq/train_from_val.jsonl",
    "wsc": "wsc/train.jsonl",
    "wic": "wic/train.jsonl",
    "multirc": "multirc/dev.jsonl",
    "copa": "copa/train.jsonl",
    "record": "record/fewglue_train32.jsonl",
    "squad": "squad_sample/train.jsonl",
    "ag_news": "ag_news/train.jsonl",
    "banking77": "banking77/train.jsonl",
    "gsm8k": "gsm8k/train.jsonl",
    "dialogsum": "dialogsum/test.jsonl",
}


@pytest.mark.shared
@pytest.mark.parametrize("name", FILES)
def test_real_rows_render_without_naming_a_field(shared: Path, tiny: Any, name: str) -> None:
    train = read(shared / "data" / FILES[name], {"multirc": 5, "banking77": 10_003}.get(name, 60))
    train = train[:: max(1, len(train) // 100)]
    task = made(name, train)
    examples, findings = build_examples(task, train, DataSection(), labelled=True)
    assert not [f for f in findings if f.level != "info"]
    assert len(examples) >= len(train)
    renderer = Renderer(embedded_tokenizer(), "causal", task, 4000, False)
    for example in examples[:40]:
        (one,) = renderer.render(example)
        batch = renderer.batch([one], learn=True)
        assert batch.weights.item() > 0 and not one.cut
        assert example.gold is None or 0 <= example.gold < len(one.candidates)
    if name in MASKED:
        masked = made(name, train, kind="masked")
        folder = tiny("roberta")
        asked = [masked.example(row).prompt for row in masked.rows(train)]
        assert all(prompt.count("[MASK]") == 1 for prompt in asked)
        assert Renderer(AutoTokenizer.from_pretrained(folder), "masked", masked, 200, False).objective == "candidates"
