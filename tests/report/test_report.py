"""The page as a whole: what it says for every kind of run, and that nothing of others' texts can act in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report import runs
from tunefork.errors import MissingFileError, RunError
from tunefork.metrics import ConfusionStatistic, paired_difference
from tunefork.report import render_report, write_report
from tunefork.run import RunFolder
from tunefork.tasks import Prediction

HOSTILE = [
    "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>",
    "</style></svg><!-- \" onmouseover='alert(1)'",
    "هذا نص عربي مع English داخل السطر \u202e override",
    "emoji 👩‍👩‍👧‍👦🇩🇪 " * 30,
    "W" * 5000,
    "nul \x00 bell \x07 lone \ud800 end",
    "$\\frac{1}{2}$ {{ 7*7 }} {% raw %}",
]
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """A page's tags, attributes and texts; every tag must be closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.texts))


def read(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_verdict_is_the_paired_test_against_the_best_baseline(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    ours, tfidf = result["test"]["accuracy"], result["baselines"]["tfidf"]["accuracy"]
    assert all(b["accuracy"]["value"] <= tfidf["value"] for b in result["baselines"].values())
    paired = paired_difference(_accuracy(tmp_path / "run", "test"), _accuracy(tmp_path / "run", "test-tfidf"), 400)
    said = next(t for t in page.texts if t.startswith("LoRA reached"))
    assert said.replace("\u202f", " ").replace("\u2011", "-") == (
        f"LoRA reached accuracy {ours['value']:.3f} ({ours['low']:.3f}–{ours['high']:.3f}) on 400 test rows; the "
        "best baseline, TF-IDF with logistic regression, "
        f"{tfidf['value']:.3f} ({tfidf['low']:.3f}–{tfidf['high']:.3f}); the "
        f"difference is {paired.difference:.3f}, 95 % interval {paired.low:.3f}–{paired.high:.3f}."
    )
    assert "Better than the best baseline" in page.text


@pytest.mark.parametrize(
    ("right", "headline", "says"),
    [(0.79, "No clear difference", "which includes zero"), (0.6, "A baseline is better", ": the baseline is better.")],
)
def test_it_does_not_overclaim(tmp_path: Path, right: float, headline: str, says: str) -> None:
    page = read(runs.classification_run(tmp_path / "run", right=right))
    assert headline in page.text
    assert says in page.text
    assert "−0." in page.text
    assert "Better than" not in page.text


def test_lower_is_better_for_a_loss(tmp_path: Path) -> None:
    page = read(runs.chat_run(tmp_path / "run"))
    assert "Better than the best baseline" in page.text
    assert "(lower is better)" in page.text
    assert "0.933" in page.text  # 28 of 30 answers ended by themselves
    assert "Answers beside references" in page.text
    assert "cut off at the longest length allowed" in page.text


def test_generation_shows_answers_beside_references(tmp_path: Path) -> None:
    page = read(runs.generation_run(tmp_path / "run"))
    assert "Answers that ended by themselves: LoRA 100" in page.text
    assert page.text.count("way of Rushlow (39)") >= 1  # the last row: samples span all of them
    assert "Gained: 40 rows" in page.text
    assert re.search(r"ROUGE-L \+0\.\d{3}", page.text)
    assert "Lead-3" in page.text


def test_without_test_rows_nothing_is_claimed(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "a", test=(), baselines={}))
    assert "there were no test rows, so on new text expect less" in page.text
    assert "Result against baselines" not in page.text
    blind = read(runs.classification_run(tmp_path / "b", test=(), baselines={}, looks=False, findings=[]))
    assert "nothing is known of how good it is" in blind.text
    assert "The check found nothing to say." in blind.text


def test_without_baselines_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "run", baselines={}))
    assert "no baseline was measured beside it" in page.text
    assert "Gained and lost" not in page.text
    assert "Confusions" in page.text


SAID_OF_FEW = ([1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1])


