"""`ZO` as an optimizer: torch's interface, what it leaves behind, and what it writes."""

from __future__ import annotations

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.zo.conftest import Batch, batch_of, bits, row_losses, same_bits, tiny_net
from tunefork.zo import ZO, Reader, TrajectoryError, options_of, presets, release
from tunefork.zo.trajectory import Header


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trained(kind: str, batch: Batch, steps: int = 5, **options: Any) -> tuple[torch.nn.Module, ZO]:
    model = tiny_net(kind)
    opt = ZO(model, **{"queries": 2, "lr": 0.02, "rank": 2, "max_rank": 8, **options})
    for _ in range(steps):
        opt.step_batch(row_losses, batch)
    return model, opt


def test_torchs_schedules_set_the_step(batch: Batch) -> None:
    opt = ZO(tiny_net("llama"), queries=1, estimator="two_sided", rows="shared", lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (step + 1))
    for step in range(3):
        opt.step_batch(row_losses, batch)
        schedule.step()
        assert opt.last is not None
        assert opt.last.terms[0].coefficient == pytest.approx(-opt.last.gradients[0] / (step + 1), rel=1e-5)
    opt.step_batch(row_losses, batch, lr=7.0)
    assert opt.last.terms[0].coefficient == pytest.approx(-7 * opt.last.gradients[0], rel=1e-5)


def test_zero_grad_is_harmless_and_no_gradient_appears(batch: Batch) -> None:
    model, opt = trained("llama", batch)
    opt.zero_grad()
    opt.step_batch(row_losses, batch)
    assert all(p.grad is None for p in model.parameters())


def test_a_second_group_is_refused() -> None:
    opt = ZO(tiny_net("llama"))
    with pytest.raises(ValueError, match=r"Try ZO\(model, also=\[names\]\)"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_a_step_without_closure_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="Received no closure"):
        ZO(tiny_net("llama")).step()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_detaching_gives_the_model_back(kind: str, batch: Batch) -> None:
    model = tiny_net(kind)
    before, keys, weights = logits(model, batch), list(model.state_dict()), bits(model)
    with ZO(model, lr=0.05) as opt:
        for _ in range(4):
            opt.step_batch(row_losses, batch)
        assert list(model.state_dict()) == keys
        assert not torch.equal(logits(model, batch), before)
    assert torch.equal(logits(model, batch), before)
    assert same_bits(bits(model), weights)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"direction": "rademacher"}, {"momentum": 0.6, "normaliser": "rms"}])
def test_a_state_dict_goes_on_bit_for_bit(options: dict[str, Any], batch: Batch) -> None:
    model, opt = trained("llama", batch, **options)
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    for _ in range(3):
        opt.step_batch(row_losses, batch)
    again = tiny_net("llama")
    again.load_state_dict(weights)
    other = ZO(again, **{"queries": 2, "lr": 9.0, "rank": 2, "max_rank": 8, **options})
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.02
    for _ in range(3):
        other.step_batch(row_losses, batch)
    assert opt.last is not None and other.last is not None
    assert (other.last.step, other.last.loss, other.last.terms) == (opt.last.step, opt.last.loss, opt.last.terms)
    assert torch.equal(logits(model, batch), logits(again, batch))


def test_a_state_dict_is_as_small_as_an_adapter(batch: Batch) -> None:
    _, opt = trained("llama", batch)
    size = sum(v.numel() * v.element_size() for v in opt.state_dict()["learned"].values())
    factors = sum(b.numel() for _, b in opt.factors().values()) * 4
    assert size < 1.1 * factors + 100


def test_a_state_of_other_options_is_refused(batch: Batch) -> None:
    _, opt = trained("llama", batch)
    with pytest.raises(ValueError, match="`max_rank` 8, here it is 4"):
        ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", rank=2, max_rank=4).load_state_dict(
            opt.state_dict()
        )


