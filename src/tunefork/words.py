"""How terminal, page and model card say things: names, numbers, intervals, sizes, durations, texts of others."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

MINUS = "\N{MINUS SIGN}"
_THIN = "\N{NARROW NO-BREAK SPACE}"
_METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "qwk": "quadratic weighted kappa",
    "kappa": "kappa",
    "exact_agreement": "exact agreement",
    "adjacent_agreement": "adjacent agreement",
    "absolute_smd": "|SMD|",
    "loss": "loss",
    "exact_match": "exact match",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "number": "right final numbers",
    "stopped": "ended by itself",
}
_LOWER_IS_BETTER = {"loss", "absolute_smd"}
_ADAPTERS = {
    "none": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "prefix": "prefix tuning",
    "head": "the trained head",
}
_BASELINES = {
    "majority": ("majority label", "always the most frequent label"),
    "tfidf": ("TF-IDF + logistic regression", "TF\N{NON-BREAKING HYPHEN}IDF with logistic regression"),
    "zero_shot": ("zero-shot", "the untrained model (zero-shot)"),
    "in_context": ("in-context", "the untrained model with examples in its prompt (in-context)"),
    "probe": ("linear probe", "the linear probe on frozen features"),
    "lead3": ("lead-3", "the first three sentences (lead-3)"),
}


def metric_name(metric: str) -> str:
    """`macro_f1` as it is written in a paper: `macro-F1`."""
    return _METRICS.get(metric, metric.replace("_", " "))


def higher_is_better(metric: str) -> bool:
    return metric not in _LOWER_IS_BETTER


def baseline_name(name: str) -> str:
    """For tables and plots."""
    return _BASELINES.get(name, (name.replace("_", " "), ""))[0]


def baseline_in_words(name: str) -> str:
    """For sentences: `the linear probe on frozen features`."""
    return _BASELINES.get(name, ("", name.replace("_", " ")))[1]


def system_name(recipe: Mapping[str, Any]) -> str:
    """What was trained, in a word: `LoRA`, `full fine-tuning`; with its method where that is not back-propagation."""
    adapter, method = str(recipe["adapter"]["name"]), str(recipe["train"]["method"])
    if method == "hosted":
        return "hosted fine-tuning"
    if (adapter, method) == ("none", "zo"):
        return "zeroth-order training"  # of all weights, or of an adapter that it makes itself
    name = _ADAPTERS.get(adapter, adapter)
    return name if method == "backprop" else f"{name} with {method}"


def short_name(name: str) -> str:
    """A model or task name without the folders before it."""
    return PurePath(name).name or name


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def decimal(value: float | None, signed: bool = False) -> str:
    """Three decimals, everywhere: `0.861`, `−0.020`; with `signed` also `+0.020`."""
    if value is None:
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None) -> str:
    """`0.838–0.883`, or `−0.020 to 0.041` where a dash could be taken for a sign; empty when there is none."""
    if low is None or high is None:
        return ""
    return f"{decimal(low)}{' to ' if low < 0 or high < 0 else '–'}{decimal(high)}"


def spread(figure: Mapping[str, Any]) -> str:
    """The interval of a metric; `no spread` where it has no width: the rows say nothing of how it varies."""
    low, high = figure["low"], figure["high"]
    return "no spread" if low is not None and low == high else interval(low, high)


def value(figure: Mapping[str, Any]) -> str:
    """`0.861 (0.838–0.883)`."""
    between = spread(figure)
    return decimal(figure["value"]) + (f" ({between})" if between else "")


def probability(p: float) -> str:
    """`p = 0.03`; below a thousandth only that."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}{_THIN}%"


def count(number: int, what: str = "") -> str:
    """`1,234`, or with a noun `1 row`, `1,234 rows`."""
    return f"{number:,}" if not what else f"{number:,} {what}{'' if number == 1 else 's'}"


def epochs(steps: int, per_epoch: int) -> str:
    """`1 epoch`, `0.5 epochs`: how often the training rows are gone through."""
    number = f"{round(steps / per_epoch, 2):g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def size(number: float | None) -> str:
    """Bytes in binary units: `1.50 GiB`."""
    if number is None:
        return "not measured"
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds is None:
        return "unknown"
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting(value: Any) -> str:
    """A recipe's value as it would be typed."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) or "none"
    return str(value)


def clean(text: str) -> str:
    """Text that any HTML page can hold: control characters and lone surrogates become a visible mark."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _unprintable(letter) else letter for letter in text)


def trimmed(text: str, most: int = 280) -> str:
    """At most about `most` characters, cut at a space where one is near, with spaces and line breaks made single."""
    text = re.sub(r"\s+", " ", clean(text)).strip()
    if len(text) <= most:
        return text
    cut = text[: most - 1]
    space = cut.rfind(" ", most * 3 // 4)
    cut = cut[:space] if space > 0 else cut
    while cut and (unicodedata.combining(text[len(cut)]) or text[len(cut)] in _JOINING or cut[-1] == _JOINER):
        cut = cut[:-1]  # never between a letter and its accent, or inside a joined emoji
    return f"{cut.rstrip()}\N{NO-BREAK SPACE}…"


_JOINER = "\N{ZERO WIDTH JOINER}"
_JOINING = {_JOINER, "\N{VARIATION SELECTOR-16}", *map(chr, range(0x1F3FB, 0x1F400))}


def _unprintable(letter: str) -> bool:
    return letter not in "\t\n\r" and unicodedata.category(letter) in ("Cc", "Cs")
