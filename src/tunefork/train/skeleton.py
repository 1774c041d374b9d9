"""The model a run will train, with its adapter and all its shapes, but without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from tunefork.models import ModelFacts, load_tokenizer  # isort: skip  # before peft, which imports bitsandbytes

import torch
from peft import PrefixTuningConfig, TaskType
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunefork.models.adapters import add_lora, lora_targets, recompute_activations, train_everything, train_head, wrap
from tunefork.models.architecture import meta_model, read_config, without_quantization
from tunefork.models.base import Loaded
from tunefork.models.quantize import not_quantized
from tunefork.recipe.schema import AdapterSection

_BLOCK = 64  # weights that share a scale in NF4


class _Dequantize(torch.autograd.Function):
    """x W^T with W made from its 4 bits for the product alone, again in the backward pass, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.clone(memory_format=torch.contiguous_format), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.weight.clone(memory_format=torch.contiguous_format), None, None


class _Nf4(torch.nn.Linear):
    """Stands for a quantised layer: `weight` has its shape and no memory of its own, `packed` has the memory."""

    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Dequantize.apply(input.to(self.weight.dtype), self.weight, self.bias)  # pyright: ignore[reportReturnType]


def build_skeleton(
    facts: ModelFacts,
    *,
    form: str,
    labels: Sequence[str],
    adapter: AdapterSection,
    activation_checkpointing: bool,
    frozen: bool = False,
) -> torch.nn.Module:
    """What `load_model` returns, on the meta device, whatever the number format."""
    head = form == "head"
    config = without_quantization(read_config(facts.folder, facts.trust_remote_code))
    if head:
        config.id2label = dict(enumerate(labels))
        if facts.kind == "causal":
            config.pad_token_id = cast(int, load_tokenizer(facts).pad_token_id)
    model = meta_model(config, facts.kind, head, facts.trust_remote_code)
    loaded = Loaded(model, _beside_backbone(model) if head else ())
    name = adapter.name
    lora = name in ("lora", "qlora", "dora") and not frozen
    targets = lora_targets(model, adapter.targets or "auto") if lora else []
    if name == "qlora" or facts.quantized:
        _quantize(model)
    if frozen:
        return model.requires_grad_(False)
    if name == "none":
        built = train_everything(loaded)
    elif name == "head":
        built = train_head(loaded)
    elif name == "prefix":
        built = _add_prefix(loaded, facts, adapter)
    else:
        with torch.device("meta"):
            built = add_lora(loaded, facts, adapter, targets, 0)
    if activation_checkpointing:
        recompute_activations(built)
    return built


def fake_weights(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Puts fake tensors on `device` in the place of meta ones: frozen weights in `dtype`, trained ones in fp32.

    Operations on them give shapes and take no memory. Real tensors (a batch) may be mixed in; operations on those alone
    are computed.
    """
    made: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    wanted = torch.float32 if parameter.requires_grad else dtype
                    if isinstance(module, _Nf4) and name == "weight":
                        empty = torch.empty((), dtype=wanted, device=device).expand(parameter.shape)
                    else:
                        empty = torch.empty(parameter.shape, dtype=wanted, device=device)
                    made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _beside_backbone(model: PreTrainedModel) -> tuple[str, ...]:
    prefix = f"{model.base_model_prefix}."
    return tuple(sorted({n.split(".")[0] for n, _ in model.named_parameters() if not n.startswith(prefix)}))


def _quantize(model: PreTrainedModel) -> None:
    """Puts stand-ins in the place of the layers that are quantised when loaded."""
    kept = set(not_quantized(model))
    for name, module in list(model.named_modules()):
        if name in kept or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        rows, columns = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.T.shape
        with torch.device("meta"):
            layer = _Nf4(columns, rows, bias=module.bias is not None)
            layer.register_buffer(
                "packed", torch.empty(rows * columns // 2 + 4 * (rows * columns // _BLOCK), dtype=torch.uint8)
            )
        model.set_submodule(name, layer)


def _add_prefix(loaded: Loaded, facts: ModelFacts, adapter: AdapterSection) -> torch.nn.Module:
    config = PrefixTuningConfig(
        num_virtual_tokens=adapter.prefix_tokens,
        num_layers=facts.layers,
        num_attention_heads=facts.kv_heads,
        token_dim=facts.kv_heads * facts.head_size,
        task_type=TaskType.SEQ_CLS if loaded.head else TaskType.CAUSAL_LM,
    )
    if loaded.head:
        config.modules_to_save = list(loaded.head)  # pyright: ignore[reportAttributeAccessIssue]
    return wrap(loaded.model, config, 0)
