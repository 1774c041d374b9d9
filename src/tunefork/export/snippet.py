"""The few lines that load and ask an exported model with plain transformers or PEFT, for its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunefork.errors import DataError
from tunefork.evaluate.trained import Trained
from tunefork.models.architecture import meta_model, read_config, without_quantization
from tunefork.models.facts import ModelFacts
from tunefork.models.quantize import not_quantized
from tunefork.tasks.base import MASK
from tunefork.tasks.template import fill, names_in

STAND_IN = "The parcel came two days early."

_TEMPLATED = "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
_DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


@dataclass(frozen=True)
class Artefact:
    """What decides how an exported model is loaded."""

    trained: Trained
    to: str  # merged, adapter or trajectory
    adapter: str
    base: str  # folder or hub name of the base
    dtype: str  # the base was computed in


def snippet(artefact: Artefact) -> str:
    """Python that runs in the exported folder and prints an answer for a text of its own."""
    return "\n".join([*_loading(artefact), "", *_asking(artefact.trained)]) + "\n"


def model_class(trained: Trained) -> str:
    """The class of plain transformers that reads the model."""
    if trained.task.form == "head":
        return "AutoModelForSequenceClassification"
    return "AutoModelForCausalLM" if trained.facts.kind == "causal" else "AutoModelForMaskedLM"


def _loading(artefact: Artefact) -> list[str]:
    trained, name = artefact.trained, model_class(artefact.trained)
    whole = artefact.to == "merged" or artefact.adapter in ("none", "head")
    nf4 = not whole and artefact.adapter == "qlora"
    names = [name, "AutoTokenizer", *(["BitsAndBytesConfig"] if nf4 else [])]
    lines = ["import torch", f"from transformers import {', '.join(names)}"]
    there = '"."  # this folder' if artefact.to != "trajectory" else '"model"  # made by the replay'
    start = [f"folder = {there}", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if whole:
        return [*lines, "", *start, f'model = {name}.from_pretrained(folder, dtype="auto").eval()']
    options: dict[str, str] = {"dtype": _DTYPES[artefact.dtype]}
    if trained.task.form == "head":
        options["id2label"] = repr(dict(enumerate(trained.task.labels)))
        options["label2id"] = repr({label: i for i, label in enumerate(trained.task.labels)})
        if trained.facts.kind == "causal":
            options["pad_token_id"] = "tokenizer.pad_token_id"
    if nf4:
        start += _nf4(trained.facts, trained.task.form == "head", artefact.dtype)
        options["quantization_config"] = "nf4"
    given = "".join(f"    {key}={value},\n" for key, value in options.items())
    quantized = nf4 or trained.facts.quantized  # the merged model is not, and was left above
    load = [f"base = {name}.from_pretrained(\n    {json.dumps(artefact.base)},\n{given})"]
    if quantized:
        lines.insert(1, "from bitsandbytes.nn import Linear4bit")
        load += [
            "for layer in base.modules():",
            "    if isinstance(layer, Linear4bit):",
            "        layer.support_avx512bf16_for_cpu = False  # wrong results on such CPUs (bitsandbytes #2078)",
        ]
    load.append("model = PeftModel.from_pretrained(base, folder).eval()")
    return [*lines, "from peft import PeftModel", "", *start, *load]


def _nf4(facts: ModelFacts, head: bool, dtype: str) -> list[str]:
    """The quantisation of training; with other layers in NF4 the adapter is another model."""
    config = without_quantization(read_config(facts.folder, facts.trust_remote_code))
    skipped = not_quantized(meta_model(config, facts.kind, head, facts.trust_remote_code))
    return [
        "nf4 = BitsAndBytesConfig(",
        "    load_in_4bit=True,",
        '    bnb_4bit_quant_type="nf4",',
        f"    bnb_4bit_compute_dtype={_DTYPES[dtype]},",
        f"    llm_int8_skip_modules={json.dumps(skipped)},",
        ")",
    ]


def _asking(trained: Trained) -> list[str]:
    if trained.task.form == "chat":
        asked = 'messages = [{"role": "user", "content": ' + json.dumps(STAND_IN) + "}]"
        return [asked, _TEMPLATED, *_generating(trained)]
    prompt = stand_in_prompt(trained)
    if trained.task.form == "head":
        return [
            f'inputs = tokenizer({_quoted(prompt)}, return_tensors="pt")',
            "with torch.inference_mode():",
            "    logits = model(**inputs).logits[0]",
            "print(model.config.id2label[int(logits.argmax())])",
        ]
    if trained.facts.kind == "masked":
        return _masked(trained, prompt)
    templated = trained.renderer.chat_template
    asked = [f"prompt = {_quoted(_with_start(trained, prompt))}"]
    if templated:
        asked = [f'messages = [{{"role": "user", "content": {_quoted(prompt)}}}]', _TEMPLATED]
    if trained.task.form == "text":
        return [*asked, *_generating(trained)]
    labels = trained.task.labels or ("the first choice", "the second choice")
    space = "" if templated or prompt[-1:].isspace() else " "
    return [
        *asked,
        f"candidates = {json.dumps([space + label for label in labels], ensure_ascii=False)}",
        "",
        "",
        "def score(candidate):",
        '    """Mean log-probability of the candidate\'s tokens after the prompt."""',
        '    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]',
        '    ids = tokenizer(prompt + candidate, add_special_tokens=False, return_tensors="pt")["input_ids"]',
        "    with torch.inference_mode():",
        "        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1].float()",
        "    return torch.log_softmax(logits, -1).gather(1, ids[0, len(start) :, None]).mean()",
        "",
        "",
        "print(max(candidates, key=score).strip())",
    ]


