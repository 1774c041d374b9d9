"""Losses and scores: what a plain computation over the whole text gives, whatever the batch looks like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.render.scenes import task
from tests.tiny import CAUSAL
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, loss, row_losses, row_scores
from tunefork.tasks.loss import Hits

Folder = Callable[[str], Path]

ASKED = [
    Example("r:1", prompt="It was great! It was", candidates=(" terrible", " okay", " truly wonderful"), gold=2),
    Example("r:2", prompt="Bad. It was", candidates=(" terrible", " not good nor bad"), gold=0),
    Example(
        "r:3", prompt="The delivery was fast and the box arrived in one piece. It", candidates=(" broke", " is"), gold=1
    ),
]
ONE_TOKEN = [
    Example("r:1", prompt="Is it good?\n", candidates=("y", "n"), gold=1),
    Example("r:2", prompt="Is the capital of France Paris or not?\n", candidates=("y", "n", "m"), gold=2),
]
ANSWERED = [
    Example("r:1", prompt="Question: the capital?\nAnswer:", answer=" Paris."),
    Example("r:2", prompt="Summary:", answer=" Anna and Tom will meet at noon to talk."),
]


def causal(tiny: Folder, kind: str, asked: str, **section: Any) -> tuple[torch.nn.Module, Renderer]:
    """In fp64, so that what differs between batches is the arithmetic and not its rounding."""
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny(kind))
    return model, Renderer(tokenizer, "causal", task(asked, **section), 200, False)


def plain(model: torch.nn.Module, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [T, V] of the whole text, alone, without padding."""
    return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)


def text_loss(model: torch.nn.Module, r: Rendered) -> float:
    table = plain(model, r.ids)
    return -sum(float(table[t - 1, r.ids[t]]) for t, use in enumerate(r.trained) if use and t)


@pytest.mark.parametrize("kind", CAUSAL)
def test_text_is_the_sum_over_trained_tokens(tiny: Folder, kind: str) -> None:
    model, r = causal(tiny, kind, "gsm8k")
    rendered = [one for e in ANSWERED for one in r.render(e)]
    batch = r.batch(rendered)
    with torch.no_grad():
        losses = row_losses(model, batch)
        wanted = [text_loss(model, one) for one in rendered]
    assert losses.dtype == torch.float32 and losses.tolist() == pytest.approx(wanted, rel=1e-6)
    assert batch.weights.tolist() == [sum(one.trained) for one in rendered]


@pytest.mark.parametrize("kind", CAUSAL)
def test_candidates_are_compared_by_their_mean_log_probability_a_token(tiny: Folder, kind: str) -> None:
    model, r = causal(tiny, kind, "sst2")
    rendered = [one for e in ASKED for one in r.render(e)]
    assert any(one.fanned_out for one in rendered)
    with torch.no_grad():
        scores, losses = row_scores(model, r.batch(rendered)), row_losses(model, r.batch(rendered))
        for row, one in enumerate(rendered):
            means = []
            for candidate in one.candidates:
                table = plain(model, one.ids + candidate)
                at = range(len(one.ids), len(one.ids) + len(candidate))
                means.append(sum(float(table[t - 1, candidate[t - len(one.ids)]]) for t in at) / len(candidate))
            wanted = torch.log_softmax(torch.tensor(means), dim=0)
            assert scores[row, : len(means)].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
            assert all(value == -torch.inf for value in scores[row, len(means) :])
            assert float(losses[row]) == pytest.approx(-float(wanted[one.example.gold or 0]), abs=1e-5)


def test_candidates_of_one_token_give_the_same_as_a_sequence_each(tiny: Folder) -> None:
    model, r = causal(tiny, "llama", "rte")
    rendered = [one for e in ONE_TOKEN for one in r.render(e)]
    assert not any(one.fanned_out for one in rendered)
    with torch.no_grad():
        scores = row_scores(model, r.batch(rendered))
        for row, one in enumerate(rendered):
            at_last = plain(model, one.ids)[-1, torch.tensor([c[0] for c in one.candidates])]
            assert scores[row, : len(one.candidates)].tolist() == pytest.approx(
                torch.log_softmax(at_last, dim=0).tolist(), abs=1e-5
            )
            assert torch.exp(scores[row]).sum().item() == pytest.approx(1.0, abs=1e-5)


