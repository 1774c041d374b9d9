"""Chat templates of the common families, written for the tests, and tokenizers that know their marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from tests.tiny import embedded_model
from tunefork.recipe.schema import DataSection, ModelKind, TaskSection
from tunefork.render import Rendered, Renderer
from tunefork.tasks import Example, Message, make_task

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|sep|>\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
STRIPS_REASONING = (  # earlier replies lose what stands before </think>, the last one keeps it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_REASONING = (  # opens what a finished turn never shows: no reply continues its prompt
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS = (
    "{% if tools %}tools: {{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}\n{% endif %}"
    + CHATML
)
SAME_EACH_TIME: Mapping[str, str] = {"chatml": CHATML, "llama3": LLAMA3, "tools": TOOLS}


def embedded_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model())


def with_template(template: str | None) -> Any:
    """The embedded tokenizer with another chat template, whose turns end with <|im_end|>, its end token."""
    tokenizer = embedded_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|sep|>"], "eos_token": "<|im_end|>"},
    )
    tokenizer.chat_template = template
    return tokenizer


def task(name: str = "chat", labels: Sequence[str] | None = None, kind: ModelKind = "causal", **section: Any) -> Any:
    return make_task(TaskSection(name=name, **section), DataSection(), kind, (), labels)


def renderer(tokenizer: Any, asked: Any = None, max_length: int = 512, template: bool = False) -> Renderer:
    return Renderer(tokenizer, "causal", asked or task(), max_length, template)


def chat(*turns: tuple[str, str], **more: Any) -> Example:
    return Example("chats.jsonl:3", messages=tuple(Message(role, text) for role, text in turns), **more)  # type: ignore[arg-type]


def learned(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The runs of trained tokens, as text with special tokens."""
    runs: list[list[int]] = []
    before = False
    for token, use in zip(rendered.ids, rendered.trained, strict=True):
        if use and not before:
            runs.append([])
        if use:
            runs[-1].append(token)
        before = use
    return [tokenizer.decode(run) for run in runs]