def _masked(trained: Trained, prompt: str) -> list[str]:
    before, _, after = prompt.partition(MASK)
    renderer = trained.renderer
    return [
        f"before, after = {_quoted(before.rstrip())}, {_quoted(after)}",
        f"labels = {json.dumps(list(trained.task.labels), ensure_ascii=False)}",
        'words = [tokenizer(" " + label, add_special_tokens=False)["input_ids"][0] for label in labels]',
        'left, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))',
        f"start, end = {list(renderer.start)}, {list(renderer.end)}  # what the tokenizer puts around a text",
        "ids = torch.tensor([[*start, *left, tokenizer.mask_token_id, *right, *end]])",
        "with torch.inference_mode():",
        "    logits = model(input_ids=ids).logits[0, len(start) + len(left)]",
        "print(labels[int(logits[words].argmax())])",
    ]


def _generating(trained: Trained) -> list[str]:
    task = trained.task
    options = f"max_new_tokens={task.max_new_tokens}, do_sample=False"
    if task.stop:
        options += f", stop_strings={json.dumps(list(task.stop), ensure_ascii=False)}, tokenizer=tokenizer"
    return [
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        f"said = model.generate(**inputs, {options})",
        'print(tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def stand_in_prompt(trained: Trained) -> str:
    """The task's wording around STAND_IN; that alone where the wording wants more than texts."""
    wording: Mapping[str, Any] = trained.task.wording
    key = next((k for k in ("masked_prompt", "prompt", "text") if wording.get(k) and _fits(trained, k)), None)
    if key is None:
        return STAND_IN
    template = str(wording[key])
    try:
        return fill(template, f"task.{key}", dict.fromkeys(names_in(template), STAND_IN), "the model card")
    except DataError:
        return STAND_IN


def _fits(trained: Trained, key: str) -> bool:
    return (key == "masked_prompt") == (trained.facts.kind == "masked") or trained.task.form == "head" or key == "text"


def _with_start(trained: Trained, prompt: str) -> str:
    """The prompt with the start token in its text, so that no tokenizer adds an end token behind it."""
    start: str = trained.tokenizer.decode(list(trained.renderer.start)) if trained.renderer.start else ""
    return start + prompt


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
