"""All of `make mini` at toy size: model, conversations, gates; then what `trimkv eval` says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.mini import recipe
from examples.mini.conversations import write_conversations, write_lines
from examples.mini.exam import answers_right
from examples.mini.rows import Encoder, make_batch
from examples.mini.tokenizer import VOCAB_SIZE
from examples.mini.training import weighted_loss
from trimkv_cli.app import main
from trimkv_cli.eval.exam import EvalOptions
from trimkv_cli.eval.run import evaluate
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.mini.language import TOKENS_PER_WORD, make_recall

pytestmark = pytest.mark.slow

DATA = "conversations.jsonl"
SCHEDULE = replace(recipe.TOY, tokens=100_000, stage_tokens=20_000, log_steps=10)
ONE_STEP = [*("--memory-size", "8", "--context", "128", "--steps", "1", "--batch", "2", "--accumulate", "1")]
SOME_STEPS = [
    *("--student", "evicting", "--memory-size", "16", "--context", "256", "--steps", "60", "--batch", "4"),
    *("--accumulate", "1", "--hidden", "64", "--lr", "1e-2", "--schedule", "cosine"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_whole_recipe_at_toy_size(tmp_path: Path) -> None:
    """Catch a recipe that no longer learns, and files of one step that the next does not take."""
    recipe.build(tmp_path, SCHEDULE, config=recipe.TOY_CONFIG)
    _check_model(tmp_path)
    write_conversations(tmp_path / DATA, count=200, tokens=256, seed=1)
    gates = train_gates(str(tmp_path / "model"), tmp_path, ONE_STEP)
    assert load_engine(EngineOptions(model=str(tmp_path / "model"), gates=gates)).facts.gate.trained


def test_gates_trained_anew_beat_streaming(tmp_path: Path) -> None:
    """Catch a training of gates that teaches them nothing: a short one has to find out what is asked for later."""
    write_recall(tmp_path / DATA, count=200, tokens=230)
    gates = train_gates(str(MODEL_FOLDER), tmp_path, SOME_STEPS)
    engine = EngineOptions(model=str(MODEL_FOLDER), gates=gates, threads=1)
    asked = EvalOptions(
        tasks=("recall",),
        context=200,
        samples=20,
        budgets=("48",),
        policies=("gates", "streaming"),
        prefill_chunk=16,
        logprob=True,
    )
    kept, streamed = evaluate(find_source(engine, weights=True), engine, asked, say=lambda _: None)
    assert kept.accuracy >= streamed.accuracy + 0.2
    assert kept.answer_logprob is not None
    assert streamed.answer_logprob is not None
    assert kept.answer_logprob > streamed.answer_logprob + 0.3


def train_gates(model: str, folder: Path, arguments: list[str]) -> str:
    """Train gates on the folder's conversations; return the gates' folder."""
    data, gates = str(folder / DATA), str(folder / "gates")
    with pytest.raises(SystemExit) as ended:
        main(["gates", "train", model, "--data", data, "-o", gates, "--threads", "1", "--dtype", "fp32", *arguments])
    assert not ended.value.code
    return gates


def write_recall(out: Path, *, count: int, tokens: int) -> None:
    """Write what a few steps can learn from: conversations of one skill, which any weights of mini have."""
    rng = Random(1)
    write_lines(out, (make_recall(rng, facts=4, length=int(tokens / TOKENS_PER_WORD)) for _ in range(count)))


def _check_model(folder: Path) -> None:
    """The loss fell, and the folder says so of itself."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs_end = next(index for index, line in enumerate(log) if "mastered" in line)  # then conversations begin
    for first, last in ((log[0], log[pairs_end]), (log[pairs_end + 2], log[-1])):
        assert last["loss"] < 0.8 * first["loss"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert model.config.max_position_embeddings == SCHEDULE.max_positions
    batch = make_batch(Encoder(tokenizer), Random("x"), rows=8, length=128, max_positions=1000)
    with torch.no_grad():
        assert weighted_loss(model, batch)[0] < 0.75 * torch.tensor(float(VOCAB_SIZE)).log()
    marks, tokens = answers_right(model, Encoder(tokenizer), make_recall(Random(1), facts=3, length=60))
    assert len(marks) == 3
    assert tokens > 60