KINDS = {"gsm8k": ANSWERED, "sst2": ASKED, "rte": ONE_TOKEN}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_neither_padding_nor_company_nor_order_changes_a_loss(tiny: Folder, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KINDS)))
    kind = data.draw(st.sampled_from(["llama", "gpt2", "opt"]))
    model, r = MODELS.setdefault((kind, name), causal(tiny, kind, name))
    rendered = [one for e in KINDS[name] for one in r.render(e)]
    chosen = data.draw(st.lists(st.sampled_from(range(len(rendered))), min_size=1, max_size=5))
    learn = data.draw(st.booleans())
    with torch.no_grad():
        together = row_losses(model, r.batch([rendered[i] for i in chosen], learn=learn)).tolist()
        alone = [row_losses(model, r.batch([rendered[i]], learn=learn)).item() for i in chosen]
    assert together == pytest.approx(alone, rel=1e-6, abs=1e-6)


MODELS: dict[tuple[str, str], tuple[torch.nn.Module, Renderer]] = {}


def test_only_columns_that_are_needed_are_computed(tiny: Folder) -> None:
    model, r = causal(tiny, "llama", "gsm8k")
    rendered = [one for e in ANSWERED for one in r.render(e)]
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        row_losses(model, r.batch(rendered[:1]))
    assert widths == [sum(rendered[0].trained)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gradients_logits_are_read_in_parts_on_which_no_bit_depends(
    tiny: Folder, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, r = causal(tiny, "gpt2", "gsm8k")
    model = model.to(dtype)
    batch = r.batch([one for e in ANSWERED * 40 for one in r.render(e)])
    assert batch.targets is not None
    some, column = (batch.targets != -100).nonzero(as_tuple=True)
    best = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[some, column].argmax(-1)
    batch.targets[some[::3], column[::3]] = best[::3]
    hits = Hits()
    wanted, right = row_losses(model, batch, hits), hits.taken()
    assert 0 < right["token_accuracy"] < 1
    for part in (2**30, 10_000, 1):
        monkeypatch.setattr(loss, "_PART", part)
        with torch.no_grad():
            assert torch.equal(wanted, row_losses(model, batch, hits))
        assert hits.taken() == right


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_an_adapter_around_the_model_changes_nothing_in_what_is_read(tiny: Folder, adapter: str) -> None:
    model, r = causal(tiny, "llama", "gsm8k")
    config = (
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        if adapter == "lora"
        else PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    wrapped = get_peft_model(model, config).double().eval()
    rendered = [one for e in ANSWERED for one in r.render(e)]
    with torch.no_grad():
        for one in rendered:
            found = row_losses(wrapped, r.batch(rendered))[rendered.index(one)].item()
            assert found == pytest.approx(text_loss(wrapped, one), rel=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_masked_model_is_read_at_its_mask(tiny: Folder, kind: str) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny(kind)).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny(kind))
    r = Renderer(tokenizer, "masked", task("sst2", kind="masked"), 100, False)
    prompts = ("It was [MASK].", "The box arrived in one piece, it was [MASK].", "[MASK]: who?")
    rendered = [r.render(Example("r", prompt=p, candidates=(" bad", " great"), gold=0))[0] for p in prompts]
    with torch.no_grad():
        scores = row_scores(model, r.batch(rendered))
        for row, one in enumerate(rendered):
            logits = model(input_ids=torch.tensor([one.ids])).logits[0, one.read_at].float()
            wanted = torch.log_softmax(logits[torch.tensor([c[0] for c in one.candidates])], dim=0)
            assert scores[row].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_head_gives_one_class_a_row(tiny: Folder) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=3).double().eval()
    asked = task("classification", labels=("a", "b", "c"), kind="encoder")
    r = Renderer(AutoTokenizer.from_pretrained(tiny("bert")), "encoder", asked, 100, False)
    examples = [Example("r", prompt=p, gold=g) for p, g in (("good", 2), ("bad bad bad", 0))]
    rendered = [r.render(e)[0] for e in examples]
    with torch.no_grad():
        losses = row_losses(model, r.batch(rendered)).tolist()
        for one, loss in zip(rendered, losses, strict=True):
            table = torch.log_softmax(model(input_ids=torch.tensor([one.ids])).logits[0].float(), dim=-1)
            assert loss == pytest.approx(-float(table[one.example.gold or 0]), abs=1e-5)


def test_the_gradient_of_a_batch_is_the_sum_of_its_rows(tiny: Folder) -> None:
    model, r = causal(tiny, "llama", "sst2")
    rendered = [one for e in ASKED for one in r.render(e)]

    def gradient(*rows: Rendered) -> torch.Tensor:
        model.zero_grad()
        row_losses(model, r.batch(rows)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    apart = torch.stack([gradient(one) for one in rendered]).sum(0)
    assert torch.allclose(gradient(*rendered), apart, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(apart).all() and apart.abs().max() > 0
