"""Which tokens end an answer: those of every file that names some."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.mini import GATES_FOLDER, MODEL_FOLDER


@pytest.mark.parametrize("eos", [None, 0, [0, 5]])
def test_the_tokenizers_end_of_a_turn_ends_an_answer_whatever_the_configs_name(tmp_path: Path, eos: object) -> None:
    """Catches an answer that runs on into turns of its own making, as the configs do not name the template's end."""
    shutil.copytree(MODEL_FOLDER, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / "model" / name
        config = {**json.loads(file.read_text()), "eos_token_id": eos}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    options = EngineOptions(model=str(tmp_path / "model"), gates=str(GATES_FOLDER), offline=True, max_inflight=1)
    engine = load_engine(options)
    assert engine.text is not None
    named = eos if isinstance(eos, list) else [] if eos is None else [eos]
    assert engine.facts.eos_token_ids == {engine.text.tokenizer.convert_tokens_to_ids("<|im_end|>"), *named}
