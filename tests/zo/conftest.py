"""Tiny models and losses for the engine's tests, and directions made from their definition alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from tunefork.zo import ZO
from tunefork.zo.kernels import draw, draw_many
from tunefork.zo.noise import Stream, make_counters, stream_key

VOCAB, LABELS = 60, 3
Batch = dict[str, torch.Tensor]


def tiny_net(kind: str, seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    """A random transformer with 2 blocks of 16 to 32 hidden units."""
    ids: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
            config = LlamaConfig(
                **ids, **shape, num_key_value_heads=1, initializer_range=0.2, attention_dropout=dropout
            )
            return LlamaForCausalLM(config)
        if kind == "gpt2":
            drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
            config = GPT2Config(**ids, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2, **drop)
            return GPT2LMHeadModel(config)
        if kind == "opt":
            shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 40}
            config = OPTConfig(
                **ids, **shape, word_embed_proj_dim=16, max_position_embeddings=32, init_std=0.2, dropout=dropout
            )
            return OPTForCausalLM(config)
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = BertConfig(vocab_size=VOCAB, num_labels=LABELS, initializer_range=0.2, pad_token_id=0, **shape, **drop)
        return BertForSequenceClassification(config)


def nf4_linear(inputs: int, outputs: int, kind: str = "nf4") -> Any:
    """A quantised layer that stays as it is: with AVX512-BF16 bitsandbytes 0.50 repacks its weights in the first pass
    (bitsandbytes #2078), whoever makes it; `tunefork.models` guards its models in the same way."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32, quant_type=kind)
    layer.support_avx512bf16_for_cpu = False
    return layer


def batch_of(rows: int = 4, length: int = 7, seed: int = 0) -> Batch:
    """Random rows with labels; the last has two places of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    labels = torch.randint(LABELS, (rows,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "label": labels}


def row_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """fp32 [rows]: next-token loss of a language model, or the class's of a classifier."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    if logits.ndim == 2:
        return torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return each.sum(1) / (targets != -100).sum(1)


def low_rank_direction(model: torch.nn.Module, name: str, opt: ZO, step: int, query: int) -> torch.Tensor:
    """z [out, in] of a linear layer's weight, from the definition."""
    module = model.get_submodule(name.rpartition(".")[0])
    weight = module.get_parameter("weight")
    rows, columns = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
    o, key = opt.options, stream_key(opt.seed, name, "direction")
    if min(rows, columns) <= o.rank:
        return draw(Stream(key, step, query), (columns, rows)).T
    u = draw(Stream(key, step, query), (o.rank, rows))
    base = (step * o.queries + query) % (o.max_rank // o.rank)
    a = draw_many(stream_key(opt.seed, name, "basis"), make_counters([(base, 0)]), (o.rank, columns))[0]
    return u.T @ a / o.rank**0.5


def direction(model: torch.nn.Module, name: str, opt: ZO, step: int, query: int) -> torch.Tensor:
    """z of any trained parameter, in the parameter's own layout."""
    if opt.options.direction != "low_rank":
        parameter = dict(model.named_parameters())[name]
        stream = Stream(stream_key(opt.seed, name, "direction"), step, query)
        return draw(stream, parameter.shape, kind=opt.options.direction)
    z = low_rank_direction(model, name, opt, step, query)
    return z.T if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else z


def loss_at(
    model: torch.nn.Module,
    opt: ZO,
    loss: Callable[[torch.nn.Module], torch.Tensor],
    step: int,
    query: int,
    scale: float,
) -> torch.Tensor:
    """The loss with every trained weight replaced by W + scale * z: `torch.func.functional_call`, no engine."""
    moved = {s.name: s.parameter.detach() + scale * direction(model, s.name, opt, step, query) for s in opt.sites}
    return functional_call(_Loss(model, loss), {f"model.{k}": v for k, v in moved.items()}, ())


class _Loss(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> torch.Tensor:
        return self.loss(self.model)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything in the model's state_dict."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@pytest.fixture
def batch() -> Batch:
    return batch_of()
