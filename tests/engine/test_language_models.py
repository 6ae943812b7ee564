"""The language models of multimodal checkpoints, loaded alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from helpers.tiny_models import FAMILIES
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

PROMPT = [70, 81, 92, 103, 114, 125, 6, 17, 28, 39]
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
SIGLIP = {**PIXTRAL, "model_type": "siglip_vision_model"}
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({**SHAPE, **FAMILIES["gemma3"]}, SIGLIP),
    "mistral3": ({**SHAPE, "model_type": "mistral", "tie_word_embeddings": False}, PIXTRAL),
    "llava": ({**SHAPE, "model_type": "llama", "tie_word_embeddings": False}, PIXTRAL),
}


def save_multimodal(folder: Path, outer: str, *, old: bool) -> Any:
    text, vision = MULTIMODAL[outer]
    config = AutoConfig.for_model(
        outer, text_config=text, vision_config=vision, tie_word_embeddings=outer == "gemma3", image_token_index=127
    )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    names = {name: name for name in load_file(path)}
    if not old:
        names = {name: _new_name(name) for name in names}
    save_file({names[name]: tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return model


def _new_name(name: str) -> str:
    return re.sub(
        r"^language_model\.lm_head\.", "lm_head.", re.sub(r"^language_model\.model\.", "model.language_model.", name)
    )


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("outer", MULTIMODAL)
def test_tokens_are_those_of_the_whole_model(outer: str, old: bool, tmp_path: Path) -> None:
    """Catches a head that is tied and should not be, weights of the vision tower, and their bytes in the plan."""
    model = save_multimodal(tmp_path, outer, old=old)
    model.generation_config.eos_token_id = None
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 10:].tolist()
    engine = load_engine(
        EngineOptions(model=str(tmp_path), gates="none", kv_budget="96", threads=1, device="cpu", dtype="fp32")
    )
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    made = engine.generate([Request(id="a", prompt_token_ids=tuple(PROMPT), params=params)])
    assert [token for event in made for token in event.token_ids] == want
    planned = engine.facts.plan.run.part_bytes("weights")
    assert abs(planned - engine.facts.weight_bytes) < 0.02 * planned