def test_few_rows_are_no_proof(tmp_path: Path) -> None:
    """The interval of a difference in four rows of eight leaves out zero, and yet p is 0.12."""
    ours, theirs = ([Prediction(f"t:{i}", "ab"[k], "b", k, 1) for i, k in enumerate(said)] for said in SAID_OF_FEW)
    page = read(runs.classification_run(tmp_path / "run", labels=("a", "b"), test=ours, baselines={"probe": theirs}))
    assert "No clear difference to the best baseline" in page.text
    assert re.search(r"interval 0\.\d+–0\.\d+, but p = 0\.1\d in the paired test: these rows do not tell", page.text)


@pytest.mark.parametrize(("steps", "says"), [(50, "(1 epoch)"), (120, "(2.4 epochs)"), (25, "(0.5 epochs)")])
def test_epochs_are_those_of_the_plan(steps: int, says: str, tmp_path: Path) -> None:
    assert says in read(runs.classification_run(tmp_path / "run", steps=steps)).text


def test_all_right_is_no_certainty(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "run", n=60, right=1.0))
    assert "accuracy 1.000 (0.940–1.000) on 60 test rows" in page.text


def test_an_interval_without_width_is_explained(tmp_path: Path) -> None:
    scores = ("0", "1", "2", "3")
    recipe = {"task": "scoring", "adapter": "none"}
    page = read(runs.make_run(tmp_path / "run", recipe, labels=scores, test=runs.labelled(scores, 1.0, 60, 5)))
    assert (
        "macro-F1: no spread over resamples of 60 rows, which does not make it exact. All are right; up to about 5 %"
        in (page.text)
    )
    assert "quadratic weighted kappa 1.000 (no spread) on 60 test rows" in page.text


def test_nothing_is_said_to_be_right_where_nothing_is(tmp_path: Path) -> None:
    """The kappa of a constant guess is 0 on any rows: it has no spread either."""
    recipe = {"task": "scoring", "adapter": "none"}
    test = [Prediction(f"test.csv:{i}", "0", str(i % 2), index=0, gold_index=i % 2) for i in range(40)]
    page = read(runs.make_run(tmp_path / "run", recipe, labels=("0", "1"), test=test))
    assert "no spread over resamples of 40 rows" in page.text
    assert "rule of three" not in page.text


def test_one_step(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "run", steps=1))
    assert page.tags.count("svg") == 3  # dots, loss, dev; a single learning rate is no curve


def test_many_classes_become_lists(tmp_path: Path) -> None:
    page = read(runs.many_classes_run(tmp_path / "run"))
    assert "With 77 classes a matrix would" in page.text
    assert "Largest confusions" in page.text
    assert "Lowest F1" in page.text
    assert "right ↓" not in page.text


def test_the_matrix_counts_every_row(tmp_path: Path) -> None:
    test = [
        Prediction(f"t:{i}", "abc"[said], "abc"[g], said, g)
        for i, (g, said) in enumerate([(0, 0), (0, 0), (0, 1), (1, 1)])
    ]
    write_report(runs.classification_run(tmp_path / "run", labels=("a", "b", "c"), test=test, baselines={}))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r'<td class="cell[^>]*>(?:(\d+)\u202f%<small>)?(\d+)', html)
    assert cells == [
        ("67", "2"),
        ("33", "1"),
        ("", "0"),
        ("", "0"),
        ("100", "1"),
        ("", "0"),
        ("", "0"),
        ("", "0"),
        ("", "0"),
    ]


def test_hostile_texts_are_only_texts(tmp_path: Path) -> None:
    labels = ["<script>alert(1)</script>", "w" * 400, "ممتاز", 'a & "b"', "<b>"]
    finding = {
        "level": "warning",
        "code": "x",
        "message": HOSTILE[0],
        "count": 9,
        "examples": HOSTILE,
        "advice": HOSTILE[1],
        "split": "train",
    }
    run = runs.classification_run(
        tmp_path / "run",
        labels=labels,
        test=runs.labelled(labels, 0.8, 200, 1),
        baselines={"probe": runs.labelled(labels, 0.6, 200, 2)},
        texts=HOSTILE,
        findings=[finding],
    )
    page = read(run)
    assert not {"script", "img", "b", "iframe", "link", "base", "object"} & set(page.tags)
    assert not [(t, n) for t, n, _ in page.attributes if n.startswith("on")]
    assert page.tags.count("style") == 1
    assert "<script>alert('x')</script>" in page.text  # still readable
    assert "{{ 7*7 }}" in page.text
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "\x00" not in text
    assert "W" * 300 not in text
    assert len(text) < 300_000


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "run"))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    links = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "srcset")]
    assert all(value.startswith("#") for value in links)
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


