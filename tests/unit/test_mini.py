"""The built-in model: what ships is what the recipe builds, and stock transformers reads it."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.mini import recipe
from examples.mini.exam import SUBJECTS, answers_right
from examples.mini.rows import Encoder
from examples.mini.tokenizer import build_tokenizer
from examples.mini.training import Schedule
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.mini.language import TOKENS_PER_WORD, make_recall
from trimkv_cli.request import Request, SamplingParams

MAX_BYTES = 8 * 1024 * 1024


def test_the_tokenizer_is_the_recipe_s() -> None:
    """Catch a language whose words changed after the model was trained: its ids no longer belong to the embeddings."""
    schedule = Schedule()
    built = build_tokenizer(seed=schedule.seed, max_length=schedule.max_positions)
    shipped = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert json.loads(shipped.backend_tokenizer.to_str()) == json.loads(built.backend_tokenizer.to_str())
    assert shipped.model_max_length == schedule.max_positions


def test_the_config_is_the_recipe_s() -> None:
    """Catch weights of another size than the recipe's, or another range of positions than was trained."""
    config = json.loads((MODEL_FOLDER / "config.json").read_bytes())
    assert {key: config[key] for key in recipe.CONFIG if key != "rope_parameters"} == {
        key: value for key, value in recipe.CONFIG.items() if key != "rope_parameters"
    }
    assert config["max_position_embeddings"] == Schedule().max_positions


def test_files_stay_small() -> None:
    """Catch a build that bloats the wheel."""
    assert sum(file.stat().st_size for file in MODEL_FOLDER.rglob("*") if file.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("subject", ["recall", "notes", "story"])
def test_it_remembers(subject: str) -> None:
    """Catch weights that were not trained, or damaged on their way; the card has the exact numbers."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL_FOLDER))
    make, _ = SUBJECTS[subject]
    marks: list[bool] = []
    for seed in range(8):
        conversation = make(Random(seed), int(500 / TOKENS_PER_WORD), False)
        marks += answers_right(model, encoder, conversation)[0]
    assert sum(marks) >= 0.8 * len(marks)


def test_loads_through_stock_transformers() -> None:
    """Catch a folder that only our own loader understands."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert model.config.model_type == "qwen3"
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    logits = model(input_ids=torch.tensor([tokenizer.encode("The letter said")])).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "text", ["The cache is full.", " two  spaces\n\tand a tab", "Überraschung 漢字 🙂", "<|im_start|>"]
)
def test_tokenizer_gives_every_text_back(text: str) -> None:
    """Catch a tokenizer that loses bytes."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_is_chatml_with_a_system_message() -> None:
    """Catch a template that drops the system message or the generation prompt."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_gates_remember_what_streaming_forgets() -> None:
    """Catch gates of another model, or that follow the position alone: 64 slots, conversations ten times as long."""
    right = {gates: _count_right(gates) for gates in ("auto", "streaming")}
    assert right["auto"] >= 16
    assert right["streaming"] <= 8


def _count_right(gates: str) -> int:
    """Count the right answers to 20 questions, each about one of three facts of its own conversation."""
    engine = load_engine(EngineOptions(model="mini", gates=gates, kv_budget="64", prefill_chunk=32, threads=1))
    assert engine.text is not None
    wanted, requests = {}, []
    for seed in range(20):
        conversation = make_recall(Random(seed), facts=3, length=260)
        question = conversation.questions[0]
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages[: question.turn]]
        wanted[str(seed)] = question.answer
        params = SamplingParams(max_tokens=48, temperature=0.0)
        ids = engine.text.render_chat(messages).token_ids
        requests.append(Request(id=str(seed), prompt_token_ids=ids, params=params))
    said = dict.fromkeys(wanted, "")
    for event in engine.generate(requests):
        said[event.request_id] += event.text
    return sum(said[key] == answer for key, answer in wanted.items())