def test_learned_state_of_other_shapes_changes_nothing(batch: Batch) -> None:
    _, opt = trained("llama", batch)
    state = {k: v.clone() for k, v in opt.learned().items()}
    state["0/factors"] = state["0/factors"][:, :-1]
    before = {k: v.clone() for k, v in opt.learned().items()}
    with pytest.raises(ValueError, match="`0/factors`"):
        opt.load_learned(state)
    assert all(torch.equal(v, before[k]) for k, v in opt.learned().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_adapter_is_read_by_plain_peft(kind: str, batch: Batch, tmp_path: Path) -> None:
    model, opt = trained(kind, batch)
    want = logits(model, batch)
    assert opt.finish(tmp_path / "adapter") == tmp_path / "adapter"
    assert not torch.allclose(logits(model, batch), want, atol=1e-3)
    again = PeftModel.from_pretrained(tiny_net(kind), str(tmp_path / "adapter"))
    assert torch.allclose(logits(again, batch), want, atol=1e-5)
    assert torch.allclose(logits(again.merge_and_unload(), batch), want, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert all("." not in name for name in config["target_modules"])
    with pytest.raises(RuntimeError, match=r"after finish\(\)"):
        opt.step_batch(row_losses, batch)


def test_the_adapter_of_a_classifier_brings_its_head(batch: Batch, tmp_path: Path) -> None:
    model, opt = trained("bert", batch)
    want = logits(model, batch)
    opt.finish(tmp_path / "adapter")
    base = tiny_net("bert")
    base.classifier.reset_parameters()  # as a fresh head is when the base is loaded
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.allclose(logits(again, batch), want, atol=1e-5)


def test_a_run_goes_on_in_its_trajectory(batch: Batch, tmp_path: Path) -> None:
    batches = [batch_of(seed=s) for s in range(8)]

    def run(path: Path | None, stop: int, model: torch.nn.Module, **options: Any) -> tuple[ZO, list[float]]:
        opt = ZO(
            model, queries=2, estimator="two_sided", rows="split", lr=0.02, momentum=0.5, trajectory=path, **options
        )
        return opt, [opt.step_batch(row_losses, b) for b in batches[:stop]]

    whole, losses = run(None, 8, tiny_net("llama"))
    path = tmp_path / "run.zo"
    run(path, 5, tiny_net("llama"))[0].detach()
    calls = []
    again, repeated = run(path, 5, tiny_net("llama"))
    assert repeated == losses[:5] and again.last is not None and again.last.forwards == 0
    again, repeated = run(path, 8, tiny_net("llama"))
    assert repeated == losses and not calls
    assert all(torch.equal(v, whole.learned()[k]) for k, v in again.learned().items())
    shut = ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", lr=0.02, momentum=0.5, trajectory=path)
    assert shut.catch_up() == 8 and shut.steps == 8
    assert all(torch.equal(v, whole.learned()[k]) for k, v in shut.learned().items())


def test_a_loaded_state_goes_on_from_its_step(batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    opt = ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", lr=0.02, trajectory=path)
    for step in range(6):
        opt.step_batch(row_losses, batch)
        if step == 3:
            kept = {k: v.clone() for k, v in opt.learned().items()}
    again = ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", lr=0.02, trajectory=path)
    again.load_learned(kept)
    assert again.catch_up() == 2
    assert all(torch.equal(v, opt.learned()[k]) for k, v in again.learned().items())
    ahead = ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", trajectory=tmp_path / "new.zo")
    with pytest.raises(ValueError, match=r"Received step 4, and .*new\.zo ends at 0"):
        ahead.load_learned(kept)


@pytest.mark.parametrize("change", [{"seed": 1}, {"queries": 3}, {"train": ["*q_proj*"]}, {"other": True}])
def test_another_runs_trajectory_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.zo"
    ZO(tiny_net("llama"), queries=2, estimator="two_sided", rows="split", trajectory=path)
    base = tiny_net("llama", seed=1 if change.pop("other", False) else 0)
    with pytest.raises(TrajectoryError, match="of another"):
        ZO(base, **{"queries": 2, "trajectory": path, **change})


def test_options_are_checked() -> None:
    model = tiny_net("llama")
    for change, words in {
        "preset": ("defualt", "Did you mean 'default'"),
        "rows": ("all", "one of shared, split"),
        "queries": (2.5, "from 1 to 65535"),
        "rank": (True, "a whole number from 1"),
        "max_rank": (30, "a multiple of `rank`, which is 4"),
        "epsilon": (0.0, "above 0"),
        "lr": (-1.0, "from 0"),
        "momentum": (1.0, r"in \[0, 0.99\]"),
    }.items():
        with pytest.raises(ValueError, match=words[1]):
            ZO(model, **{change: words[0]})
    with pytest.raises(ValueError, match="Did you mean 'momentum'"):
        ZO(model, momentun=0.9)
    with pytest.raises(ValueError, match="none or rms where `queries` is 1"):
        ZO(model, preset="fzoo", queries=1, estimator="two_sided", rows="split")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("seed", "1"),
        ("seed", None),
        ("seed", True),
        ("clip", "a"),
        ("clip_rms", "3"),
        ("momentum", "a"),
        ("momentum", float("nan")),
        ("beta", None),
        ("also", 3),
        ("also", [3]),
        ("train", None),
        ("lr", "1e-3"),
        ("epsilon", [1e-3]),
    ],
)
def test_what_is_no_number_or_name_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be .* Received {re.escape(repr(value))}\."):
        ZO(tiny_net("llama"), **{name: value})


def test_a_seed_of_numpy_is_the_same_seed(batch: Batch, tmp_path: Path) -> None:
    for name, seed in (("a", np.int64(3)), ("b", 3)):
        trained("llama", batch, seed=seed, trajectory=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_parameters_are_no_model() -> None:
    with pytest.raises(TypeError, match=r"The model itself must be given.* Received generator\. Try ZO\(model\)"):
        ZO(tiny_net("llama").parameters())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("run", [{}, {"seed": 0}, {"seed": 0, "options": 3}, {"seed": 0, "options": {"colour": 1}}])
def test_a_trajectory_without_seed_or_options_is_refused(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(Header(1, run=run).encode())
    with pytest.raises(ValueError, match="must name its seed and options"):
        ZO.from_trajectory(tiny_net("llama"), tmp_path / "t")


@pytest.mark.parametrize("step", [0.5, 6, -1, "2"])
def test_a_step_that_a_trajectory_does_not_have_is_refused(step: Any, batch: Batch, tmp_path: Path) -> None:
    trained("llama", batch, trajectory=tmp_path / "t")[1].detach()
    with pytest.raises(TrajectoryError, match=f"from 0 to 5, .* Received {step!r}"):
        ZO.from_trajectory(tiny_net("llama"), tmp_path / "t", step)


@pytest.mark.parametrize("direction", ["low_rank", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_inside_and_outside_of_inference_mode_are_the_same(
    direction: str, dtype: torch.dtype, batch: Batch
) -> None:
    found = []
    for inside in ((), (0, 2), (1,)):
        model = tiny_net("llama").to(dtype)
        opt = ZO(model, direction=direction, queries=2, lr=1e-3, epsilon=1e-2)
        for step in range(4):
            with torch.inference_mode(step in inside):
                opt.step_batch(row_losses, batch)
                opt.step(lambda model=model: model(batch["input_ids"], labels=batch["input_ids"]).loss)
        found.append(opt.learned())
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("direction", ["low_rank", "rademacher"])
def test_made_inside_of_inference_mode_it_steps_outside(direction: str, batch: Batch) -> None:
    found = []
    for inside in (False, True):
        model = tiny_net("llama").bfloat16()
        with torch.inference_mode(inside):
            opt = ZO(model, direction=direction, queries=1, estimator="two_sided", lr=1e-3)
        opt.step_batch(row_losses, batch)
        found.append(opt.learned())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("name", ["seed", "base", "options", "parameters", "queries", "start"])
def test_what_identifies_a_run_is_not_the_callers_to_set(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"must name what else decides a run\. Received {name}\."):
        ZO(tiny_net("llama"), trajectory=tmp_path / "t", run={name: 7})
    assert not (tmp_path / "t").exists()


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="must be JSON"):
        ZO(tiny_net("llama"), trajectory=tmp_path / "t", run={"when": object()})
    assert list(tmp_path.iterdir()) == []


def test_options_may_be_numpys(batch: Batch, tmp_path: Path) -> None:
    numbers = {"queries": np.int64(2), "rank": np.int32(2), "max_rank": np.int64(8), "clip": np.float32(1)}
    opt = ZO(tiny_net("llama"), lr=np.float32(1e-3), trajectory=tmp_path / "t", **numbers)
    opt.step_batch(row_losses, batch)
    torch.save(opt.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["options"]["queries"] == 2
    with pytest.raises(ValueError, match="`clip` must be a number above 0"):
        ZO(tiny_net("gpt2"), clip=float("inf"))


def test_a_header_that_differs_from_its_options_is_refused(tmp_path: Path) -> None:
    with ZO(tiny_net("llama"), queries=3, trajectory=tmp_path / "t"):
        pass
    header = replace(Reader(tmp_path / "t").header, queries=5)
    (tmp_path / "t").write_bytes(header.encode())
    with pytest.raises(TrajectoryError, match="`queries` 5 there, 3 here"):
        ZO.from_trajectory(tiny_net("llama"), tmp_path / "t")


def test_a_trajectory_stays_where_it_was_opened(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    trained("llama", batch, 3, trajectory="t")[1].detach()
    opt = ZO(tiny_net("llama"), queries=2, lr=0.02, rank=2, max_rank=8, trajectory="t")
    monkeypatch.chdir(tmp_path / "other")
    assert opt.catch_up() == 3


def test_a_trajectory_needs_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "t"):
        with pytest.raises(TrajectoryError, match="must be a file in a folder that is there"):
            ZO(tiny_net("llama"), trajectory=path)


def test_64_bit_weights_keep_their_bits(batch: Batch) -> None:
    model = tiny_net("llama").double()
    before, opt = bits(model), ZO(model, lr=0.0)
    opt.step_batch(lambda m, b: row_losses(m, b).float(), batch)
    opt.finish()
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("direction", ["low_rank", "rademacher"])
def test_a_copy_of_the_model_is_left_alone(direction: str, batch: Batch, tmp_path: Path) -> None:
    model, opt = trained("llama", batch, direction=direction)
    with pytest.warns(UserWarning, match="A copy of a model under ZO is of its base"):
        kept = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="A copy of a model under ZO is of its base"):
        torch.save(model, tmp_path / "model")
    then = logits(kept, batch)
    for _ in range(3):
        opt.step_batch(row_losses, batch)
    again = torch.load(tmp_path / "model", weights_only=False)
    assert torch.equal(logits(kept, batch), then) and torch.equal(logits(again, batch), then)
    if direction == "low_rank":
        assert torch.equal(then, logits(tiny_net("llama"), batch))
        ZO(kept).step_batch(row_losses, batch)  # nothing of the first is on it


def test_a_lost_optimizer_can_be_taken_off(batch: Batch) -> None:
    model = tiny_net("llama")

    def lost() -> None:
        ZO(model, lr=1.0).step_batch(row_losses, batch)

    lost()
    with pytest.raises(ValueError, match=r"tunefork\.zo\.release\(model\)"):
        ZO(model)
    other = ZO(tiny_net("llama", seed=1), lr=1.0)
    other.step_batch(row_losses, batch)
    release(other.model)  # and one that is not lost goes on with its next step
    other.step_batch(row_losses, batch)
    assert other.last is not None and bool(other.last.gradients.any())
    release(model)
    assert torch.equal(logits(model, batch), logits(tiny_net("llama"), batch))
    ZO(model).step_batch(row_losses, batch)


def test_a_constructor_that_raises_leaves_the_model_free() -> None:
    model = tiny_net("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no LoRA file"):
            ZO(model, also=["model.norm"])
    ZO(model).detach()


def test_a_tied_parameter_has_both_names() -> None:
    with pytest.warns(UserWarning, match=r"because of transformer\.wte\.weight changed in place"):
        opt = ZO(tiny_net("gpt2"), also=["lm_head"])
    assert "transformer.wte.weight" in [site.name for site in opt.sites]


class Shares(torch.nn.Module):
    """As encoder-decoders: the decoder's embedding has the shared one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.decoder = torch.nn.Embedding(9, 6), torch.nn.Module()
        self.decoder.embed_tokens, self.decoder.out = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6)
        self.decoder.embed_tokens.weight = self.shared.weight


def test_names_of_a_module_do_not_reach_what_it_shares() -> None:
    opt = ZO(Shares(), train=["decoder"])
    assert [site.name for site in opt.sites] == ["decoder.out.weight", "decoder.out.bias"]
    with pytest.warns(UserWarning, match="because of shared.weight"):
        assert len(ZO(Shares(), train=["decoder"], also=["decoder.embed_tokens"]).sites) == 3


def test_schedules_see_the_steps_of_a_batch(batch: Batch) -> None:
    opt = ZO(tiny_net("llama"))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step_batch(row_losses, batch)
        schedule.step()


class Numbered(torch.nn.Module):
    """Blocks whose layers are named by numbers, as those of `Sequential` are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [
            torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 12)) for _ in range(3)
        ]
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_the_adapter_of_numbered_layers_is_read_by_plain_peft(tmp_path: Path) -> None:
    model, x = Numbered(), torch.randn(5, 12)
    opt = ZO(model, lr=0.1)
    for _ in range(4):
        opt.step_batch(lambda m, b: (m(b) - 1).square().mean(1), x)
    want = model(x)
    opt.finish(tmp_path / "adapter")
    found = PeftModel.from_pretrained(Numbered(), tmp_path / "adapter")(x)
    assert torch.allclose(found, want, atol=1e-5) and not torch.allclose(found, model(x), atol=1e-3)


def test_presets_are_data() -> None:
    assert set(presets()) == {"default", "fzoo", "mezo"}
    mezo = options_of("mezo", {})
    assert (mezo.direction, mezo.queries, mezo.epsilon, mezo.estimator) == ("gaussian", 1, 1e-3, "two_sided")
    assert all(p.summary and p.paper for p in presets().values())


def test_blocks_are_trained_and_the_output_layer_is_not() -> None:
    names = {s.name for s in ZO(tiny_net("llama")).sites}
    assert len(names) == 2 * 7 and all(name.startswith("model.layers.") for name in names)
    assert {s.name for s in ZO(tiny_net("llama"), preset="mezo").sites} == set(
        dict(tiny_net("llama").named_parameters())
    )


def test_what_was_learned_is_kept_once(batch: Batch, tmp_path: Path) -> None:
    model = tiny_net("llama")
    opt = ZO(model, lr=1e-2)
    opt.step_batch(row_losses, batch)
    opt.finish()
    kept = bits(model)
    for folder in (None, tmp_path / "adapter"):
        with pytest.raises(RuntimeError, match="kept once"):
            opt.finish(folder)
    assert same_bits(kept, bits(model)) and not (tmp_path / "adapter").exists()


def test_a_step_after_the_block_is_refused(batch: Batch, tmp_path: Path) -> None:
    with ZO(tiny_net("llama"), trajectory=tmp_path / "t") as opt:
        opt.step_batch(row_losses, batch)
    with pytest.raises(RuntimeError, match="after its `with`"):
        opt.step_batch(row_losses, batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n in ("lr", "epsilon", "weight_decay") for v in (float("nan"), float("inf"), -1e-3)] + [("epsilon", 0)],
)
def test_numbers_are_checked_before_a_step(name: str, value: float, batch: Batch, tmp_path: Path) -> None:
    opt = ZO(tiny_net("llama"), trajectory=tmp_path / "t")
    opt.step_batch(row_losses, batch)
    kept = opt.param_groups[0][name]
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"`{name}` must be a number"):
        opt.step_batch(row_losses, batch)
    opt.param_groups[0][name] = kept
    opt.step_batch(row_losses, batch)
    assert opt.steps == Reader(tmp_path / "t").steps == 2


