"""Answers of kvpress's presses to the questions that `trimkv eval --export` writes, for `trimkv eval --answers`.

It runs in an environment of its own and imports nothing of trimkv. From nothing (`make bench-kvpress` does all of it):

python3 -m venv build/kvpress && build/kvpress/bin/pip install kvpress==0.5.5 'transformers<5.3' torch==2.13.0
.venv/bin/python -m bench.hf_folder MODEL.gguf build/model
.venv/bin/trimkv eval build/model --gates none --tasks needle --context 700 --samples 100 --export build/asked.jsonl
build/kvpress/bin/python kernels/bench/kvpress_answers.py build/asked.jsonl --model build/model --out build/said.jsonl
.venv/bin/trimkv eval --data build/asked.jsonl --answers build/said.jsonl
.venv/bin/trimkv eval build/model --gates GATES --data build/asked.jsonl --match contains --prefill-chunk 64

As in kvpress's pipeline, a press sees the whole document at once, before its question is known, and keeps M tokens per
KV head; each question is then answered from a copy of what was kept, greedily. Question and answer come on top of those
M tokens, where trimkv's M slots hold them too, and nothing bounds the cache while the document is read: what differs is
in kvpress's favour. A document of at most M tokens is kept whole. Each line says versions, seconds and tokens. A run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PRESSES: Mapping[str, str | None] = {  # what is called how in kvpress; settings are its defaults
    "full": None,
    "snapkv": "SnapKVPress",
    "expected-attention": "ExpectedAttentionPress",
    "keydiff": "KeyDiffPress",
    "tova": "TOVAPress",
    "streaming-llm": "StreamingLLMPress",
}
_FIELDS = ("id", "prompt_token_ids", "document_len", "max_tokens", "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as token ids, of which the first `document_len` are the document."""

    id: str
    prompt_token_ids: tuple[int, ...]
    document_len: int
    max_tokens: int
    stop: tuple[str, ...]

    @property
    def document(self) -> tuple[int, ...]:
        return self.prompt_token_ids[: self.document_len]

    @property
    def asked(self) -> tuple[int, ...]:
        return self.prompt_token_ids[self.document_len :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One press at one number of tokens per KV head; None = all of them."""

    press: str
    kv_budget: int | None

    @property
    def policy(self) -> str:
        return f"kvpress-{self.press}"

    def kept(self, tokens: int) -> int:
        return tokens if self.kv_budget is None else min(tokens, self.kv_budget)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def read_questions(lines: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Return exported lines as questions; exits with what is wrong where one has no token ids or no document."""
    for line in lines:
        absent = [name for name in _FIELDS if name not in line]
        if absent:
            sys.exit(f"error: {line.get('id')} says no {', '.join(absent)}: export the questions again")
        if line["document_len"] < 1:
            sys.exit(f"error: {line['id']} has no document before its question, so there is nothing to press")
    return [
        Question(
            id=line["id"],
            prompt_token_ids=tuple(line["prompt_token_ids"]),
            document_len=line["document_len"],
            max_tokens=line["max_tokens"],
            stop=tuple(line["stop"]),
        )
        for line in lines
    ]


def by_document(questions: Sequence[Question]) -> list[list[Question]]:
    """Return together what is asked about the same tokens, in the order of the file."""
    groups: dict[tuple[int, ...], list[Question]] = {}
    for question in questions:
        groups.setdefault(question.document, []).append(question)
    return list(groups.values())


def make_cases(presses: Sequence[str], budgets: Sequence[int]) -> list[Case]:
    unknown = [name for name in presses if name not in PRESSES]
    if unknown:
        sys.exit(f"error: there is no press {unknown[0]}: {', '.join(PRESSES)}")
    return [
        Case(press=name, kv_budget=budget)
        for name in presses
        for budget in ((None,) if PRESSES[name] is None else budgets)
    ]


def ratio(tokens: int, kept: int) -> float:
    """Return the compression ratio at which kvpress, which rounds down, keeps just `kept` of `tokens`."""
    return 1 - (kept + 0.5) / tokens


def until(text: str, stop: Sequence[str]) -> str:
    """Return what stands before the first of the texts that end an answer."""
    return min((text.partition(end)[0] for end in stop), key=len, default=text)


def check_tokens(lines: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
    """Exit unless the model's folder makes the same tokens of the first question as trimkv did."""
    line = lines[0]
    text = line.get("prompt")
    if text is None:
        text = tokenizer.apply_chat_template(
            line["messages"], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    made = tokenizer.encode(text, add_special_tokens="prompt" in line)
    if list(made) != line["prompt_token_ids"]:
        sys.exit(f"error: {line['id']} has other token ids in this folder: the questions were exported for another one")


def answer(pipe: Any, group: Sequence[Question], case: Case) -> Iterator[dict[str, Any]]:
    """Press a document once, and yield a line for each question about it."""
    import kvpress
    import torch
    from transformers import DynamicCache

    tokens, start = len(group[0].document), time.perf_counter()
    kept, name = case.kept(tokens), PRESSES[case.press]
    cache = DynamicCache()
    press = nullcontext()
    if name is not None and kept < tokens:
        press = getattr(kvpress, name)(compression_ratio=ratio(tokens, kept))(pipe.model)
    with press:
        pipe.model.model(input_ids=torch.tensor([group[0].document]), past_key_values=cache)
    held = {layer.keys.shape[2] for layer in cache.layers}
    if held != {kept}:
        sys.exit(f"error: {case.policy} keeps {sorted(held)} tokens instead of {kept}")
    read_s = time.perf_counter() - start
    for question in group:
        start = time.perf_counter()
        said = pipe.generate_answer(
            question_ids=torch.tensor([question.asked]),
            cache=copy.deepcopy(cache),
            context_length=tokens,
            max_new_tokens=question.max_tokens,
        )
        yield {
            "id": question.id,
            "output": until(said, question.stop),
            "policy": case.policy,
            "kv_budget": case.kv_budget,
            "document_tokens": tokens,
            "kept_tokens": kept,
            "question_tokens": len(question.asked),
            "read_s": round(read_s, 3),  # of the document, for all that is asked about it
            "answer_s": round(time.perf_counter() - start, 3),
        }


def surroundings(questions: Sequence[Question], *, model: str, dtype: str) -> dict[str, str]:
    """Return what all lines of a file have in common: versions, model, and a hash of the questions."""
    used = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    digest = hashlib.sha256(repr(questions).encode()).hexdigest()[:16]
    return {**used, "model": model, "dtype": dtype, "questions": digest}


def answered(out: Path, common: Mapping[str, str]) -> set[tuple[str, int | None, str]]:
    """Return what the file holds already; exits where it holds answers to other questions, or of another model."""
    lines = read_lines(out) if out.exists() else []
    for line in lines:
        for name, value in common.items():
            if line.get(name) != value:
                sys.exit(f"error: {out} has answers with {name} {line.get(name)}, not {value}: give another --out")
    return {(line["policy"], line["kv_budget"], line["id"]) for line in lines}


def run(pipe: Any, questions: Sequence[Question], cases: Sequence[Case], out: Path, common: Mapping[str, str]) -> None:
    """Append what is not in the file yet, as it comes."""
    done = answered(out, common)
    groups = by_document(questions)
    for case in cases:
        start, count = time.perf_counter(), 0
        with out.open("a", encoding="utf-8") as file:
            for group in groups:
                rest = [q for q in group if (case.policy, case.kv_budget, q.id) not in done]
                for line in answer(pipe, rest, case) if rest else ():
                    print(json.dumps({**line, **common}, ensure_ascii=False), file=file, flush=True)
                    count += 1
        if count:
            each = (time.perf_counter() - start) / count
            print(f"{case.policy} {case.kv_budget or ''}: {count} answers, {each:.2f} s each", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, metavar="EXPORTED.jsonl")
    parser.add_argument("--model", required=True, help="a folder, as transformers reads it")
    parser.add_argument("--presses", default=",".join(PRESSES))
    parser.add_argument("--budgets", default="128,256", help="tokens per KV head")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, required=True, metavar="ANSWERS.jsonl")
    asked = parser.parse_args()
    cases = make_cases(asked.presses.split(","), [int(budget) for budget in asked.budgets.split(",")])
    lines = read_lines(asked.questions)
    questions = read_questions(lines)

    import torch
    from kvpress import KVPressTextGenerationPipeline
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    check_tokens(lines, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype).eval()
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device=model.device)
    with torch.inference_mode():
        run(pipe, questions, cases, asked.out, surroundings(questions, model=asked.model, dtype=asked.dtype))


if __name__ == "__main__":
    main()
