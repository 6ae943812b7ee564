"""`summarize --save-cache` and `ask --cache` as a user would meet them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.programs import Run, trimkv
from trimkv_cli.commands.answers import answer
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

SIZES = ("--kv-budget", "40", "--threads", "1", "-n", "9", "--greedy")
QUESTION = "When is the meeting?"
TEXT = "The meeting is on Friday. " * 30


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    (folder / "text.txt").write_text(TEXT)
    done = trimkv("summarize", folder / "text.txt", "--save-cache", folder / "text.kv", *SIZES)
    assert done.returncode == 0, done.stderr
    return folder / "text.kv"


def live_answer(summary_tokens: int) -> str:
    """Summarize and ask in one process, by hand."""
    from trimkv_cli.commands.summarize.texts import SummaryStyle

    llm: Any = load_engine(EngineOptions(kv_budget="40", threads=1, max_inflight=1))
    params = SamplingParams(max_tokens=summary_tokens, temperature=0.0)
    prompt = llm.text.render_chat([{"role": "user", "content": f"{TEXT}\n\n{SummaryStyle().instruction()}"}])
    first = answer(llm, Request(id="1", prompt_token_ids=prompt.token_ids, params=params, keep=True))
    ids = llm.text.render_turn(QUESTION, last_token_id=first.token_ids[-1], eos_token_ids=llm.facts.eos_token_ids)
    return answer(llm, Request(id="2", prompt_token_ids=tuple(ids), params=params, continues="1")).text


@pytest.mark.slow
def test_a_saved_read_answers_as_the_live_session(here: Run, saved: Path) -> None:
    """Catches a file that lacks part of the state, a text read again, and a file changed by asking."""
    before = saved.read_bytes()
    records = [json.loads(run("ask", "--cache", saved, QUESTION, "--json", *SIZES).stdout) for run in (trimkv, here)]
    texts = [record["choices"][0]["message"]["content"] for record in records]
    assert texts == [live_answer(9)] * 2
    assert records[0]["usage"]["prompt_tokens"] < 40 < records[0]["trimkv"]["cache"]["seen_tokens"]
    assert saved.read_bytes() == before


def test_what_does_not_fit_is_refused_with_the_reason(here: Run, saved: Path, tmp_path: Path) -> None:
    """Catches answers from a cache that other sizes or gates made, tracebacks, and flags that are ignored."""
    other = here("ask", "--cache", saved, QUESTION, "--kv-budget", "64", "--gates", "streaming")
    assert other.returncode == 6
    assert b"other gates" in other.stderr
    assert b"another --kv-budget (40, here 64)" in other.stderr
    assert other.stdout == b""
    (tmp_path / "broken.kv").write_bytes(saved.read_bytes()[:100])
    for arguments in (
        ("--cache", tmp_path / "broken.kv"),
        ("--cache", saved, "--system", "x"),
        ("--cache", saved, "--raw"),
    ):
        done = here("ask", *arguments, QUESTION, *SIZES)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count(b"error:") == 1
    for wrong in (("a", "b", "--save-cache", "x.kv"), (saved, "--save-cache", tmp_path / "none" / "x.kv")):
        assert here("summarize", *wrong).returncode == 2


def test_what_a_saved_read_holds_can_be_looked_at(
    saved: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Catches scores made up for tokens that are gone, a read that is run again, and a page that does not draw."""
    from trimkv_cli.app import _exit_code

    sizes = ("--kv-budget", "40", "--threads", "1")
    assert _exit_code(["inspect", "--cache", str(saved), "--json", "-q", *sizes]) == 0
    record = json.loads(capfdbinary.readouterr().out)
    for kept_heads, heads in zip(record["kept"], record["log_beta"], strict=True):
        for kept, values in zip(kept_heads, heads, strict=True):
            assert [position for position, value in enumerate(values) if value is not None] == kept
            assert len(values) == record["seen"]
    page = tmp_path / "page.html"
    assert _exit_code(["inspect", "--cache", str(saved), "--html", str(page), "-q", *sizes]) == 0
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    assert _exit_code(["inspect", "--cache", str(saved), "a prompt", *sizes]) == 2
