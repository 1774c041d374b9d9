"""Metrics of generated text against one or more references, each a float in 0..1 for one row.

Answers: normalised exact match and token F1 as in SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), final numbers as in
GSM8K (Cobbe et al. 2021, arXiv 2110.14168). Summaries: ROUGE-1, -2 and -L (Lin 2004), without stemming, and the
first-sentences baseline.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from tunefork.errors import DataError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUGE_TOKENS = re.compile(r"[a-z0-9]+")
_FINAL_NUMBER = re.compile(r"####\s*+(-?)\s*+\$?\s*+([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_SENTENCE_END = re.compile(r"""(?<![.!?…])[.!?…]++["'”’)\]]*+(?=\s+["'“‘(\[#]*(\w))|[。！？]++[」』”’）]*+""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-HJ-Z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Rev|Gen|Sen|Gov|Capt|Col|Lt|Sgt|vs|cf"
    r"|(?:[A-Za-z]\.)+[A-Za-z])\.$"
)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Precision, recall and their harmonic mean, 0..1."""

    precision: float
    recall: float
    f1: float


def _overlap(shared: int, predicted: int, reference: int) -> Overlap:
    if not shared:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = shared / predicted, shared / reference
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


def _required(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise DataError(
            f"`references` must be a list of at least one text. Received {references!r}. Try [answer] for a single one."
        )
    return references


def normalise_answer(text: str) -> str:
    """Lower case, then without ASCII punctuation, without English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, references: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals any normalised reference."""
    answer = normalise_answer(predicted)
    return float(any(answer == normalise_answer(reference) for reference in _required(references)))


def token_f1(predicted: str, references: Sequence[str]) -> float:
    """Best F1 over the references of the bags of normalised tokens; two answers that normalise to nothing score 1.0."""
    answer = normalise_answer(predicted).split()
    return max(_bag_f1(answer, normalise_answer(reference).split()) for reference in _required(references))


def _bag_f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted and not reference:
        return 1.0
    shared = (Counter(predicted) & Counter(reference)).total()
    return _overlap(shared, len(predicted), len(reference)).f1


def rouge_n(predicted: str, reference: str, n: int) -> Overlap:
    """ROUGE-n: overlap of n-grams (clipped counts) of lower-case runs of a-z and 0-9, as `rouge-score` cuts them."""
    if n < 1:
        raise DataError(f"`n` must be at least 1. Received {n}. Try 1 or 2.")
    said, right = _rouge_tokens(predicted), _rouge_tokens(reference)
    first = Counter(zip(*(said[start:] for start in range(n)), strict=False))
    second = Counter(zip(*(right[start:] for start in range(n)), strict=False))
    return _overlap((first & second).total(), first.total(), second.total())


def rouge_l(predicted: str, reference: str) -> Overlap:
    """ROUGE-L of whole texts: overlap by their longest common subsequence of tokens."""
    said, right = _rouge_tokens(predicted), _rouge_tokens(reference)
    return _overlap(_lcs_length(said, right), len(said), len(right))


def _rouge_tokens(text: str) -> list[str]:
    return _ROUGE_TOKENS.findall(text.lower())


def _lcs_length(a: list[str], b: list[str]) -> int:
    """Bit-parallel dynamic programme (Hyyro 2004): a zero bit in `row` is one step of the subsequence."""
    places: dict[str, int] = {}
    for place, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << place
    everything = (1 << len(a)) - 1
    row = everything
    for token in b:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def split_sentences(text: str) -> list[str]:
    """Sentences in order, stripped. A line break always ends one (a turn of a dialogue is a line).

    Within a line, `.`, `!`, `?` or `…` end a sentence before white space and a word that does not start in lower case,
    but not after an initial or a common English abbreviation; `。`, `！` and `？` always do.
    """
    sentences: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if (end[1] or "").islower() or _ABBREVIATION.search(line[max(start, end.end() - 16) : end.end()]):
                continue
            sentences.append(line[start : end.end()].strip())
            start = end.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def lead_n(text: str, n: int = 3) -> str:
    """The first n sentences joined by spaces: the summary that is hard to beat on news (all of a shorter text)."""
    if n < 1:
        raise DataError(f"`n` must be at least 1. Received {n}. Try 3.")
    return " ".join(split_sentences(text)[:n])


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, without `$` and thousands commas; None when there is none.

    The first, because a model that does not stop goes on to invent and answer another question.
    """
    found = _FINAL_NUMBER.search(text)
    return Decimal(found[1] + found[2].replace(",", "")) if found else None


def final_number_match(predicted: str, references: Sequence[str]) -> float:
    """1.0 when the prediction's `#### n` equals a reference's as a number (18 = 18.00); 0.0 when it has none.

    Raises DataError when a reference has no `#### n`.
    """
    numbers = [final_number(reference) for reference in _required(references)]
    if None in numbers:
        raise DataError(
            "Each reference must end in `#### <number>`. "
            f"Received {references[numbers.index(None)][-60:]!r}. Try exact match for answers in words."
        )
    return float(final_number(predicted) in numbers)
