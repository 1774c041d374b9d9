"""Every kind of parameter is perturbed as `functional_call` with moved weights says, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from tests.zo.conftest import batch_of, bits, direction, loss_at, nf4_linear, row_losses, same_bits, tiny_net
from tunefork.zo import ZO

EPSILON = 1e-2


class Experts(nn.Module):
    """Weights [experts, in, out] that the forward multiplies itself, and some in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 6, 5))
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("bti,eio->bto", x, self.bank)
        return mixed * self.scales[0] + self.scales[1]


class Tied(nn.Module):
    """One weight as embedding and output, and one block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.norm = nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed((x[..., 0].abs() * 10).long() % 11)
        return self.out(self.norm(self.block(torch.tanh(self.block(h)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Layer(nn.Module):
    """torch's encoder layer, whose own code reads the weights of its children in a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Handing(nn.Module):
    """A child that hands its weight itself to its parent, where other modules run before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.giver, self.first, self.second = nn.Module(), nn.Linear(6, 6), nn.Linear(6, 6)
        self.giver.table = nn.Parameter(torch.randn(6))
        self.giver.forward = lambda: self.giver.table.view(1, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.giver()
        return self.second(self.first(x).tanh()) * table


def squares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().flatten(1).tanh().square().mean(1)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("make", [Experts, Tied, Attention, Layer, Convolution, Recurrent, Handing])
def test_dense_directions_reach_every_kind_of_parameter(make: Callable[[], nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 5, 6)
    before = bits(model)
    opt = ZO(
        model,
        direction=kind,
        queries=1,
        estimator="two_sided",
        rows="shared",
        train="trainable",
        epsilon=EPSILON,
        lr=0.0,
    )
    assert {s.name for s in opt.sites} == {n for n, _ in model.named_parameters()}
    with torch.no_grad():
        plus, minus = (loss_at(model, opt, lambda m: squares(m, x), 0, 0, s * EPSILON) for s in (1, -1))
    opt.step_batch(squares, x)
    assert opt.last is not None
    assert opt.last.gradients[0] == pytest.approx(float((plus - minus).mean()) / (2 * EPSILON), rel=1e-3, abs=1e-5)
    assert same_bits(before, bits(model))
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_dense_directions_move_whole_transformers(kind: str) -> None:
    model, batch = tiny_net(kind).eval(), batch_of()
    opt = ZO(model, preset="mezo", epsilon=EPSILON, lr=0.0)
    with torch.no_grad():
        ends = [loss_at(model, opt, lambda m: row_losses(m, batch), 0, 0, s * EPSILON).mean() for s in (1, -1)]
    opt.step_batch(row_losses, batch)
    assert opt.last is not None
    assert opt.last.gradients[0] == pytest.approx(float(ends[0] - ends[1]) / (2 * EPSILON), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("make", [Attention, Layer])
def test_low_rank_directions_refuse_an_out_projection_that_its_parent_reads(make: Callable[[], nn.Module]) -> None:
    opt = ZO(make().eval(), train=["*out_proj.weight"])
    with pytest.raises(ValueError, match=r"Received .*out_proj\.weight, which other code reads too"):
        opt.step_batch(squares, torch.randn(3, 5, 6))


class Asking(nn.Linear):
    """A layer that notes whether the weight it is run with asks for gradients, as `matmul` does to choose its way."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.weight.requires_grad)
        return super().forward(x)


@pytest.mark.parametrize("asks", [True, False])
def test_a_perturbed_weight_is_as_its_own_was(asks: bool) -> None:
    """Where it asked for none, an output layer over 32,000 words in bf16 copied its weight once a row."""
    model = Asking().requires_grad_(asks)
    ZO(model, direction="rademacher", train=["weight"], lr=0.1).step_batch(squares, torch.randn(3, 5, 6))
    assert set(model.seen) == {asks} and len(model.seen) >= 3