def test_a_second_optimizer_waits_for_the_first(batch: Batch) -> None:
    model = tiny_net("llama")
    first = ZO(model, lr=1e-2)
    first.step_batch(row_losses, batch)
    with pytest.raises(ValueError, match="one optimizer at a time"):
        ZO(model, seed=1)
    learned = row_losses(model, batch)
    first.detach()
    with ZO(model, seed=1) as second:
        second.step_batch(row_losses, batch)
        with pytest.raises(ValueError, match="one optimizer at a time"):
            first.step_batch(row_losses, batch)
    first.step_batch(row_losses, batch)
    assert first.steps == 2 and not torch.equal(learned, row_losses(model, batch))


def test_a_refused_trajectory_leaves_the_model_free(batch: Batch, tmp_path: Path) -> None:
    model = tiny_net("llama")
    ZO(model, trajectory=tmp_path / "t").detach()
    with pytest.raises(TrajectoryError):
        ZO(model, seed=1, trajectory=tmp_path / "t")
    with ZO(model, seed=1) as opt:
        opt.step_batch(row_losses, batch)


def test_one_number_makes_another_base(tmp_path: Path) -> None:
    model = tiny_net("llama")
    ZO(model, trajectory=tmp_path / "t").detach()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith("up_proj.weight"))[-1, -2] += 1e-3
    with pytest.raises(TrajectoryError, match="`base`"):
        ZO.from_trajectory(model, tmp_path / "t")


