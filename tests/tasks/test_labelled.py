"""Classification and scoring: labels, wording, forms, metrics."""

import numpy as np
import pytest

from tests.tasks.rows import made, only, rows
from tunefork.errors import DataError, RecipeError, UnsupportedError
from tunefork.recipe.schema import DataSection
from tunefork.tasks import Prediction, build_examples

THREE = rows(
    {"text": "a", "label": "10"}, {"text": "b", "label": 9}, {"text": "c", "label": 9.0}, {"text": "d", "label": "2"}
)


def said(index: int, gold: int | None) -> Prediction:
    return Prediction("a.csv:2", "x", None if gold is None else "x", index=index, gold_index=gold)


def test_numeric_labels_are_sorted_as_numbers_and_one_value_is_one_label() -> None:
    task = made("classification", THREE)
    assert task.labels == ("2", "9", "10")
    assert [task.example(row).gold for row in THREE] == [2, 1, 1, 0]
    assert [task.label_of(row) for row in THREE] == ["10", "9", "9", "2"]


def test_words_are_sorted_and_underscores_shown_as_spaces() -> None:
    train = rows({"text": "a", "label": "lost_card"}, {"text": "b", "label": "age_limit"})
    task = made("classification", train)
    assert task.labels == ("age limit", "lost card")
    example = task.example(train[0])
    assert example.prompt == "a\nAnswer:" and example.candidates == (" age limit", " lost card") and example.gold == 1


def test_names_of_the_recipe_are_shown_and_values_or_names_may_stand_in_the_file() -> None:
    task = made("classification", THREE, labels={"2": "bad", "9": "fair", "10": "good"})
    assert task.labels == ("bad", "fair", "good") and task.example(THREE[0]).gold == 2
    assert only(task, {"text": "x", "label": "fair"}).gold == 1
    words = made("sst2", (), labels={"0": "awful", "1": "superb"})
    assert only(words, {"text": "x", "label": 0}).candidates == (" awful", " superb")


def test_a_trained_models_labels_keep_their_order_and_still_read_the_files_values() -> None:
    again = made("sst2", names=("terrible", "great"))
    assert only(again, {"sentence": "x", "label": 1}).gold == 1
    banking = made("banking77", names=("lost card", "age limit"))
    assert banking.labels == ("lost card", "age limit")
    assert only(banking, {"text": "x", "label": "age_limit"}).gold == 1
    assert only(banking, {"text": "x", "label": "age limit"}).gold == 1


def test_an_unknown_label_names_row_and_nearest_label() -> None:
    task = made("classification", rows({"text": "a", "label": "yes"}, {"text": "b", "label": "never"}))
    with pytest.raises(DataError, match=r"a\.csv:2.*Received 'nevr'.*Did you mean `never`"):
        only(task, {"text": "x", "label": "nevr"})


def test_a_row_without_label_can_be_predicted_but_not_learned_from() -> None:
    task = made("classification", THREE)
    bare = rows({"text": "x"}, {"text": "y", "label": None}, {"text": "z", "label": "nan"})
    assert [task.example(row).gold for row in bare] == [None, None, None]
    assert len(build_examples(task, bare, DataSection(), labelled=False)[0]) == 3
    examples, findings = build_examples(task, bare, DataSection(), labelled=True)
    assert not examples and findings[0].level == "error" and findings[0].count == 3
    assert findings[0].examples[1] == "a.csv:3: no label or answer; filled in are `text`"


def test_unusable_rows_are_counted_named_and_refused_past_the_threshold() -> None:
    task = made("classification", THREE)
    many = rows(*[{"text": "x", "label": 2}] * 99, {"text": "", "label": 2})
    examples, (finding,) = build_examples(task, many, DataSection(), labelled=True)
    assert len(examples) == 99 and finding.level == "warning" and finding.count == 1
    assert "a.csv:101" in finding.examples[0]
    (finding,) = build_examples(task, many, DataSection(max_unusable=0.001), labelled=True)[1]
    assert finding.level == "error"


def test_fewer_than_two_labels_is_refused_and_says_where_it_looked() -> None:
    with pytest.raises(DataError, match=r"at least two.*`label`.*`stars`.*--label-field"):
        made("classification", rows({"text": "a", "stars": 1}, {"text": "b", "stars": 2}))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"god": "bad", "bad": "good"}, r"`bad`, `good`.*Received `god`, which no row has. Did you mean `good`\?"),
        ({"good": "yes", "baad": "no"}, r"Received `baad`.*Did you mean `bad`\?"),
        ({"1": "yes", "bad": "no"}, r"Received `1`, which no row has. Try one that is there\."),
    ],
)
def test_a_misspelt_value_is_refused(labels: dict[str, str], says: str) -> None:
    train = rows({"text": "a", "label": "good"}, {"text": "b", "label": "bad"})
    with pytest.raises(RecipeError, match=says):
        made("classification", train, labels=labels)


def test_a_value_that_no_row_has_may_be_named_where_all_that_they_have_are() -> None:
    assert made("scoring", THREE, labels={str(i): str(i) for i in range(12)}).labels[-1] == "11"
    by_name = rows({"text": "a", "label": "good"}, {"text": "b", "label": "bad"})
    assert made("classification", by_name, labels={"0": "bad", "1": "good"}).labels == ("bad", "good")


