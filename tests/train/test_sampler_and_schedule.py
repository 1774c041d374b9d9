"""What a step sees and how large it is: pure functions of the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from tunefork.train.sampler import Sampler, micro_batches
from tunefork.train.schedule import learning_rate


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_sees_every_row_once(rows: int, batch: int, seed: int) -> None:
    sampler = Sampler(rows, batch, seed)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        assert sorted(i for step in steps for i in sampler.step(step)) == list(range(rows))


@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 200))
def test_a_step_does_not_depend_on_the_steps_before(rows: int, batch: int, step: int) -> None:
    used = Sampler(rows, batch, 7)
    for before in range(step % 13):
        used.step(before)
    assert used.step(step) == Sampler(rows, batch, 7).step(step)


Labels = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@given(Labels, st.integers(1, 20), st.integers(0, 5))
def test_stratified_every_epoch_sees_every_row_once_and_every_step_each_label_in_proportion(
    labels: list[int], batch: int, seed: int
) -> None:
    sampler = Sampler(len(labels), batch, seed, labels)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.step(step) for step in steps]
        assert sorted(i for rows in batches for i in rows) == list(range(len(labels)))
        for rows in batches:
            assert 0 <= max(map(len, batches)) - len(rows) <= 1
            for label in set(labels):
                exact = labels.count(label) / sampler.steps_per_epoch
                assert abs(sum(labels[i] == label for i in rows) - exact) < 1
        assert (
            [sampler.step(step) for step in steps]
            == batches
            == [Sampler(len(labels), batch, seed, labels).step(s) for s in steps]
        )


@given(st.integers(0, 5))
def test_stratified_rows_that_meet_are_drawn_anew(seed: int) -> None:
    labels = [i % 3 for i in range(90)]
    sampler = Sampler(90, 6, seed, labels)
    epochs = [{frozenset(sampler.step(15 * epoch + i)) for i in range(15)} for epoch in range(3)]
    assert all(len(one & other) < 5 for one, other in ((epochs[0], epochs[1]), (epochs[1], epochs[2])))
    uneven = Sampler(31, 6, seed, [0] * 31)  # one batch has a row more than the others
    larger = {max(range(6), key=lambda i: len(uneven.step(6 * epoch + i))) for epoch in range(30)}
    assert len(larger) > 2


def test_epochs_and_seeds_differ() -> None:
    one = Sampler(50, 50, 0)
    assert one.step(0) != one.step(1)
    assert one.step(0) != Sampler(50, 50, 1).step(0)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_micro_batches_hold_the_step_sorted_by_length(lengths: list[int], size: int) -> None:
    groups = micro_batches(range(len(lengths)), lengths, size)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) <= size for group in groups)
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_after_warm_up_rates_are_those_of_transformers(name: str, theirs) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = theirs(optimizer, 0, 40)
    for step in range(40):
        ours = learning_rate(step, peak=0.5, steps=40, warmup=0.0, schedule=name)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@given(st.integers(1, 300), st.floats(0, 0.9), st.sampled_from(["linear", "cosine", "constant"]))
def test_the_rate_rises_to_its_peak_and_is_never_zero_at_first(steps: int, warmup: float, schedule: str) -> None:
    rates = [learning_rate(s, peak=1.0, steps=steps, warmup=warmup, schedule=schedule) for s in range(steps)]
    assert 0 < rates[0] <= 1
    assert max(rates) <= 1
    warm = int(warmup * steps)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
