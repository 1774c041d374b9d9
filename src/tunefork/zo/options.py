"""What can be chosen about a zeroth-order run, and the presets that choose it: data, one YAML file each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from numbers import Integral, Real
from typing import Any

import numpy as np
import yaml

from tunefork.zo.directions import DIRECTIONS
from tunefork.zo.estimators import ESTIMATORS
from tunefork.zo.updates import NORMALISERS, Rule


@dataclass(frozen=True, slots=True)
class Options:
    """A run's choices along every axis; checked when made.

    direction: low_rank, rademacher or gaussian.
    rank, max_rank: of one low-rank direction, and of all that a matrix can learn (a multiple).
    train, also: which parameters, see `sites.choose`.
    estimator: two_sided or one_sided.
    queries: directions a step. rows: `shared`, each sees the whole batch; `split`, each its own share of the rows.
    stack: copies of the batch in one pass; None: as many as keep the pass small; 1: one side after the other.
    lr, epsilon, weight_decay: the optimizer's first values; its `param_groups` may change them from step to step.
    The rest is `updates.Rule`'s.
    """

    direction: str = "low_rank"
    rank: int = 4
    max_rank: int = 32
    train: str | Sequence[str] = "auto"
    also: Sequence[str] = ()
    estimator: str = "two_sided"
    queries: int = 1
    rows: str = "shared"
    stack: int | None = None
    lr: float = 1e-5
    epsilon: float = 1e-3
    weight_decay: float = 0.0
    normaliser: str = "none"
    beta: float = 0.99
    momentum: float = 0.0
    clip: float | None = None
    clip_rms: float | None = None

    def __post_init__(self) -> None:
        _among("direction", self.direction, DIRECTIONS)
        _among("estimator", self.estimator, ESTIMATORS)
        _among("rows", self.rows, ("shared", "split"))
        _among("normaliser", self.normaliser, NORMALISERS)
        _hold("rank", self.rank, _whole(self.rank, 1), "a whole number from 1", "4")
        multiple = _whole(self.max_rank, self.rank) and self.max_rank % self.rank == 0
        within = multiple and self.max_rank < 1 << 16
        _hold("max_rank", self.max_rank, within, f"a multiple of `rank`, which is {self.rank}", f"{8 * self.rank}")
        _hold("queries", self.queries, _whole(self.queries, 1) and self.queries < 1 << 16, "from 1 to 65535", "8")
        _hold(
            "stack", self.stack, self.stack is None or _whole(self.stack, 1), "a whole number from 1, or null", "null"
        )
        for name, names in (
            ("train", [self.train] if isinstance(self.train, str) else self.train),
            ("also", self.also),
        ):
            listed = isinstance(names, Sequence) and all(isinstance(entry, str) for entry in names)
            _hold(name, names, listed, "names of parameters or modules", "a list of strings")
        check_numbers(self.lr, self.epsilon, self.weight_decay)
        _hold("beta", self.beta, _between(self.beta, 0, 1), "in [0, 1)", "0.99")
        momentum = _between(self.momentum, 0, 1) and self.momentum <= 0.99
        _hold("momentum", self.momentum, momentum, "in [0, 0.99]", "0.9")
        for name, bound, attempt in (("clip", self.clip, "null"), ("clip_rms", self.clip_rms, "3")):
            holds = bound is None or (_between(bound, 0, math.inf) and bound > 0)
            _hold(name, bound, holds, "a number above 0, or null", attempt)
        std_works = self.normaliser != "std" or self.queries > 1
        _hold("normaliser", self.normaliser, std_works, "none or rms where `queries` is 1", "rms")

    @property
    def rule(self) -> Rule:
        return Rule(self.normaliser, self.beta, self.momentum, self.clip, self.clip_rms)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `Options(**data)` takes."""
        plain = asdict(self)
        plain["also"] = list(self.also)
        plain["train"] = self.train if isinstance(self.train, str) else list(self.train)
        return plain


@dataclass(frozen=True, slots=True)
class Preset:
    """A named choice of options and where it comes from.

    batch, sampling: rows of a step that it is made for, `shuffled` or, where they have labels, `stratified`.
    metric: options that take others' place where a metric is raised, not a loss lowered.
    """

    name: str
    summary: str
    paper: str
    batch: int = 16
    sampling: str = "shuffled"
    metric: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for file in sorted(files("tunefork.zo").joinpath("presets").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
            own = {key: data.pop(key) for key in ("summary", "paper", "batch", "sampling", "metric") if key in data}
            found[name] = Preset(name, options=data, **own)
    return found


def preset_of(name: str) -> Preset:
    """Raises ValueError with a did-you-mean for an unknown name."""
    known = presets()
    _among("preset", name, known)
    return known[name]


def options_of(preset: str, changes: Mapping[str, Any]) -> Options:
    """A preset's options with some changed. Raises ValueError for an unknown preset, key or value."""
    chosen = {**preset_of(preset).options, **changes}
    chosen = {key: value.item() if isinstance(value, np.generic) else value for key, value in chosen.items()}
    if isinstance(chosen.get("also"), str):
        chosen["also"] = [chosen["also"]]
    names = [f.name for f in fields(Options)]
    for key in chosen:
        _among("an option", key, names)
    return Options(**chosen)


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises ValueError for what is none: noise depends on all of it."""
    _hold("seed", seed, isinstance(seed, Integral) and not isinstance(seed, bool), "a whole number", "0")
    return int(seed)


def logged_options(run: Mapping[str, Any]) -> tuple[int, Options]:
    """Seed and options that a trajectory's `run` names. Raises ValueError where it does not."""
    try:
        return check_seed(run["seed"]), Options(**run["options"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"A trajectory must name its seed and options. Received none that can be used: {error}"
        ) from None


def check_numbers(lr: float = 0.0, epsilon: float = 1.0, weight_decay: float = 0.0) -> None:
    """Raises ValueError for what no step can be made with."""
    _hold("lr", lr, _between(lr, 0, 1e6), "a number from 0", "1e-5")
    _hold("epsilon", epsilon, _between(epsilon, 0, 1e6) and epsilon > 0, "a number above 0", "1e-3")
    _hold("weight_decay", weight_decay, _between(weight_decay, 0, 1e6), "a number from 0", "0")


def _between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, Real) and low <= float(value) < high


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _among(name: str, value: Any, known: Any) -> None:
    if value not in known:
        near = get_close_matches(str(value), list(known), 1)
        raise ValueError(
            f"{name if ' ' in name else f'`{name}`'} must be one of {', '.join(known)}. Received {value!r}."
            f"{f' Did you mean {near[0]!r}?' if near else ''}"
        )


def _hold(name: str, value: Any, holds: bool, must: str, attempt: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {must}. Received {value!r}. Try {attempt}.")