def test_a_header_is_found_whatever_its_capitals() -> None:
    train = rows({"Text": "a", "LABEL": "x"}, {"Text": "b", "LABEL": "y"})
    task = made("classification", train)
    example = task.example(train[1])
    assert (example.text, example.gold, task.labels) == ("b", 1, ("x", "y"))
    assert task.columns(train[0]) == {"text": "Text", "label": "LABEL"}
    both = rows({"Label": "Ms", "category": "x", "text": "a"}, {"Label": "Mr", "category": "y", "text": "b"})
    assert made("classification", both).labels == ("x", "y")  # a name that is written exactly so comes first


def test_a_field_that_the_task_does_not_read_is_refused() -> None:
    for name, hint in (("txt", r"Did you mean `text`\?"), ("nothing_like_it", "text, label")):
        with pytest.raises(RecipeError, match=rf"`data\.fields` must name what the task reads.*{hint}|{hint}.*{name}"):
            made("classification", THREE, data={"fields": {name: "text"}})
    own = {"fields": {"premise": "a", "claim": "b", "label": "c"}}
    assert made("classification", THREE, data=own, prompt="{{ premise }} So {{ claim }}?").labels


def test_an_own_wording_may_read_other_columns() -> None:
    train = rows({"premise": "p", "claim": "c", "label": 1}, {"premise": "q", "claim": "d", "label": 0})
    task = made("classification", train, prompt="{{ premise }} So {{ claim }}?\n")
    example = task.example(train[0])
    assert example.prompt == "p So c?\n" == example.text and example.candidates == ("0", "1")
    with pytest.raises(DataError, match=r"`premis`.*Did you mean `premise`"):
        made("classification", train, prompt="{{ premis }}").example(train[0])


def test_the_form_follows_the_model_and_what_cannot_be_is_refused() -> None:
    assert made("sst2").form == "verbalizer" == made("sst2", kind="masked").form
    assert made("sst2", kind="encoder").form == "head" == made("sst2", kind="masked", form="head").form
    with pytest.raises(UnsupportedError, match="encoder"):
        made("sst2", kind="encoder", form="verbalizer")
    with pytest.raises(RecipeError, match=r"objective.*causal"):
        made("sst2", kind="masked", objective="answer")
    for name in ("copa", "gsm8k", "chat"):
        with pytest.raises(UnsupportedError, match="causal"):
            made(name, kind="masked")


def test_a_head_reads_the_bare_text() -> None:
    assert only(made("sst2", kind="encoder"), {"text": "a film", "label": 0}).prompt == "a film"
    own = made("sst2", kind="encoder", prompt="Review: {{ text }}")
    assert only(own, {"text": "a film", "label": 0}).prompt == "Review: a film"


def test_a_masked_models_wording_needs_its_mask_once() -> None:
    own = made("sst2", kind="masked", prompt="{{ text }} All in all [MASK].")
    assert only(own, {"text": "a film", "label": 0}).prompt == "a film All in all [MASK]."
    with pytest.raises(RecipeError, match=r"\[MASK\] once"):
        made("sst2", kind="masked", prompt="{{ text }} All in all")
    with pytest.raises(RecipeError, match=r"\[MASK\] once"):
        made("sst2", kind="masked", masked_prompt="[MASK] {{ text }} [MASK]")


def test_scores_are_an_unbroken_scale_of_whole_numbers() -> None:
    train = rows({"text": "a", "score": 0}, {"text": "b", "score": "3.0"})
    task = made("scoring", train)
    assert task.labels == ("0", "1", "2", "3") and task.example(train[1]).gold == 3
    assert only(task, {"text": "c", "score": 2}).gold == 2  # not in train, and still on the scale
    with pytest.raises(DataError, match=r"whole numbers.*'2\.5'"):
        made("scoring", rows({"text": "a", "score": 1}, {"text": "b", "score": 2.5}))


def test_scores_are_judged_by_agreement_on_their_own_scale() -> None:
    task = made("scoring", rows({"text": "a", "score": 2}, {"text": "b", "score": 5}))
    gold = [0, 1, 2, 3, 3, 0]
    found = {
        s.name: s(np.arange(6))
        for s in task.statistics([said(p, g) for p, g in zip([0, 1, 3, 3, 2, 2], gold, strict=True)])
    }
    assert task.metric == "qwk" and next(iter(found)) == "qwk"
    assert found["exact_agreement"] == pytest.approx(3 / 6) and found["adjacent_agreement"] == pytest.approx(5 / 6)
    perfect = task.statistics([said(g, g) for g in gold])[0]
    assert perfect(np.arange(6)) == pytest.approx(1.0)


def test_metrics_need_labels_and_unknown_ones_are_refused_at_once() -> None:
    task = made("sst2", metric="macro_f1")
    assert task.metrics == ("macro_f1", "accuracy")
    assert [s.name for s in task.statistics([said(0, 0), said(1, 0)])] == ["macro_f1", "accuracy"]
    with pytest.raises(DataError, match="label"):
        task.statistics([said(0, None)])
    with pytest.raises(RecipeError, match=r"task\.metric.*acuracy.*`accuracy`"):
        made("sst2", metric="acuracy")
    with pytest.raises(RecipeError, match=r"task\.metric"):
        made("sst2", metric="qwk")