class Shared(nn.Module):
    """Two layers with one weight, of which the second runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("stack", [None, 1])
def test_low_rank_directions_move_a_shared_weight_at_every_use(stack: int | None) -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(3, 5, 6)
    options = {"queries": 1, "train": ["first.weight"], "rank": 2, "max_rank": 4}
    opt = ZO(model, epsilon=EPSILON, lr=0.5, stack=stack, estimator="two_sided", **options)
    with torch.no_grad():
        plus, minus = (loss_at(model, opt, lambda m: squares(m, x), 0, 0, s * EPSILON) for s in (1, -1))
    opt.step_batch(squares, x)
    assert opt.last is not None
    assert opt.last.gradients[0] == pytest.approx(float((plus - minus).mean()) / (2 * EPSILON), rel=1e-3, abs=1e-5)
    with torch.no_grad():
        shown = model(x)
        opt.finish()
        assert torch.allclose(model(x), shown, atol=1e-6)
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize(("direction", "stack"), [("gaussian", None), ("low_rank", None), ("low_rank", 1)])
def test_a_mixture_of_experts_as_transformers_has_it(direction: str, stack: int | None) -> None:
    """3-D expert weights, and a router: dense directions move them, low-rank ones the matrices around them."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=60, num_local_experts=3, num_key_value_heads=1, **shape)).eval()
    batch, train = batch_of(), "blocks" if direction == "low_rank" else "trainable"
    opt = ZO(
        model,
        direction=direction,
        queries=1,
        estimator="two_sided",
        rows="shared",
        train=train,
        epsilon=EPSILON,
        lr=0.0,
        stack=stack,
    )
    assert any(s.parameter.ndim == 3 for s in opt.sites) == (direction != "low_rank")
    with torch.no_grad():
        ends = [loss_at(model, opt, lambda m: row_losses(m, batch), 0, 0, s * EPSILON).mean() for s in (1, -1)]
    opt.step_batch(row_losses, batch)
    assert opt.last is not None
    assert opt.last.gradients[0] == pytest.approx(float(ends[0] - ends[1]) / (2 * EPSILON), rel=2e-3, abs=2e-4)


def test_low_rank_and_dense_parts_go_together() -> None:
    model, batch = tiny_net("llama").eval(), batch_of()
    opt = ZO(
        model,
        queries=1,
        estimator="two_sided",
        rows="shared",
        also=["model.embed_tokens", "*norm*"],
        epsilon=EPSILON,
        lr=1e-2,
    )
    before = bits(model)
    opt.step_batch(row_losses, batch)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"model.embed_tokens.weight", *(k for k in before if "norm" in k)}
    with pytest.raises(ValueError, match="changed in place"):
        opt.finish("nowhere")


def test_a_head_is_trained_with_the_blocks() -> None:
    model, batch = tiny_net("bert"), batch_of()
    opt = ZO(model, queries=1, estimator="two_sided", rows="shared", lr=0.5)
    names = {s.name for s in opt.sites}
    assert {"classifier.weight", "bert.pooler.dense.weight"} & names == {"classifier.weight"}
    assert len(names) == 2 * 6 + 1
    opt.step_batch(row_losses, batch)
    assert float(opt.values()["classifier.weight"].sub(model.classifier.weight).abs().min()) > 0


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x) @ self.used.weight


def test_a_weight_that_other_code_reads_is_refused_by_name() -> None:
    opt = ZO(Reads(), train=["used.weight"])
    with pytest.raises(ValueError, match=r"only its own layer reads. Received used\.weight"):
        opt.step_batch(lambda m, x: m(x).flatten(1).mean(1), torch.randn(2, 3, 8))


def test_a_parameter_that_the_loss_reads_is_refused_by_name() -> None:
    opt = ZO(Reads(), direction="rademacher", train=["spare.weight"])
    with pytest.raises(ValueError, match=r"spare\.weight, which the loss reads"):
        opt.step_batch(lambda m, x: m(x).flatten(1).mean(1) + m.spare.weight.sum(), torch.randn(2, 3, 8))


def test_unread_parameters_are_named() -> None:
    opt = ZO(Reads(), direction="rademacher")
    with pytest.warns(UserWarning, match=r"2 parameters were not read.*spare\.weight"):
        opt.step_batch(lambda m, x: m(x).flatten(1).mean(1), torch.randn(2, 3, 8))


def test_names_that_mean_nothing_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'used\.weight'"):
        ZO(Reads(), train=["used.wieght"])


def quantised(kind: str = "nf4") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    layer = nf4_linear(64, 64, kind)
    layer.load_state_dict(model[0].state_dict())
    model[0] = layer.to("cpu")
    return model


