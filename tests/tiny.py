"""Tiny random models with real tokenizers, one for each architecture the tests try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

CAUSAL = ("llama", "gpt2", "opt", "qwen", "gemma")
MASKED = ("roberta", "bert")
KINDS = CAUSAL + MASKED

SENTENCES = (
    "The delivery was fast and the box arrived in one piece.",
    "I would not buy this again, the screen broke after two days.",
    "It was great! Truly wonderful service, thank you.",
    "This is a terrible film; it was bad from start to end.",
    "It is okay, neither good nor bad.",
    "Question: What is the capital of France? Answer: Paris. Yes, no, true, false, maybe.",
    "Review: positive, negative, neutral. Label: 0 1 2 3 4 5 6 7 8 9.",
    "Summary: Anna and Tom will meet at noon to talk about the report.",
    "Because the man lost his keys, he could not open the door. So what happened as a result?",
    "user assistant system: Hello, how can I help you today?",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def embedded_model() -> Path:
    """Folder of the model that ships with the package."""
    return Path(str(files("tunefork") / "assets" / "fork-tiny"))


def tiny_model(
    kind: str,
    folder: Path,
    *,
    vocab_texts: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Saves a random model of `kind` (one of KINDS: hidden 32, 2 layers, 256 positions) and its tokenizer in `folder`.

    The tokenizer is trained on `vocab_texts` (SENTENCES when absent): byte-level BPE, or WordPiece for bert.
    Causal models carry a chat template whose turns end with `<|end|>` (the eos token). As in the originals, gpt2 has
    no pad token, qwen no bos token. Weights are a function of `seed`, large enough (std 0.08) for clear logits.
    """
    tokenizer = _wordpiece(vocab_texts or SENTENCES) if kind == "bert" else _byte_level(kind, vocab_texts or SENTENCES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[kind](tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level(kind: str, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    roberta = kind == "roberta"
    turns = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
    pad, bos = ("<|endoftext|>", None) if kind == "qwen" else (None, "<s>") if kind == "gpt2" else ("<pad>", "<s>")
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else [t for t in (pad, bos) if t] + turns
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    ids = {token: raw.token_to_id(token) for token in specials}
    if roberta:
        raw.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token="<s>",
            eos_token="</s>",
            cls_token="<s>",
            sep_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
            mask_token="<mask>",
            model_max_length=254,
            model_input_names=["input_ids", "attention_mask"],
        )
    if kind not in ("gpt2", "qwen"):  # these add no bos token to a text
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=bos,
        eos_token="<|end|>",
        pad_token=pad,
        additional_special_tokens=turns[:-1],
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _wordpiece(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    # by hand: the library's trainer gives other ids in every process
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *sorted(words)]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    raw = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    raw.normalizer, raw.pre_tokenizer, raw.decoder = normalizer, splitter, decoders.WordPiece()
    cls, sep = raw.token_to_id("[CLS]"), raw.token_to_id("[SEP]")
    raw.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _common(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.08,
    }


def _blocks(positions: int = 256, ffn: int = 64) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": ffn,
        "max_position_embeddings": positions,
    }


def _llama(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    config = LlamaConfig(**_common(tokenizer), **_blocks(), num_key_value_heads=2, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


def _qwen(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    config = Qwen2Config(**_common(tokenizer), **_blocks(), num_key_value_heads=2, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config)


def _gemma(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    config = Gemma2Config(
        **_common(tokenizer),
        **_blocks(),
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=64,
        query_pre_attn_scalar=16,
    )
    return Gemma2ForCausalLM(config)


def _gpt2(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    config = GPT2Config(**_common(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256)
    return GPT2LMHeadModel(config)


def _opt(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    common = _common(tokenizer)
    config = OPTConfig(
        **{k: v for k, v in common.items() if k != "initializer_range"},
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        init_std=0.08,
    )
    return OPTForCausalLM(config)


def _roberta(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    # two positions are lost to the padding offset
    return RobertaForMaskedLM(RobertaConfig(**_common(tokenizer), **_blocks(positions=258), type_vocab_size=1))


def _bert(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    return BertForMaskedLM(BertConfig(**_common(tokenizer), **_blocks()))


_BUILDERS: dict[str, Callable[[PreTrainedTokenizerFast], torch.nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "qwen": _qwen,
    "gemma": _gemma,
    "roberta": _roberta,
    "bert": _bert,
}


def adapter_section(name: str, method: str = "backprop", *, rank: int = 4, prefix_tokens: int = 4) -> dict[str, Any]:
    """A recipe's `adapter` with what is read of it: a recipe that says more is refused."""
    section: dict[str, Any] = {"name": name}
    if name in ("lora", "dora") or (name == "qlora" and method == "backprop"):
        section["rank"] = rank
    return section | ({"prefix_tokens": prefix_tokens} if name == "prefix" else {})
