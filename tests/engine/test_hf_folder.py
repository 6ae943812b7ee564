"""A GGUF file as a folder: transformers alone reads from it what trimkv reads from the file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.hf_folder import write_folder
from helpers.gguf_files import write_gguf

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"


def test_a_folder_holds_the_values_of_the_file(tmp_path: Path) -> None:
    """Catches rows of q and k that stay as llama.cpp lays them, a lost template, and an end that nobody knows."""
    stored = write_gguf(tmp_path / "tiny.gguf", "llama", kind="Q4_1", template=TEMPLATE)
    write_folder(tmp_path / "tiny.gguf", tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, stored(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "user: Hi<|end|>"
    end = model.generation_config.eos_token_id
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == (end if isinstance(end, list) else [end])
