"""A base model in memory, and the adapters over it: loaded when they are first asked, evicted by use."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tunefork.errors import RunError
from tunefork.evaluate.batching import padded
from tunefork.models import (
    ModelFacts,
    add_adapter,
    autocast,
    choose_device,
    choose_dtype,
    load_artefact,
    load_base,
    read_artefact_info,
    torch_dtype,
)
from tunefork.recipe import ModelSection
from tunefork.server.inference.mixing import mixed
from tunefork.server.inference.rows import Row

_SLICE = 64  # tokens


class Host:
    """One model in memory. `folder` is of a whole tuned model, in the place of the base. Used by one thread."""

    def __init__(self, section: ModelSection, facts: ModelFacts, pad: int, *, nf4: bool, folder: Path | None) -> None:
        self.facts, self.pad = facts, pad
        self.device, _ = choose_device(section)
        name, _ = choose_dtype(section, self.device)
        self.dtype = torch_dtype(name)
        self.model: Any
        if folder is None:
            self.model = load_base(facts, "text", (), self.device, self.dtype, nf4=nf4)
        else:
            trusted = section.trust_remote_code
            self.model, _, _ = load_artefact(folder, self.device, self.dtype, trust_remote_code=trusted)
        self.adapters: OrderedDict[Path, str] = OrderedDict()  # least used first
        self._names = (f"adapter{n}" for n in itertools.count())

    def use(self, folder: Path | None) -> str | None:
        """The adapter's name in the model; None is the base itself. Raises RunError for another base's, or damage."""
        if folder is None:
            return None
        if folder not in self.adapters:
            if read_artefact_info(folder)["base"]["fingerprint"] != self.facts.fingerprint:
                raise RunError(f"An adapter needs the base it was trained on. {self.facts.name!r} has changed since.")
            name = next(self._names)
            self.model = add_adapter(self.model, folder, name).requires_grad_(False).eval()
            self.model.base_model.disable_adapter_layers()
            self.adapters[folder] = name
        self.adapters.move_to_end(folder)
        return self.adapters[folder]

    def evict(self, folder: Path) -> None:
        """Takes an adapter out of memory; one that is not there is fine."""
        name = self.adapters.pop(folder, None)
        if name is None:
            return
        if not self.adapters:
            self.model = self.model.unload().eval()
            return
        self.model.set_adapter(next(iter(self.adapters.values())), inference_mode=True)
        self.model.delete_adapter(name)

    def extend(
        self,
        rows: Sequence[Row],
        names: Sequence[str | None],
        tokens: int,
        others_wait: Callable[[], bool],
        *,
        alone: bool,
    ) -> None:
        """Up to `tokens` more tokens for every row under the adapter of its name, computed together; fewer where, at
        the end of a slice, one is done or others wait.

        `alone`: the rows share one adapter of a kind (DoRA) that is not mixed with others in a batch.
        """
        with torch.inference_mode(), autocast(self.device, self.dtype):
            for row, name in zip(rows, names, strict=True):
                if row.read_prompt:
                    with self._under([name], alone):
                        self._read(row)
            going = [(row, name) for row, name in zip(rows, names, strict=True) if not row.done]
            if not going:
                return
            rows, names = [row for row, _ in going], [name for _, name in going]
            ids, mask = padded([row.ids for row in rows], self.pad, self.device, left=True)
            with self._under(names, alone):
                self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=GenerationConfig(
                        do_sample=False,
                        num_beams=1,
                        max_new_tokens=tokens,
                        min_new_tokens=0,
                        repetition_penalty=1.0,
                        no_repeat_ngram_size=0,
                        pad_token_id=self.pad,
                        use_cache=True,
                    ),
                    logits_processor=LogitsProcessorList([_Choice(rows, self.pad)]),
                    stopping_criteria=StoppingCriteriaList([_Done(rows, others_wait)]),
                )

    @contextmanager
    def _under(self, names: Sequence[str | None], alone: bool) -> Iterator[None]:
        """Rows under the adapters of these names. PEFT itself computes one that is `alone`, and no other."""
        if not alone:
            with mixed(self.model, names, self.dtype):
                yield
            return
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(names[0], inference_mode=True)
        try:
            yield
        finally:
            self.model.base_model.disable_adapter_layers()

    def _read(self, row: Row) -> None:
        ids = torch.tensor([list(row.prompt)], device=self.device)
        row.read(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float())


class _Choice(LogitsProcessor):
    """Leaves each row the token it has drawn, so that the most likely one of the batch is every row's own choice."""

    def __init__(self, rows: Sequence[Row], pad: int) -> None:
        self.rows, self.pad = rows, pad

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        chosen = [self.pad if row.done else row.choose(scores[i]) for i, row in enumerate(self.rows)]
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(chosen)), torch.tensor(chosen, device=scores.device)] = 0.0
        return only


class _Done(StoppingCriteria):
    def __init__(self, rows: Sequence[Row], others_wait: Callable[[], bool]) -> None:
        self.rows, self.others_wait, self.tokens = rows, others_wait, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        done = [row.done for row in self.rows]
        self.tokens += 1
        if self.tokens % _SLICE == 0 and (any(done) or self.others_wait()):
            done = [True] * len(done)
        return torch.tensor(done, device=input_ids.device)
