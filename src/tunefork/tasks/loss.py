"""A task's loss and scores from a model's logits: only where they are needed, and in fp32."""

from __future__ import annotations

import functools
import inspect

import torch
from transformers import PreTrainedModel

from tunefork.batch import Batch
from tunefork.errors import RecipeError

IGNORED = -100
_PART = 2**23  # logits copied at once where no gradient is asked for; glibc gives back 32 MiB as soon as they are freed


class Hits:
    """How often the model was right, counted beside the loss: of target tokens, those that were its most likely ones;
    of preferences, those whose preferred text gained more."""

    def __init__(self) -> None:
        self._name, self._right = "", list[torch.Tensor]()

    def add(self, name: str, right: torch.Tensor) -> None:
        self._name = name
        self._right.append(right.detach())

    def taken(self) -> dict[str, float]:
        """The share since it was last taken, under its name; empty where nothing was counted."""
        right, self._right = self._right, []
        return {self._name: torch.cat(right).float().mean().item()} if right else {}


def row_losses(model: torch.nn.Module, batch: Batch, hits: Hits | None = None) -> torch.Tensor:
    """fp32 [R]: a row's loss, summed over what its weight counts (trained tokens, or 1).

    With `gold` it is the cross-entropy over candidates or classes; else that of the target tokens, or a preference's.
    """
    if batch.beta is not None:
        return preference_losses(model, batch, batch.beta, hits)
    if batch.gold is None:
        sums, _ = _token_sums(model, batch, hits)
        return torch.zeros(batch.rows, device=sums.device).index_add(0, batch.row, -sums)
    return -row_scores(model, batch).gather(1, batch.gold[:, None]).squeeze(1)


def preference_losses(model: torch.nn.Module, batch: Batch, beta: float, hits: Hits | None = None) -> torch.Tensor:
    """fp32 [R]: -log sigmoid(beta x (the preferred text's gain - the other's)), DPO (arXiv 2305.18290, equation 7).

    A text's gain is its log-probability, summed over its tokens, above that under the model without its adapter,
    which is asked without dropout. Raises RecipeError for a model that has no adapter to leave out.
    """
    from peft import PeftModel  # not above: it imports bitsandbytes, which models/guard.py must do first

    if not isinstance(model, PeftModel):
        raise RecipeError("A preference is learned by an adapter over a fixed model. Try --adapter lora.")
    training = model.training
    sums, _ = _token_sums(model, batch)
    with torch.no_grad(), model.disable_adapter():
        model.eval()
        reference, _ = _token_sums(model, batch)
    model.train(training)
    gains = (sums - reference).view(batch.rows, 2)
    if hits is not None:
        hits.add("preference_accuracy", gains[:, 0] > gains[:, 1])
    return -torch.nn.functional.logsigmoid(beta * (gains[:, 0] - gains[:, 1]))


def row_scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """fp32 [R, C]: log-probabilities over candidates or classes; -inf where a row has fewer candidates.

    Candidates of several tokens are compared by their mean log-probability a token (length-normalised, as in MeZO).
    """
    if batch.head:
        return torch.log_softmax(
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float(), dim=-1
        )
    if batch.options is not None and batch.read_at is not None:
        rows = torch.arange(len(batch.read_at), device=batch.read_at.device)
        logits = logits_at(model, batch, rows, batch.read_at)
        chosen = logits.gather(1, batch.options.clamp(min=0))
        return torch.log_softmax(chosen.masked_fill(batch.options < 0, -torch.inf), dim=-1)
    sums, counts = _token_sums(model, batch)
    return normalised_scores(sums / counts.clamp(min=1), batch.row, batch.rows)


def normalised_scores(means: torch.Tensor, row: torch.Tensor, rows: int) -> torch.Tensor:
    """[S] mean log-probabilities of candidates, in order, to [R, C] log-probabilities over each row's candidates."""
    place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    table = torch.full((rows, int(place.max()) + 1), -torch.inf, device=means.device)
    return torch.log_softmax(table.index_put((row, place), means), dim=-1)


def _token_sums(model: torch.nn.Module, batch: Batch, hits: Hits | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[S] summed log-probability of the target tokens of each sequence, and how many there are."""
    if batch.targets is None:
        raise ValueError("a batch without targets, options or a head has no loss")
    wanted = batch.targets != IGNORED
    sequence, position = wanted.nonzero(as_tuple=True)  # N target tokens
    logits, column = _logits(model, batch, position)
    targets = batch.targets[sequence, position]
    size = len(targets) if logits.requires_grad else -(-_PART // logits.shape[-1])
    best, each = list[torch.Tensor](), list[torch.Tensor]()
    for s, c, t in zip(*(whole.split(max(1, size)) for whole in (sequence, column, targets)), strict=True):
        part = logits[s, c].float()
        if hits is not None:
            best.append(part.argmax(-1))
        each.append(_log_probabilities(part, t))
    if hits is not None:
        hits.add("token_accuracy", torch.cat(best) == targets)
    sums = torch.zeros(len(wanted), device=logits.device).index_add(0, sequence, torch.cat(each))
    return sums, wanted.sum(1)


def _log_probabilities(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N] of the targets. Without a gradient, and on a CPU, all of them take the logits' place."""
    own = not logits.requires_grad and logits.device.type == "cpu"
    return torch.log_softmax(logits, -1, out=logits if own else None).gather(1, targets[:, None]).squeeze(1)


def logits_at(model: torch.nn.Module, batch: Batch, sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """fp32 [N, V]: the logits at N places."""
    logits, column = _logits(model, batch, position)
    return logits[sequence, column].float()


def _logits(model: torch.nn.Module, batch: Batch, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, columns, V], and in which column each position is. A decoder computes only those that are asked."""
    bare = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)  # inside a PEFT wrapper
    if not _keeps_logits(type(bare)):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, position
    columns, column = torch.unique(position, return_inverse=True)
    if not len(columns):  # nothing is asked; a model still needs one column to compute
        columns = torch.zeros(1, dtype=torch.int64, device=position.device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=columns).logits
    return logits, column


@functools.cache
def _keeps_logits(kind: type[torch.nn.Module]) -> bool:
    """Whether the model's forward takes `logits_to_keep`, as decoders do and masked models do not."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters
