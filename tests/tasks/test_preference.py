"""Preferences: rendered as chats are, and DPO's loss as its paper writes it and as TRL computes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunefork.batch import Batch
from tunefork.data import Row
from tunefork.data.layouts import apply_layout
from tunefork.errors import DataError, RecipeError
from tunefork.models import inspect_model, load_base, load_model, load_tokenizer
from tunefork.recipe import AdapterSection, DataSection, ModelSection, TaskSection
from tunefork.render import Renderer
from tunefork.tasks import Example, Message, make_task, row_losses
from tunefork.train.prepare import prepare
from tunefork.workflows.finetune import as_recipe

PAIRS = [
    ("What colour is the boat?", "It is teal.", "The boat was in the harbour, and nobody knew."),
    ("Are you open on Sunday?", "No.", "Yes, we are."),
    ("Who is there?", "A friend of the house.", "I"),
]


def row(asked: str, better: str, worse: str) -> Row:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    before = [{"role": "system", "content": "Be short."}, {"role": "user", "content": asked}]
    outputs = {"preferred_output": said(better), "non_preferred_output": said(worse)}
    return Row({"input": {"messages": before}, **outputs}, "t", 1)


def renderer(kind: str, beta: float = 0.1) -> Renderer:
    section = TaskSection.model_validate({"name": kind, **({"beta": beta} if kind == "preference" else {})})
    task = make_task(section, DataSection(), "causal", ())
    return Renderer(load_tokenizer(inspect_model(ModelSection())), "causal", task, 512, False)


def examples(kind: Renderer) -> list[Example]:
    rows, findings = apply_layout([row(*pair) for pair in PAIRS], "auto", {})
    assert findings == []
    return [kind.task.example(one) for one in rows]


def batch_of(beta: float) -> Batch:
    kind = renderer("preference", beta)
    return kind.batch([r for example in examples(kind) for r in kind.render(example)], learn=True)


def adapted() -> Any:
    """The embedded model under a fresh adapter."""
    return load_model(
        inspect_model(ModelSection()),
        form="text",
        labels=(),
        adapter=AdapterSection(name="lora", rank=4),
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        activation_checkpointing=False,
        prefix_examples=None,
    )


@pytest.fixture(scope="module")
def tuned() -> Any:
    """The embedded model under an adapter that changes something."""
    model = adapted()
    _stir(model)
    return model


def _stir(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)


def test_each_reply_is_rendered_as_a_chat_that_ends_with_it() -> None:
    preferences, chats = renderer("preference"), renderer("chat")
    for example, (asked, *replies) in zip(examples(preferences), PAIRS, strict=True):
        (found,) = preferences.render(example)
        before = (Message("system", "Be short."), Message("user", asked))
        for candidate, reply in zip(found.candidates, replies, strict=True):
            (chat,) = chats.render(Example("t", messages=(*before, Message("assistant", reply))))
            assert (*found.ids, *candidate) == chat.ids
            assert (False,) * len(found.ids) + (True,) * len(candidate) == chat.trained


@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_the_loss_is_that_of_the_paper(tuned: Any, beta: float) -> None:
    """By hand in float64 from whole logits: no code of the loss under test."""
    kind = renderer("preference", beta)
    base = load_base(inspect_model(ModelSection()), "text", (), torch.device("cpu"), torch.float32)
    found = row_losses(tuned.eval(), batch_of(beta)).detach().numpy()
    for loss, example in zip(found, examples(kind), strict=True):
        (r,) = kind.render(example)
        gains = []
        for candidate in r.candidates:
            sums = []
            for model in (tuned, base):
                logits = model(torch.tensor([[*r.ids, *candidate]])).logits[0].detach().numpy().astype(np.float64)
                logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                start = len(r.ids) - 1
                sums.append(sum(logprobs[start + t, token] for t, token in enumerate(candidate)))
            gains.append(sums[0] - sums[1])
        assert abs(gains[0] - gains[1]) > 0.1
        assert loss == pytest.approx(math.log1p(math.exp(-beta * (gains[0] - gains[1]))), abs=1e-5)


def test_an_adapter_that_changes_nothing_prefers_nothing_and_learns_to() -> None:
    fresh = adapted()
    batch = batch_of(0.1)
    losses = row_losses(fresh.train(), batch)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert fresh.training
    losses.sum().backward()
    moved = [p for n, p in fresh.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        for parameter in moved:
            parameter -= 0.01 * parameter.grad.sign()
    assert (row_losses(fresh, batch) < losses).all()


def test_what_cannot_be_learned_from_is_refused() -> None:
    kind = renderer("preference")
    same, _ = apply_layout([row("Who?", "I.", "I.")], "auto", {})
    with pytest.raises(DataError, match="must differ"):
        kind.task.example(same[0])
    two = row("Who?", "I.", "You.")
    twice = {**two.values, "preferred_output": [{"role": "assistant", "content": "a"}] * 2}
    kept, findings = apply_layout([Row(twice, "t", 1)], "auto", {})
    assert kept == []
    assert "`preferred_output` is not one message" in findings[0].examples[0]
    model = load_base(inspect_model(ModelSection()), "text", (), torch.device("cpu"), torch.float32)
    with pytest.raises(RecipeError, match="--adapter lora"):
        row_losses(model, batch_of(0.1))


def test_full_training_has_no_model_to_be_held_to(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(dict(row(f"Who is {n}?", "I am.", "You are.").values)) for n in range(20)]
    file.write_text("\n".join(lines))
    recipe = {"task": "preference", "data": {"train": str(file)}, "evaluate": {"baselines": []}}
    with pytest.raises(RecipeError, match="adapter over a fixed model"):
        prepare(as_recipe({**recipe, "adapter": "none"}))
    job = prepare(as_recipe({**recipe, "adapter": "lora"}))
    assert job.renderer.objective == "preference"


def test_the_loss_is_that_of_trl(tmp_path: Path) -> None:
    """Where TRL is installed: the same model, adapter and rows through its trainer."""
    trl = pytest.importorskip("trl", reason="TRL is not installed; checked with 1.16.0")
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    facts = inspect_model(ModelSection())
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for asked, better, worse in PAIRS
    ]
    options = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(facts.folder, dtype=torch.float32),
        args=options,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(facts),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model = trainer.model.eval()
    _stir(model)
    for number in range(len(rows)):
        inputs = trainer.data_collator([trainer.train_dataset[number]])
        theirs = float(trainer.compute_loss(model, inputs).detach())
        kind = renderer("preference", 0.3)
        (ours,) = row_losses(model, kind.batch(kind.render(examples(kind)[number]), learn=True)).tolist()
        assert abs(theirs - math.log(2)) > 0.01
        assert ours == pytest.approx(theirs, abs=1e-5)
