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

# How templates tell of tools and render calls and results: the manners of Qwen, Llama 3.2, Mistral and gpt-oss.
HERMES = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args-json>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}{%- for m in messages %}{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (tools and loop.first and m.role == 'system') %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA32 = """{{- '<|begin_of_text|>' }}
{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n<|eot_id|>' }}{%- endif %}
{%- for m in messages %}
{%- if m.tool_calls %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if tools and m.role == 'user' and loop.first %}{%- for tool in tools %}{{- tool | tojson(indent=4) }}{%- endfor %}
{%- endif %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{{- '<s>' }}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{- raise_exception('ids have length 9') }}{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids have length 9') }}{%- endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{%- endfor %}{{- ']</s>' }}
{%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"""

HARMONY = """
{%- if tools %}{{- '<|start|>developer<|message|># Tools\\nnamespace functions {' }}{%- for tool in tools %}
{{- 'type ' + tool.function.name + ' = (_: ' + tool.function.parameters | tojson + ') => any; // ' }}
{{- tool.function.description }}{%- endfor %}{{- '}<|end|>' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'tool' %}
{{- '<|start|>functions.f to=assistant<|channel|>commentary<|message|>' + m.content | tojson + '<|end|>' }}
{%- elif m.tool_calls %}{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
{{- '<|channel|>commentary json<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- elif m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

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


def hermes() -> PreTrainedTokenizerFast:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    calls = [AddedToken(name, special=False) for name in ("<tool_call>", "</tool_call>", "<tool_response>")]
    return byte_level(*special(*names), *calls, template=HERMES, eos_token="<|im_end|>")


def llama32() -> PreTrainedTokenizerFast:
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>")
    names = special("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *headers)
    return byte_level(*names, template=LLAMA32, eos_token="<|eot_id|>")


def mistral() -> PreTrainedTokenizerFast:
    turns = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    names = special("<s>", "</s>", *turns, "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]")
    return byte_level(*names, template=MISTRAL, eos_token="</s>")


def harmony() -> PreTrainedTokenizerFast:
    marks = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")
    return byte_level(*special("<|endoftext|>", *marks), template=HARMONY, eos_token="<|return|>")


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
