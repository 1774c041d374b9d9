"""Tuned models of every kind over one base in memory: each answers as it would alone, however many are served."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.server.scenes import client_of, serving, settings_in
from tests.server.seeded import PROJECT, seeded_rows
from tunefork.models import inspect_model, load_artefact, load_model, load_tokenizer, save_artefact
from tunefork.recipe import AdapterSection, ModelSection
from tunefork.server import Settings, Store
from tunefork.server.inference.hosts import Host
from tunefork.server.inference.mixing import mixed
from tunefork.server.store import Job, Model

ASKED: Any = [{"role": "user", "content": "Hello, who are you?"}]
KINDS = {"lora": ("lora", 4), "wide": ("lora", 16), "third": ("lora", 8), "dora": ("dora", 4), "whole": ("none", 4)}


def name_of(kind: str) -> str:
    return f"ft:fork-tiny:tunefork:{kind}:abc"


def make(kind: str, folder: Path) -> None:
    """A model that training might have left, with weights moved far enough to say other things."""
    facts = inspect_model(ModelSection())
    adapter, rank = KINDS[kind]
    model = load_model(
        facts,
        form="text",
        labels=(),
        adapter=AdapterSection.model_validate({"name": adapter, "rank": rank}),
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        activation_checkpointing=False,
        prefix_examples=None,
    )
    generator = torch.Generator().manual_seed(len(kind) + rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (adapter == "none" and "proj" in name):
                parameter += 0.04 * torch.randn(parameter.shape, generator=generator)
    save_artefact(model, load_tokenizer(facts), facts, folder, {})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Room for two adapters, and for one base or whole model."""
    made = settings_in(tmp_path_factory.mktemp("data"), adapters_in_memory=2, bases_in_memory=1)
    store = Store(made)
    job = next(row for row in seeded_rows() if isinstance(row, Job))
    with store.write() as db:
        job.status = "succeeded"
        db.add(job)
        db.flush()
        for kind in KINDS:
            make(kind, made.jobs_path / job.id / kind)
            values = {"project_id": PROJECT, "job_id": job.id, "base": "fork-tiny", "folder": kind}
            db.add(Model(id=f"model_{kind}", name=name_of(kind), **values))
    store.close()
    return made


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[openai.OpenAI]:
    with serving(settings) as url:
        yield client_of(url)


def folder_of(settings: Settings, kind: str) -> Path:
    return next(settings.jobs_path.glob(f"*/{kind}"))


def alone(settings: Settings, kind: str, tokens: int = 16) -> str:
    """What the artefact says when it is loaded by itself."""
    model: Any
    tokenizer: Any
    model, tokenizer, _ = load_artefact(folder_of(settings, kind), torch.device("cpu"), torch.float32)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    start = ids.shape[1]
    for _ in range(tokens):
        token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        if int(token) in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")):
            break
        ids = torch.cat([ids, token], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def said(client: openai.OpenAI, model: str) -> str:
    found = client.chat.completions.create(model=model, messages=ASKED, temperature=0, max_tokens=16)
    assert found.model == model
    return found.choices[0].message.content or ""


def test_each_answers_as_it_does_alone_together_and_after_it_was_evicted(
    client: openai.OpenAI, settings: Settings
) -> None:
    expected = {name_of(kind): alone(settings, kind) for kind in KINDS}
    expected["fork-tiny"] = said(client, "fork-tiny")
    assert len(set(expected.values())) > 2  # a model taken for another would be seen
    asked = list(expected) * 3
    assert [said(client, name) for name in asked] == [expected[name] for name in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda name: said(client, name), asked)) == [expected[name] for name in asked]


def test_rows_under_several_adapters_are_computed_as_peft_does(settings: Settings) -> None:
    """Of several ranks, apart and side by side, and without any; PEFT disabled meanwhile, and as it was afterwards."""
    host = Host(ModelSection(dtype="fp32"), inspect_model(ModelSection()), 0, nf4=False, folder=None)
    names = [host.use(folder_of(settings, kind) if kind else None) for kind in ("lora", None, "third", "third", "lora")]
    ids = torch.randint(20, 4000, (len(names), 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        base = host.model(ids).logits
        with mixed(host.model, names, torch.float32):
            made = host.model(ids).logits
        assert torch.equal(host.model(ids).logits, base)
        host.model.base_model.enable_adapter_layers()
        expected = host.model(ids, adapter_names=[name or "__base__" for name in names]).logits
    assert (made - expected).norm() < 1e-5 * (expected - base).norm()
    assert torch.equal(made[1], base[1])


def test_a_poisoned_adapter_is_not_opened(client: openai.OpenAI, settings: Settings, tmp_path: Path) -> None:
    """Neither a pickle in the place of the weights, nor a pickle beside them, nor one of another shape."""
    folder, expected = folder_of(settings, "third"), said(client, name_of("lora"))
    weights = folder / "adapter_model.safetensors"
    canary = tmp_path / "opened"
    pickle = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    for poison in (pickle, b"", None, (folder_of(settings, "wide") / weights.name).read_bytes()):
        for kind in ("lora", "wide"):  # so that the poisoned one is loaded anew
            said(client, name_of(kind))
        weights.unlink(missing_ok=True)
        (folder / "adapter_model.bin").write_bytes(pickle)
        if poison is not None:
            weights.write_bytes(poison)
        with ThreadPoolExecutor(4) as pool:  # the others of its batch are answered
            asked = [name_of(kind) for kind in ("lora", "third", "lora", "third")]
            replies = [pool.submit(said, client, name) for name in asked]
        for reply in replies[1::2]:
            assert isinstance(reply.exception(), openai.InternalServerError)
        assert [reply.result() for reply in replies[::2]] == [expected] * 2
        assert not canary.exists()
        assert said(client, name_of("lora")) == expected


def test_a_model_whose_training_has_diverged_fails_alone(client: openai.OpenAI, settings: Settings) -> None:
    weights = folder_of(settings, "wide") / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}, weights)

    def asked(kind: str) -> str | None:
        return (
            client.chat.completions.create(model=name_of(kind), messages=ASKED, max_tokens=16).choices[0].finish_reason
        )

    for kind in ("lora", "dora"):  # so that the broken one is loaded anew
        asked(kind)
    with ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(asked, kind) for kind in ("lora", "wide") * 4]
    assert all(isinstance(reply.exception(), openai.InternalServerError) for reply in replies[1::2])
    assert {reply.result() for reply in replies[::2]} <= {"stop", "length"}