def test_plots_are_text_and_follow_the_pages_colours(tmp_path: Path) -> None:
    write_report(runs.classification_run(tmp_path / "run"))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(plots) == 5
    assert ">TF-IDF + logistic regression</text>" in plots[0]
    assert "var(--accent)" in plots[0]
    assert not any(re.search(r"(fill|stroke): #", plot) for plot in plots)
    assert not any("font-family" in plot for plot in plots)
    identifiers = re.findall(r'\bid="([^"]*)"', html)
    assert len(identifiers) == len(set(identifiers))


def test_a_zeroth_order_run_shows_its_slopes_and_what_it_cost(tmp_path: Path) -> None:
    write_report(runs.zo_run(tmp_path / "run"))
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert captions[1] == "Training quadratic weighted kappa, each step and smoothed"
    assert captions[2].startswith("Quadratic weighted kappa on dev against row-forwards")
    assert captions[3].startswith("Projected gradients")
    looks = re.search(r'<svg class="looks".*?</svg>', html, flags=re.DOTALL)
    assert looks is not None and all(f">{n}</text>" in looks[0] for n in ("0", "24,000"))  # to 2,600 + 119 x 192
    for note in ("Calibration: epsilon 0.003", "both sides in one pass", "where nothing else is said"):
        assert note in html


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = runs.classification_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_the_recipe_says_why_and_how_to_run_it_again(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "a run; it's mine"))
    assert "the longest row has 97 tokens" in page.text
    assert re.search(r"train.learning_rate\s+0.0002\s+lora, 3M parameters", page.text)
    assert re.search(r"adapter.name\s+lora\s+given", page.text)
    assert "tunefork train '" in page.text
    assert """a run; it'"'"'s mine/recipe.yaml' --out""" in page.text
    assert "380 MiB (−3\u202f%)" in page.text
    assert "torch 2.13.0" in page.text


def test_a_large_run_gives_a_small_page(tmp_path: Path) -> None:
    run = runs.classification_run(tmp_path / "run", steps=3000, n=60)
    assert write_report(run).stat().st_size < 150_000


def test_texts_need_not_be_kept(tmp_path: Path) -> None:
    page = read(runs.classification_run(tmp_path / "run", texts=None))
    assert re.search(r"test\.csv:\d+", page.text)


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match="must be a finished run"):
        write_report(runs.classification_run(tmp_path / "a", finished=False))
    run = runs.classification_run(tmp_path / "b")
    probe = run / "predictions" / "test-probe.jsonl"
    probe.write_text("".join(probe.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match=r"400 test rows.*test-probe\.jsonl has 399"):
        write_report(run)
    probe.unlink()
    with pytest.raises(RunError, match=r"test-probe\.jsonl has 0"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_run_that_is_being_written_can_render_its_own(tmp_path: Path) -> None:
    path = runs.classification_run(tmp_path / "run", n=60)
    with RunFolder.open(path, write=True) as run:
        html = render_report(run)
        with pytest.raises(RunError, match="Only one process"):
            write_report(path)
    assert html == write_report(path).read_text(encoding="utf-8")


def _accuracy(run: Path, name: str) -> ConfusionStatistic:
    lines = [json.loads(line) for line in (run / "predictions" / f"{name}.jsonl").read_text().splitlines()]
    return ConfusionStatistic("accuracy", [p["index"] for p in lines], [p["gold_index"] for p in lines], 3)
