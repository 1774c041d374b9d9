"""The mix-in with the real `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.zo.conftest import batch_of, bits, same_bits, tiny_net
from tunefork.zo import ZOTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore")


class ZOTrainer(ZOTrainerMixin, Trainer):
    pass


def rows_for(kind: str, count: int = 16) -> list[dict[str, Any]]:
    batch = batch_of(rows=count)
    labels = batch["label"] if kind == "bert" else batch["input_ids"]
    return [{"input_ids": i, "labels": y} for i, y in zip(batch["input_ids"], labels, strict=True)]


def trainer(kind: str, folder: Path, steps: int = 6, zo: dict[str, Any] | None = None, **changes: Any) -> ZOTrainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        **{
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            **changes,
        },
    )
    rows = rows_for(kind)
    zo = {"queries": 2, "estimator": "two_sided", **(zo or {})}
    run = ZOTrainer(tiny_net(kind, dropout=0.1), args, train_dataset=rows, eval_dataset=rows, zo=zo)
    run.loss_is_scaled_for_ga = kind == "llama"  # BERT's loss is a batch's mean, whatever its forward accepts
    return run


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_it_trains_with_schedule_and_accumulation(kind: str, tmp_path: Path) -> None:
    run = trainer(kind, tmp_path, gradient_accumulation_steps=2)
    before = bits(run.model)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.zo is not None and run.zo.steps == 6
    assert run.zo.mode == "both sides in one pass"
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([0.02 * (6 - i) / 6 for i in range(6)])
    assert logged[0]["loss"] == pytest.approx(first, rel=0.3)
    assert same_bits(before, bits(run.model))
    assert run.evaluate()["eval_loss"] != first


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    seen = []
    for size, times in ((8, 1), (4, 2)):
        run = trainer("bert", tmp_path, 3, per_device_train_batch_size=size, gradient_accumulation_steps=times)
        run.train()
        seen.append(torch.cat([b for _, b in run.zo.factors().values()]))  # pyright: ignore
    assert torch.allclose(*seen, rtol=2e-2, atol=1e-4)


def test_a_checkpoint_is_small_and_goes_on(tmp_path: Path) -> None:
    whole = trainer("llama", tmp_path / "a")
    whole.train()
    half = trainer("llama", tmp_path / "b", save_strategy="steps", save_steps=3)
    half.train()
    again = trainer("llama", tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for run in (half, again):
        assert all(torch.equal(v, whole.zo.learned()[k]) for k, v in run.zo.learned().items())  # pyright: ignore
    assert not (tmp_path / "b" / "checkpoint-3" / "model.safetensors").exists()


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    run = trainer("bert", tmp_path, load_best_model_at_end=True, **changes)
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-5)


@pytest.mark.parametrize(("kind", "also"), [("llama", ["model.norm"]), ("llama", ["lm_head"]), ("gpt2", ["lm_head"])])
def test_what_a_lora_file_cannot_hold_is_saved_in_the_model(kind: str, also: list[str], tmp_path: Path) -> None:
    whole = trainer(kind, tmp_path / "a", zo={"also": also})
    whole.train()
    ids = rows_for("llama")[0]["input_ids"][None]
    with torch.no_grad():
        want = whole.model.eval()(ids).logits
        whole.save_model(str(tmp_path / "out"))
        again = type(whole.model).from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(again(ids).logits, want, atol=1e-5)
        assert not torch.allclose(tiny_net(kind).eval()(ids).logits, want, atol=1e-2)
    half = trainer(kind, tmp_path / "b", save_strategy="steps", save_steps=3, zo={"also": also})
    half.train()
    again = trainer(kind, tmp_path / "b", zo={"also": also})
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert all(torch.equal(v, whole.zo.learned()[k]) for k, v in again.zo.learned().items())  # pyright: ignore
    changed = trainer(kind, tmp_path / "b", zo={"also": also})
    changed.model = type(whole.model).from_pretrained(tmp_path / "b" / "checkpoint-3")
    with pytest.raises(ValueError, match="goes on from the model it was begun on"):
        changed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))


def test_the_best_checkpoint_of_several_kinds_of_direction_is_loaded(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    run = trainer("bert", tmp_path, load_best_model_at_end=True, zo={"also": ["bert.pooler"]}, **changes)
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-5)


def test_without_the_optimizers_state_a_checkpoint_has_what_was_learned(tmp_path: Path) -> None:
    half = trainer("llama", tmp_path, 3, save_strategy="steps", save_steps=3, save_only_model=True)
    half.train()
    again = trainer("llama", tmp_path, 4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.zo is not None and half.zo is not None and again.zo.steps == 4
    third, fourth = half.zo.learned()["0/factors"], again.zo.learned()["0/factors"]
    visited = fourth.abs().sum(1) > 0
    assert int(visited.sum()) > int((third.abs().sum(1) > 0).sum())  # a base more than after three steps
    assert torch.allclose(third[third.abs().sum(1) > 0], fourth[third.abs().sum(1) > 0], atol=0.1)


def test_a_model_that_peft_wraps_is_saved_with_what_was_learned(tmp_path: Path) -> None:
    def wrapped(steps: int, folder: Path, **changes: Any) -> ZOTrainer:
        run = trainer("llama", folder, steps, **changes)
        torch.manual_seed(0)
        run.model = get_peft_model(
            tiny_net("llama"), LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False)
        )
        return run

    whole = wrapped(4, tmp_path / "a")
    whole.train()
    half = wrapped(4, tmp_path / "b", save_strategy="steps", save_steps=2)
    half.train()
    again = wrapped(4, tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(v, whole.zo.learned()[k]) for k, v in again.zo.learned().items())  # pyright: ignore
    ids = rows_for("llama")[0]["input_ids"][None]
    whole.save_model(str(tmp_path / "out"))
    with torch.no_grad():
        plain = PeftModel.from_pretrained(tiny_net("llama"), str(tmp_path / "out")).eval()
        assert torch.allclose(plain(ids).logits, whole.model.eval()(ids).logits, atol=1e-5)


def test_what_is_saved_is_an_adapter(tmp_path: Path) -> None:
    run = trainer("llama", tmp_path)
    run.train()
    run.save_model(str(tmp_path / "out"))
    ids = rows_for("llama")[0]["input_ids"][None]
    with torch.no_grad():
        want = run.model.eval()(ids).logits
        again = PeftModel.from_pretrained(tiny_net("llama"), str(tmp_path / "out")).eval()
        assert torch.allclose(again(ids).logits, want, atol=1e-5)


def test_dense_directions_save_the_model(tmp_path: Path) -> None:
    run = trainer("bert", tmp_path, 2, zo={"direction": "rademacher", "queries": 1})
    before = bits(run.model)
    run.train()
    assert not same_bits(before, bits(run.model))
    run.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
