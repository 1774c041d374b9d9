"""The method zo's learning rate and epsilon: measured unless given, and a rate above the measured one is held there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.recovery.watched_os import Killed
from tests.stopping import StopAt
from tunefork.errors import Interrupted, RecipeError, TrainingError
from tunefork.methods import zo
from tunefork.run import RunFolder
from tunefork.workflows import finetune
from tunefork.zo import ZO
from tunefork.zo.options import preset_of

Train = Callable[..., tuple[list[float], str]]
STEPS = 10  # the calibration of few rows ends with the eighth


@pytest.fixture
def train(tiny: Callable[[str], Path], tmp_path: Path) -> Train:
    """Trains; gives the rates of all steps and the notes."""
    file = tmp_path / "rows.csv"
    words = ("box", "screen", "film", "report")
    file.write_text("text,label\n" + "".join(f"{words[i % 4]} {words[i // 3 % 4]} {i},{i % 2}\n" for i in range(40)))
    made = 0

    def run(
        section: dict[str, Any], *, stop: int | None = None, kill: bool = False, **settings: Any
    ) -> tuple[list[float], str]:
        nonlocal made
        made += 1
        recipe = {
            "model": {"name": str(tiny("llama")), "device": "cpu"},
            "task": "classification",
            "adapter": "none",
            "data": {"train": str(file), "test_fraction": 0, "dev_fraction": 0.1, "max_leaked": 1},
            "train": {
                "method": "zo",
                "schedule": "constant",
                "warmup": 0,
                "batch_size": 2,
                "max_steps": STEPS,
                "save_every": 1,
                **settings,
            },
            "zo": section,
            "evaluate": {"baselines": []},
            "out": str(tmp_path / f"run{made}"),
        }
        if stop is not None:
            with pytest.raises(Killed if kill else Interrupted):
                finetune(recipe, listener=StopAt(stop, Killed if kill else KeyboardInterrupt))
        done = finetune(recipe, resume=stop is not None)
        log = RunFolder.open(done.path, write=False).read_log()
        return [e["learning_rate"] for e in log if e["kind"] == "step"], " ".join(done.result["train"]["notes"])

    return run


def test_a_rate_too_high_is_held_and_a_lower_one_kept(train: Train) -> None:
    own, said = train({})
    assert "learning rate is" not in said and own[-1] == own[7] > 0
    too_high = min(0.9, 100 * own[-1])
    high, said = train({}, learning_rate=too_high)
    assert high == pytest.approx(own, rel=1e-9)
    assert f"The learning rate is {own[-1]:g}, not {too_high:g}, which needs zo.calibrate=false" in said
    low, said = train({}, learning_rate=own[-1] / 1000)
    assert low == pytest.approx([own[-1] / 1000] * STEPS) and "as given" in said
    resumed, _ = train({}, learning_rate=too_high, stop=9)
    assert resumed == high


def test_a_rate_that_becomes_too_high_is_held_from_then_on_and_once_said(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zo, "CALIBRATE_EVERY", 4)
    calibrate, rate = ZO.calibrate, 1e-4

    def ever_lower(self: ZO, *arguments: Any, **more: Any) -> Any:
        found = calibrate(self, *arguments, **more)
        low = self.steps in held or self.steps >= 12
        return replace(found, lr=rate * (0.5 / self.steps if low else 2.0))

    monkeypatch.setattr(ZO, "calibrate", ever_lower)
    held = set[int]()
    for stop in (None, 15):
        rates, said = train({}, learning_rate=rate, max_steps=18, stop=stop)
        assert rates == pytest.approx([rate] * 12 + [rate * 0.5 / 12] * 4 + [rate * 0.5 / 16] * 2)
        assert said.count("as given") == 2 and said.count(f"not {rate:g}, which needs zo.calibrate=false") == 1
    held = {3}
    rates, said = train({}, learning_rate=rate, max_steps=18)
    assert said.count("as given") == 2 and said.count(f"not {rate:g}, which needs zo.calibrate=false") == 2


def test_epsilon_given_is_kept_and_the_rate_measured_with_it(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    step, used = ZO.step_batch, set[float]()

    def seen(self: ZO, *arguments: Any, **more: Any) -> Any:
        used.add(self.param_groups[0]["epsilon"])
        return step(self, *arguments, **more)

    monkeypatch.setattr(ZO, "step_batch", seen)
    rates, said = train({"epsilon": 0.02})
    assert "epsilon 0.02 is the one given" in said and rates[-1] > 0
    train({"epsilon": 0.02}, stop=9)
    _, said = train({"epsilon": 0.02, "objective": "accuracy"}, batch_size=16)
    assert "epsilon 0.02 was given, and" in said
    assert used == {0.02}


def test_an_epsilon_at_which_nothing_bends_is_refused(train: Train) -> None:
    with pytest.raises(TrainingError, match=r"does not, at epsilon 1e-20\. Try a larger zo\.epsilon"):
        train({"epsilon": 1e-20})


def test_uncalibrated_the_rates_are_the_given_and_the_preset_s(train: Train) -> None:
    given = {"learning_rate": 0.5}
    for section in ({"calibrate": False}, {"epsilon": 1e-3}):
        rates, said = train(section, **given)
        assert rates == [0.5] * STEPS and "Calibration" not in said
    rates, _ = train({"calibrate": False, "preset": "mezo"})
    assert rates == [preset_of("mezo").options["lr"]] * STEPS


def test_the_schedule_shapes_the_measured_rate(train: Train) -> None:
    constant, _ = train({})
    linear, _ = train({}, schedule="linear")
    assert linear[0] == constant[0]  # the loss bends as it did; after that the two models differ
    assert linear == pytest.approx([rate * (STEPS - i) / STEPS for i, rate in enumerate(constant)], rel=0.2)


def test_a_long_run_goes_on_measuring_and_is_resumed_with_what_it_had(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zo, "CALIBRATE_EVERY", 12)
    at, calibrate = list[int](), ZO.calibrate

    def seen(self: ZO, *arguments: Any, **more: Any) -> Any:
        at.append(self.steps)
        return calibrate(self, *arguments, **more)

    monkeypatch.setattr(ZO, "calibrate", seen)
    rates, said = train({}, max_steps=30)
    assert at == [*range(8), 12, 24] and said.count("Calibration") == 2
    assert all(later <= rates[7] for later in rates[8:])
    resumed, _ = train({}, max_steps=30, stop=20)
    assert resumed == rates
    for killed_at in (6, 14, 26):  # the checkpoint is older than the last step that was measured
        resumed, _ = train({}, max_steps=30, save_every=10, stop=killed_at, kill=True)
        assert resumed == rates


def test_a_recipe_that_leaves_open_what_was_measured_resumes(train: Train) -> None:
    """As `compare` hands its cells on: every key given, nulls too."""
    rates, _ = train({"calibrate": None}, learning_rate=None, stop=3)
    assert len(rates) == STEPS


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"preset": "mezo", "rank": 2}, r"`zo.rank` is read where directions are low_rank. Received gaussian ones"),
        ({"direction": "rademacher", "max_rank": 8}, r"`zo.max_rank` is read where .* Received rademacher ones"),
        ({"queries": 1, "rows": "split"}, r"`zo.rows=split` shares rows among queries. Received one query"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(train: Train, section: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        train(section)
