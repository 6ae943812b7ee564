"""Mistakes in what a command makes of a budget of reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import tiny_tokenizers
from helpers.programs import Run


@pytest.fixture
def thinker(tmp_path: Path, tiny_model: Callable[..., Any]) -> Path:
    """Save a random model whose template opens the reasoning in the prompt."""
    tokenizer = tiny_tokenizers.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n'", "assistant\\n<think>\\n'")
    tiny_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_reasoning_ends_with_its_budget_and_is_counted(here: Run, thinker: Path) -> None:
    """Catches a flag, a key or a count that gets lost between the command and the engine."""
    model = ("-m", thinker, "--gates", "none", "--greedy", "--ignore-eos", "-n", "16", "-q")
    asked = here("ask", "What is it?", *model, "--think-budget", "4", "--json")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    said = answer["choices"][0]["message"]["content"]
    assert "\n</think>\n\n" in said
    messages = {"messages": [{"role": "user", "content": "What is it?"}]}
    json_ = {"response_format": {"type": "json_object"}, "ignore_eos": False}
    lines = [messages, {**messages, "reasoning_budget": 0.0}, {**messages, "reasoning_budget": -1}]
    lines += [{**messages, "n": 2, "reasoning_budget": 3}, {**messages, **json_, "reasoning_budget": 0}]
    source = write_lines(thinker / "in.jsonl", *lines)
    ran = here("run", source, *model, "--think-budget", "4", "--order", "input")
    bodies = [json.loads(line)["response"]["body"] for line in ran.stdout.splitlines()]
    assert bodies[0]["choices"][0]["message"]["content"] == said
    assert bodies[1]["choices"][0]["message"]["content"].startswith("\n</think>\n\n")
    assert bodies[2]["error"]["param"] == "reasoning_budget"
    tokens = [body["usage"]["completion_tokens_details"]["reasoning_tokens"] for body in bodies if "usage" in body]
    assert tokens == [4, 0, 6, 0]
    assert "</think>" not in bodies[4]["choices"][0]["message"]["content"]


def test_a_model_that_knows_no_reasoning_is_refused_before_it_is_loaded(here: Run, tmp_path: Path) -> None:
    """Catches a budget that is passed over without a word."""
    line = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    source = write_lines(tmp_path / "in.jsonl", {**line, "reasoning_budget": 4}, line)
    done = here("ask", "hi", "-m", "mini", "--think-budget", "4", "-q")
    assert done.returncode == 2
    assert b"error: mini knows no <think>" in done.stderr, done.stderr
    assert b"hint: leave out --think-budget" in done.stderr
    ran = here("run", source, "-m", "mini", "-q", "--order", "input")
    refused, answered = (json.loads(line)["response"] for line in ran.stdout.splitlines())
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "reasoning_budget")
    assert answered["status_code"] == 200
    assert "completion_tokens_details" not in answered["body"]["usage"]
    assert here("ask", "hi", "-m", "mini", "--think-budget", "-1").returncode == 2
