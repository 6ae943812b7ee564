"""The log-likelihood of expected answers: those that the model says, and those that it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimkv_cli.eval.exam import EvalOptions
from trimkv_cli.eval.run import evaluate
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.mini import MODEL_FOLDER

ASKED = "My cat is called Zubo. What is my cat called?"
ANSWERS = ["Your cat is called Zubo.", "No 17\nbirds!"]


def by_transformers(answer: str) -> list[float]:
    """Return each token's log probability in one forward over question and answer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    messages = [{"role": "user", "content": ASKED}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.encode(answer)
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("answers", [ANSWERS[:1], ANSWERS[1:], ANSWERS])
def test_log_likelihood_is_that_of_the_expected_answer(tmp_path: Path, answers: list[str]) -> None:
    """Catch what the model says itself counted in its place, a token left out, or the end counted in."""
    data = tmp_path / "own.jsonl"
    lines = [{"messages": [{"role": "user", "content": ASKED}], "answer": answer} for answer in answers]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    engine = EngineOptions(model="mini", threads=1, dtype="fp32")
    asked = EvalOptions(tasks=(), data=str(data), budgets=("100",), policies=("full", "gates"), logprob=True)
    rows = evaluate(find_source(engine, weights=True), engine, asked, say=lambda _: None)
    expected = [value for answer in answers for value in by_transformers(answer)]
    for row in rows:
        assert row.answer_logprob == pytest.approx(sum(expected) / len(expected), rel=1e-3, abs=1e-5)