def test_nf4_layers_learn_beside_their_weights() -> None:
    model, x = quantised(), torch.randn(4, 64)
    with torch.no_grad():
        before, base, at = bits(model), model[0](x), model[2](x[:, :64])
    opt = ZO(model, queries=1, estimator="two_sided", rows="shared", train=["0.weight"], lr=0.1)
    opt.step_batch(lambda m, b: m(b).square().mean(1), x)
    assert opt.last is not None
    z = opt.factors()["0"][1] @ opt.factors()["0"][0]
    with torch.no_grad():
        assert torch.allclose(model[0](x), base + x @ z.T, atol=1e-4)
    assert float(z.abs().max()) > 0
    assert torch.equal(at, model[2](x))
    assert same_bits(before, bits(model))
    with pytest.raises(ValueError, match=r"0\.weight, which is quantised. Try finish\(folder\)"):
        opt.finish()


def test_nf4_weights_have_no_dense_directions() -> None:
    with pytest.raises(ValueError, match=r"Received 0\.weight in torch\.uint8. Try leaving it out"):
        ZO(quantised(), direction="rademacher", train=["0.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["low_rank", "rademacher"])
def test_16_bit_models_keep_small_updates(dtype: torch.dtype, kind: str) -> None:
    """Fifty updates, each far below the weights' last bit, add up."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32).to(dtype)
    opt = ZO(
        model,
        direction=kind,
        queries=1,
        estimator="two_sided",
        rows="shared",
        train=["weight"],
        lr=1e-7,
        rank=4,
        max_rank=4,
    )
    start = model.weight.detach().float().clone()
    want = torch.zeros_like(start)
    for step in range(50):
        opt.step_batch(lambda m, b: (100 * m(b).float()).sum(1), torch.ones(4, 32, dtype=dtype))
        assert opt.last is not None
        want += opt.last.terms[0].coefficient * direction(model, "weight", opt, step, 0)
    got = opt.values()["weight"] - start
    assert float((got - want).norm() / want.norm()) < 0.02
    assert torch.equal(model.weight.float(), start) or kind != "low_rank"


@pytest.mark.parametrize("stack", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_probe_in_16_bit_is_not_lost_beside_a_large_change(dtype: torch.dtype, stack: int | None) -> None:
    """Factors of 1 and probes of 1e-3: a sum of both in bf16 would be the factors alone."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64, bias=False).to(dtype), torch.randn(256, 64).to(dtype)
    opt = ZO(
        model, queries=1, estimator="two_sided", rows="shared", train=["weight"], lr=0.0, epsilon=1e-3, stack=stack
    )
    opt.load_learned({k: torch.ones_like(v) if "factors" in k else v for k, v in opt.learned().items()})
    moved = x.float() @ direction(model, "weight", opt, 0, 0).T
    opt.step_batch(lambda m, b: (m(b).float() * moved.repeat(len(b) // 256, 1)).sum(1), x)
    assert opt.last is not None
    assert opt.last.gradients[0] == pytest.approx(float(moved.square().sum(1).mean()), rel=0.1)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**31))
def test_any_shape_of_matrix(rows: int, columns: int, rank: int, seed: int) -> None:
    model = nn.Linear(columns, rows, bias=False)
    x = torch.eye(columns)
    opt = ZO(
        model, queries=2, estimator="two_sided", rows="shared", rank=rank, max_rank=2 * rank, lr=1.0, seed=seed, stack=1
    )
    base = model.weight.detach().clone()
    opt.step_batch(lambda m, b: m(b).sum(1), x)
    assert opt.last is not None
    want = sum(t.coefficient * direction(model, "weight", opt, t.step, t.query) for t in opt.last.terms)
    with torch.no_grad():
        shown = model(x).T - base
    assert torch.allclose(shown, want, atol=1e-4 * (1 + float(base.abs().max())))
    a, b = opt.factors()[""]
    assert torch.allclose(b @ a, want, atol=1e-5 * (1 + float(want.abs().max())))
    assert a.shape[0] == 2 * rank


def test_autocast_leaves_the_change_in_fp32() -> None:
    model = nn.Linear(32, 32)
    opt = ZO(model, queries=1, estimator="two_sided", rows="shared", lr=1e-3, train=["weight"])

    def losses(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(b).float().sum(1)

    x = torch.randn(8, 32)
    opt.step_batch(losses, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        shown = model(x)
        opt.detach()
        change = shown.float() - model(x).float()
    a, b = opt.factors()[""]
    assert torch.allclose(change, x @ a.T @ b.T, atol=0.05)
