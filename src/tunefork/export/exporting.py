"""`export`: a run's model as plain transformers weights, proven equal to what was trained, or as its adapter."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file

from tunefork.errors import ExportError, RecipeError, RunError, UnsupportedError, did_you_mean
from tunefork.evaluate.trained import Trained, load_trained
from tunefork.export.card import render_card
from tunefork.export.merge import load_plain, merged_model, save_plain
from tunefork.export.proof import HeldOut, Proof, answers, compare, held_out, in_fp32, read_logits
from tunefork.export.rebuild import rebuild_artefact
from tunefork.files import make_folder, staged_folder, write_json
from tunefork.methods.zo import open_trajectory
from tunefork.models import (
    ModelFacts,
    inspect_model,
    load_base,
    load_tokenizer,
    read_artefact_info,
    torch_dtype,
)
from tunefork.models.artefact import INFO_FILE, ArtefactInfo, base_facts
from tunefork.models.device import DtypeName
from tunefork.recipe import ModelSection, Recipe, load_recipe
from tunefork.render import Renderer
from tunefork.run import RunFolder, refuse_hosted
from tunefork.zo.trajectory import digest

KINDS = ("merged", "adapter", "trajectory")
WHOLE = ("none", "head")  # adapters that are none: the run keeps the whole model
CARD, PROOF, RECIPE, TRAJECTORY = "README.md", "proof.json", "recipe.yaml", "trajectory"


@dataclass(frozen=True, slots=True)
class Exported:
    """Where the model went, the proof of a merge, and both in a sentence."""

    path: Path
    proof: Mapping[str, Any] | None
    says: str


@dataclass(frozen=True)
class _Run:
    """What an export reads of a run."""

    folder: RunFolder
    recipe: Recipe
    result: Mapping[str, Any]
    info: ArtefactInfo
    trusted: bool  # code that its base brings may run

    def trained(self, device: str) -> Trained:
        return load_trained(self.folder.path, device, trust_remote_code=self.trusted)


def export(
    run: str | Path,
    *,
    to: str = "merged",
    out: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Exported:
    """Writes the model of a finished run to `out` (RUN/export-TO when absent), with a model card.

    `merged`: a plain transformers folder in `dtype` (auto: the one the run computed in). What lies on the disk is
    loaded again and proven equal to the trained model on held-out rows before it takes its place; see `Proof`.
    `adapter`: the PEFT folder as it was trained.
    `trajectory`: the steps of a zeroth-order run up to the weights it kept, from which `replay` rebuilds the model;
    that is done here too, and what comes out is compared bit for bit with what was trained.
    `trust_remote_code`: whether a base that brings its own Python code may run it.

    Raises ExportError, leaving nothing behind, when the proof fails; UnsupportedError or RecipeError for what cannot
    be exported so, RunError for a run that is not finished or an `out` that holds something else.
    """
    source = _read(Path(run), trust_remote_code)
    _check(source, to, dtype)
    target = Path(out) if out is not None else source.folder.path / f"export-{to}"
    _refuse_to_overwrite(target)
    make_folder(target.parent)
    with staged_folder(target) as folder:
        if to == "adapter":
            return _adapter(source, folder, target, device)
        if to == "trajectory":
            return _trajectory(source, folder, target)
        return _merged(source, folder, target, dtype, device)


def _read(path: Path, trusted: bool) -> _Run:
    folder = RunFolder.open(path, write=False)
    result = folder.read_result()
    refuse_hosted(path)
    return _Run(folder, load_recipe(folder.recipe_path), result, read_artefact_info(folder.model_path), trusted)


def _check(source: _Run, to: str, dtype: str) -> None:
    if to not in KINDS:
        raise RecipeError(f"`to` must be {' or '.join(KINDS)}. Received {to!r}.{did_you_mean(to, KINDS)}")
    formats = ("auto", *get_args(DtypeName))
    if dtype not in formats:
        raise RecipeError(f"`dtype` must be one of {', '.join(formats)}. Received {dtype!r}. Try auto.")
    adapter = source.info["adapter"]
    if to == "merged" and adapter == "prefix":
        raise UnsupportedError(
            "A prefix cannot be merged: it is keys and values beside the tokens, not a change of weights. "
            "Received a run with adapter prefix. Try --to adapter, or train with --adapter lora."
        )
    if to == "adapter" and adapter in WHOLE:
        raise UnsupportedError(
            f"Only a run with a PEFT adapter has one to export. Received a run with adapter {adapter}, which keeps the "
            "whole model. Try --to merged."
        )
    if to == "trajectory" and source.recipe.train.method != "zo":
        raise UnsupportedError(
            f"Only the method zo logs a trajectory. Received a run with method {source.recipe.train.method}. "
            "Try --to adapter, or --to merged."
        )
    if to != "merged" and dtype != "auto":
        raise RecipeError(f"`dtype` is that of merged weights. Received {dtype} with --to {to}. Try leaving it out.")


def _refuse_to_overwrite(target: Path) -> None:
    """An earlier export is replaced; nothing else is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    trajectory = target.is_dir() and {p.name for p in target.iterdir()} == {TRAJECTORY, RECIPE, CARD}
    model = (target / INFO_FILE).is_file() and "exported" in read_artefact_info(target)["extra"]
    if not trajectory and not model:
        raise RunError(
            f"An export needs a folder of its own. Received {target}, which holds something else. Try another --out."
        )