@pytest.mark.parametrize("also", ["model.norm", "model.embed_tokens", "lm_head"])
def test_what_is_no_lora_file_is_said_at_once(also: str, tmp_path: Path) -> None:
    model = tiny_net("llama")
    with pytest.warns(UserWarning, match="no LoRA file"):
        opt = ZO(model, also=also)
    assert also.rpartition(".")[2] in opt.no_lora_file
    with pytest.raises(ValueError, match=r"Try finish\(\)"):
        opt.finish(tmp_path / "adapter")
    opt.detach()
    assert ZO(model).no_lora_file == ""


def test_layers_that_the_loss_passes_by_are_named(batch: Batch) -> None:
    model, other = tiny_net("llama"), tiny_net("llama")
    opt = ZO(model)
    with pytest.warns(UserWarning, match="parameters were not read"):
        opt.step(lambda: row_losses(other, batch).mean())


@pytest.mark.parametrize("given", [None, "loss", torch.ones(2)])
def test_a_closure_gives_one_loss(given: Any) -> None:
    with pytest.raises(ValueError, match="A closure must return one fp32 loss"):
        ZO(tiny_net("llama")).step(lambda: given)


def test_a_step_without_rows_is_refused(batch: Batch) -> None:
    opt = ZO(tiny_net("llama"))
    for none in ((), ({k: v[:0] for k, v in batch.items()},)):
        with pytest.raises(ValueError, match="A step needs rows"):
            opt.step_batch(row_losses, *none)
