"""Zeroth-order steps in `transformers.Trainer`: its data, schedule, logging, evaluation and checkpoints as they are.

class ZOTrainer(ZOTrainerMixin, Trainer): ...

trainer = ZOTrainer(model, args, train_dataset=rows, zo={"preset": "default"})
trainer.train()
trainer.save_model("adapter")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tunefork.zo.directions import LowRank
from tunefork.zo.optimizer import ZO
from tunefork.zo.sites import fingerprint

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_LEARNED = "zo.safetensors"


class ZOTrainerMixin(_Base):
    """Put before `transformers.Trainer` among the bases.

    The learning rate, its schedule and the weight decay are those of TrainingArguments; `zo` holds the other arguments
    of `ZO`. One process, one device or a model spread over several.

    With low-rank directions a checkpoint holds what was learned and no copy of the base model, which is read from where
    it was read before: as a PEFT adapter, or, where a LoRA file cannot hold it, in the model's own weights.
    """

    def __init__(self, *args: Any, zo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.zo_options = dict(zo or {})
        self.zo: ZO | None = None
        self._base = ""
        self._micro_batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ValueError(
                f"Zeroth-order training runs in one process. Received {self.args.world_size} processes and "
                f"{self.args.n_gpu} devices in parallel. Try CUDA_VISIBLE_DEVICES=0, or device_map='auto'."
            )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            given = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            chosen: Any = model or self.model
            self.zo = _Stepped(chosen, **{**given, **self.zo_options})
            if self._in_its_weights:
                self._base = fingerprint(chosen)
            self.optimizer = self.zo
        return self.optimizer

    @property
    def _in_its_weights(self) -> bool:
        """Whether a checkpoint is the model with what was learned in its weights."""
        assert self.zo is not None
        low_rank = any(isinstance(part, LowRank) for part in self.zo.parts)
        return low_rank and not (self.zo.beside and not self.zo.no_lora_file)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Keeps a micro-batch; at the last one of an update, makes the step on all of them."""
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # as Trainer decides it
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None

        def closure() -> torch.Tensor:
            losses: list[Any] = []
            with self.compute_loss_context_manager():
                for batch in batches:
                    losses.append(self.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch))
            total = torch.stack([loss.float() for loss in losses]).sum()
            return total if scaled else total / len(batches)

        assert self.zo is not None
        return torch.tensor(self.zo.step(closure), device=self.args.device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """An adapter where a LoRA file can hold what was learned, else the model with it in its weights."""
        if self.zo is None or not any(isinstance(part, LowRank) for part in self.zo.parts):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if not self._in_its_weights:
            self.zo.write_adapter(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        else:
            with suppress(ValueError):  # of weights in 4 bits, which no change can be written into
                self._save(str(folder), state_dict=self._merged(self.zo))
        learned = {k: v.detach().cpu().contiguous() for k, v in self.zo.learned().items()}
        save_file(learned, folder / _LEARNED, metadata={"base": self._base})

    def _merged(self, zo: ZO) -> dict[str, torch.Tensor]:
        """The model's state with what was learned, in its own dtypes; a tied weight is one tensor under all names."""
        state, values = dict(zo.model.state_dict()), zo.values()
        for site in zo.sites:
            value = values[site.name].to(site.parameter.dtype)
            state |= {name: value for name in site.names if name in state}
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not (Path(resume_from_checkpoint) / _LEARNED).exists():  # else it is in what is loaded next
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        learned = Path(checkpoint or ".") / _LEARNED
        if checkpoint is None or self.zo is None or not learned.exists():
            return
        with safe_open(learned, "pt") as file:
            base = (file.metadata() or {}).get("base", "")
        if base != self._base:
            raise ValueError(
                f"A run goes on from the model it was begun on. {checkpoint} is of another: the model there has in its "
                "weights what was learned. Try the model that was trained."
            )
        self.zo.load_learned(load_file(learned))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or ".") / _LEARNED
        if self.zo is not None and best.exists():
            self.zo.load_learned(load_file(best))
        else:
            super()._load_best_model()


class _Stepped(ZO):
    """Trainer calls `step()` after each update; by then the step is made."""

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().step(closure) if closure is not None or self.last is None else self.last.loss
