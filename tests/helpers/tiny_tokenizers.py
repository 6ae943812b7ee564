"""Tokenizers trained on a few lines, and small chat templates in the manner of the families that trimkv runs."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog. user assistant system model",
    "You are a helpful assistant. Hello, what is the weather today? It is sunny.",
    "naïve café — über, 中文字符 and emoji 🎉🎉 in a line\n\nA new paragraph",
] * 4

CHATML = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

LLAMA3 = """{{- '<|begin_of_text|>' }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

GEMMA = """{{- '<bos>' }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI3 = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- '<|endoftext|>' }}{%- endif %}"""

LLAMA2 = """{%- for m in messages %}{%- if m.role == 'user' %}{{- '<s>[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + ' </s>' }}{%- endif %}{%- endfor %}"""

THINK = (AddedToken("<think>", special=False), AddedToken("</think>", special=False))


def special(*names: str, rstrip: bool = False) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name, special=True, normalized=False, rstrip=rstrip) for name in names)


def byte_level(*added: AddedToken, template: str | None = None, **kwargs: object) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as GPT-2, Qwen and Llama 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, added, template, kwargs)


def sentencepiece_like(
    *added: AddedToken, template: str | None = None, scheme: str = "legacy", **kwargs: object
) -> PreTrainedTokenizerFast:
    """Train a BPE over "▁" with byte tokens, as Llama 2, Mistral, Phi-3 ("legacy") and Gemma ("never") have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    ascii_only = [line.encode("ascii", "ignore").decode() for line in CORPUS]
    tokenizer.train_from_iterator(ascii_only, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    described = json.loads(tokenizer.to_str())
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *described["model"]["vocab"]]
    described["model"]["vocab"] = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return _wrap(Tokenizer.from_str(json.dumps(described)), added, template, kwargs)


def _wrap(
    tokenizer: Tokenizer, added: tuple[AddedToken, ...], template: str | None, kwargs: dict[str, object]
) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **kwargs)


def chatml() -> PreTrainedTokenizerFast:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(*special(*names), *THINK, template=CHATML, eos_token="<|im_end|>")


def llama3() -> PreTrainedTokenizerFast:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return byte_level(*special(*names), template=LLAMA3, eos_token="<|eot_id|>")


def gemma() -> PreTrainedTokenizerFast:
    names = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    newlines = AddedToken("\n\n", special=False, normalized=False)
    return sentencepiece_like(*special(*names), newlines, template=GEMMA, scheme="never", eos_token="<eos>")


def phi3() -> PreTrainedTokenizerFast:
    tight = special("<|assistant|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True)
    loose = special("<s>", "<|endoftext|>")
    return sentencepiece_like(*loose, *tight, template=PHI3, eos_token="<|endoftext|>")


def llama2() -> PreTrainedTokenizerFast:
    return sentencepiece_like(
        *special("<s>", "</s>"),
        template=LLAMA2,
        scheme="first",
        bos_token="<s>",
        eos_token="</s>",
    )
