"""A real model of 135 million parameters, from its GGUF file, as a user runs it."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from bench.packed_quality import Compared, load, windows
from helpers.programs import COMMAND, ENVIRONMENT, ROOT
from helpers.smollm2 import HOME, NAME, smollm2_file
from helpers.terminals import CTRL_D, Terminal
from trimkv_cli.loading.gguf import gguf_model_config, gguf_tokenizer, gguf_weights
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.gguf import read_gguf
from trimkv_cli.request import Request, SamplingParams

BUDGET = "1500MiB"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file() -> Path:
    return smollm2_file()


def trimkv(*arguments: str | Path, stdin: str = "", cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, **HOME, "OMP_NUM_THREADS": "2"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=stdin, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_capital_of_france(file: Path, tmp_path: Path) -> None:
    """Catches weights, a tokenizer or a template that are not those of the file."""
    done = trimkv("ask", "-m", str(file), "What is the capital of France?", "--greedy", "-n", "12", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr


def test_a_long_text_is_read_within_the_budget_and_asked_again(file: Path, tmp_path: Path) -> None:
    """Catches memory that grows with a text of 2,000 tokens, and a saved read that answers as another model."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "CONTRIBUTING.md", "README.md"))
    (tmp_path / "long.txt").write_text(text[:8_500], encoding="utf-8")
    asked = ["-m", NAME, "--gates", "streaming", "--kv-budget", "256", "-b", BUDGET, "--greedy", "-n", "24"]
    read = trimkv("summarize", "long.txt", *asked, "--json", "--save-cache", "long.kv", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    record = json.loads(read.stdout)
    assert record["usage"]["prompt_tokens"] > 1600
    assert record["trimkv"]["budget"]["honoured"] is True
    assert record["trimkv"]["cache"]["kept_per_head"] == 256
    again = trimkv("ask", "--cache", "long.kv", "What is this text about?", *asked, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip()


def test_ten_lines_keep_to_a_schema(file: Path, tmp_path: Path) -> None:
    """Catches a grammar that does not fit the tokenizer of a GGUF file."""
    cities = ("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Prague", "Warsaw", "Athens", "Dublin")
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    lines = [
        {"messages": [{"role": "user", "content": f"Describe {city}."}], "max_tokens": 32, "response_format": form}
        for city in cities
    ]
    source = "".join(json.dumps({"id": str(index), **line}) + "\n" for index, line in enumerate(lines))
    done = trimkv("run", "-", "-m", NAME, "--gates", "streaming", "-b", BUDGET, "-q", stdin=source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line)["response"]["body"] for line in done.stdout.splitlines()]
    assert len(records) == 10
    for record in records:
        assert set(json.loads(record["choices"][0]["message"]["content"])) == {"city", "large"}


def test_a_conversation_of_four_turns_goes_on(file: Path, tmp_path: Path) -> None:
    """Catches turns that read everything again, and a session that does not go on with the model of a profile."""
    flags = ("-m", NAME, "--gates", "streaming", "--kv-budget", "256", "-b", BUDGET, "--greedy", "-n", "16")
    with Terminal("chat", *flags, "--session", "real", home=tmp_path, environment=HOME) as terminal:
        terminal.wait(lambda: terminal.asks)
        for turn in range(4):
            terminal.send(f"My number {turn} is {turn * 7}. Say okay.")
        terminal.type(CTRL_D)
        assert terminal.wait_end() == 0
    said = (tmp_path / "state" / "trimkv").exists()
    assert said
    with Terminal("chat", "--session", "real", home=tmp_path, environment=HOME) as terminal:
        terminal.wait(lambda: terminal.asks)
        assert "nothing to read again" in terminal.text
        terminal.send("What is my number 3?")
        assert terminal.text.rpartition("What is my number 3?")[2].strip(" \n>"), "no answer"
        terminal.type(CTRL_D)
        assert terminal.wait_end() == 0
    assert "Traceback" not in terminal.text


def test_tokens_are_those_of_transformers_and_kept_is_what_streaming_keeps(file: Path) -> None:
    """Catches a decode on a CPU that differs from the model's own, and slots that hold other tokens."""
    text = gguf_tokenizer(file)
    prompt = text("The river runs through the old town, past the mill and the market, and " * 4).input_ids
    header = read_gguf(file)
    config, _ = gguf_model_config(header)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    weights = gguf_weights(header, kind, config, torch.float32)
    plain = kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()
    made = plain.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
    request = Request(
        id="a",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True),
        keep=True,
    )
    options = EngineOptions(model=str(file), gates="none", kv_budget="200", dtype="fp32", device="cpu", max_inflight=1)
    options = replace(options, quantize="none")
    with closing(load_engine(options)) as engine:
        assert [token for event in engine.generate([request]) for token in event.token_ids] == made
    options = replace(options, gates="streaming:4", kv_budget="64")
    with closing(load_engine(options)) as engine:
        list(engine.generate([request]))
        seen = engine.kept.seen("a")
        expected = [*range(4), *range(seen - 60, seen)]
        assert all(sorted(kept) == expected for heads in engine.kept.positions("a") for kept in heads)


def test_packed_weights_say_nearly_what_unpacked_ones_do(file: Path) -> None:
    """Catches a form that blurs: twice the divergence of plain bf16 on real text, or one token in 16 that changes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    whole, packed = (load(file, "fp32", form)[0] for form in ("none", "stored"))
    made = Compared()
    with torch.inference_mode():
        for ids in windows(file, text, 1500):
            made.add(ids, *(model(input_ids=ids[None]).logits[0] for model in (packed, whole)))
    said = made.as_json()
    assert said["kl"] <= 3e-3
    assert said["top1_agreement"] >= 0.94
    assert abs(said["perplexity"] / said["perplexity_fp32"] - 1) < 0.02


@pytest.mark.parametrize("form", ["stored", "int4"])
def test_what_a_plan_says_is_enough(form: str, file: Path, tmp_path: Path) -> None:
    """Catches matrices that are whole while they are packed, and products that nobody counted."""
    sizes = ["-m", NAME, "--gates", "streaming", "--kv-budget", "256", "--quantize", form, "--prefill-chunk", "512"]
    planned = trimkv("plan", *sizes, "-b", BUDGET, "--rows", "1", "--json", cwd=tmp_path)
    budget = json.loads(planned.stdout)["total_bytes"]
    prompt = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")[:5000]
    done = trimkv("ask", *sizes, "-b", str(budget), "-n", "8", "--json", prompt, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["usage"]["prompt_tokens"] > 1024
    assert record["trimkv"]["memory"]["peak_bytes"] <= budget