def _adapter(source: _Run, folder: Path, target: Path, device: str) -> Exported:
    shutil.copytree(source.folder.model_path, folder, dirs_exist_ok=True)
    trained = source.trained(device)
    _describe(source, trained, folder, "adapter", "fp32", None)
    return Exported(target, None, "The adapter as it was trained, in fp32, for PEFT; the model under it is not part.")


def _trajectory(source: _Run, folder: Path, target: Path) -> Exported:
    kept, step = open_trajectory(source.folder.trajectory_path), int(source.result["train"]["weights_from_step"])
    kept.copy(folder / TRAJECTORY, step)
    trained = source.trained("cpu")
    with tempfile.TemporaryDirectory() as again:
        rebuild_artefact(
            open_trajectory(folder / TRAJECTORY),
            Path(again),
            device=source.recipe.model.device,
            trust_remote_code=source.trusted,
        )
        mine, theirs = (
            {name: tensor for file in sorted(at.glob("*.safetensors")) for name, tensor in load_file(file).items()}
            for at in (Path(again), source.folder.model_path)
        )
    if digest(mine) != digest(theirs):
        raise ExportError(
            f"A replay must give the trained model bit for bit. That of {kept.path} does not. Nothing was written. Try "
            "--to adapter or --to merged."
        )
    shutil.copyfile(source.folder.recipe_path, folder / RECIPE)
    card = render_card(source.result, source.info, trained, to="trajectory", dtype="fp32", proof=None)
    (folder / CARD).write_text(card, encoding="utf-8")
    size = (folder / TRAJECTORY).stat().st_size
    return Exported(
        target,
        {"step": step, "tensors": len(mine), "bitwise": True},
        f"{step:,} steps in {size:,} bytes. Replayed here, they give all {len(mine)} tensors of the trained model bit "
        "for bit; the model under it is not part.",
    )


def _merged(source: _Run, folder: Path, target: Path, dtype: str, device: str) -> Exported:
    chosen = source.info["extra"]["dtype"] if dtype == "auto" else dtype
    trained = source.trained(device)
    rows = held_out(source.recipe, trained.task, trained.renderer)
    in_fp32(trained.model)
    place = trained.device
    said = answers(trained.model, rows, place)
    base = None
    peft: Any = trained.model if source.info["adapter"] not in WHOLE else None
    if peft is not None:
        with peft.disable_adapter():
            base = read_logits(trained.model, rows, place)
    facts = base_facts(source.info["base"], trust_remote_code=source.trusted)
    was_quantized = source.info["adapter"] == "qlora" or facts.quantized
    plain = merged_model(trained, source.folder.model_path)
    save_plain(plain, trained, facts.folder, folder, torch_dtype(chosen), was_quantized=was_quantized)
    del plain, peft
    trained = replace(trained, model=torch.nn.Identity())
    gc.collect()  # PEFT's models hold themselves in a circle, and the next model needs the memory
    if base is None:
        base = read_logits(_untrained(source, facts, trained), rows, place)

    _same_tokens(folder, trained, rows)
    head = source.info["head"]
    merged = answers(load_plain(folder, facts, head, place, torch.float32), rows, place)
    own = None
    if chosen != "fp32":
        own = read_logits(load_plain(folder, facts, head, place, "auto"), rows, place)
    proof = compare(base, said, merged, rows, chosen, own)
    if not proof.passed:
        raise ExportError(_failure(proof, source.info["adapter"]))
    _describe(source, trained, folder, "merged", chosen, proof)
    return Exported(target, proof.summary(), _says(proof))


def _untrained(source: _Run, facts: ModelFacts, trained: Trained) -> torch.nn.Module:
    """The base of a run without a PEFT adapter."""
    dtype = torch.float32 if source.info["adapter"] == "none" else torch_dtype(source.info["extra"]["dtype"])
    return in_fp32(load_base(facts, trained.task.form, trained.task.labels, trained.device, dtype))


def _same_tokens(folder: Path, trained: Trained, rows: HeldOut) -> None:
    """The saved tokenizer must give the ids the model was trained on."""
    about = {"kind": trained.facts.kind, "trust_remote_code": trained.facts.trust_remote_code}
    facts = inspect_model(ModelSection(name=str(folder), **about))
    renderer = trained.renderer
    again = Renderer(load_tokenizer(facts), facts.kind, rows.task, renderer.max_length, renderer.chat_template)
    if any(r.ids != s.ids for e in rows.examples for r, s in zip(renderer.render(e), again.render(e), strict=True)):
        raise ExportError(
            "The exported tokenizer must give the ids of training. Received others for a held-out row. "
            "Try --to adapter, with the base model's own tokenizer."
        )


def _failure(proof: Proof, adapter: str) -> str:
    if not proof.ratio <= proof.limit:
        what = f"the merged model is off by {proof.ratio:.3g} of what was learned, more than {proof.limit:g}"
    elif not proof.computes:
        what = "the merged model's own arithmetic overflows"
    else:
        name = proof.unequal[0]
        pair = proof.metrics[name]
        what = f"{name} is {pair['merged']:.4f} instead of {pair['trained']:.4f} on {proof.rows} {proof.split} rows"
    ways = ["--dtype fp32"] if proof.dtype != "fp32" else []
    ways += ["--to adapter"] if adapter not in WHOLE else []
    advice = " or ".join(ways) or "the `model` folder of the run itself"
    return f"A merge must say what the trained model says. In {proof.dtype} {what}. Nothing was written. Try {advice}."


def _says(proof: Proof) -> str:
    metrics = ", ".join(f"{name} {pair['merged']:.4f}" for name, pair in proof.metrics.items())
    own = proof.ratio_in_own_arithmetic
    computing = "" if own is None else f"; {own:.2g} where it also computes in {proof.dtype}, as transformers loads it"
    return (
        f"Merged in {proof.dtype} and proven on {proof.rows} {proof.split} rows: off by {proof.ratio:.2g} of what was "
        f"learned (at most {proof.limit:g}{computing}), metrics equal to the trained model's ({metrics})."
    )


def _describe(source: _Run, trained: Trained, folder: Path, to: str, dtype: str, proof: Proof | None) -> None:
    """tunefork.json, recipe.yaml, the proof and the model card."""
    exported = {"to": to, "adapter": source.info["adapter"], "dtype": dtype}
    summary = None if proof is None else proof.summary()
    info: dict[str, Any] = {**source.info, "extra": {**source.info["extra"], "exported": exported, "proof": summary}}
    if to == "merged":
        info |= {"adapter": "none", "trained": []}
    write_json(folder / INFO_FILE, info)
    if summary is not None:
        write_json(folder / PROOF, summary)
    shutil.copyfile(source.folder.recipe_path, folder / RECIPE)
    card = render_card(source.result, source.info, trained, to=to, dtype=dtype, proof=proof)
    (folder / CARD).write_text(card, encoding="utf-8")
