"""Mistakes in feeding an engine, and in what its events become."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.fake_engine import RECORDER, FakeEngine, FakeText, by_id, run
from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.job import Job, run_job
from trimkv_cli.jobs.lines import BadLine, Item, Rules
from trimkv_cli.jobs.reading import LineReader
from trimkv_cli.jobs.records import Recorder, encode
from trimkv_cli.jobs.selection import parse_lines
from trimkv_cli.jobs.writing import Order, Writer
from trimkv_cli.request import Request, SamplingParams


def test_special_tokens_of_a_prompt_are_tokens_or_warned_about() -> None:
    """Catches a prompt rendered elsewhere that is read as letters without a word, and messages that become tokens."""
    messages = [{"role": "user", "content": "<s>"}]
    lines = [
        {"prompt": "<s>a"},
        {"prompt": "<s>a", "special_tokens": True},
        {"prompt": "plain"},
        {"messages": messages},
    ]
    records, summary = run([*lines, {"messages": messages, "special_tokens": True}])
    bodies = [record["response"]["body"] for record in by_id(records)]
    assert [body["usage"]["prompt_tokens"] for body in bodies[:4]] == [4, 1, 5, 4]
    said = [[warning["code"] for warning in body["trimkv"]["warnings"]] for body in bodies[:4]]
    assert said == [["special_tokens_as_text"], [], [], []]
    assert sum(summary.warnings.values()) == 1
    assert bodies[4]["error"]["param"] == "special_tokens"
    flagged, _ = run(["<s>a"], text=True, special_tokens=True)
    assert flagged[0]["response"]["body"]["usage"]["prompt_tokens"] == 1


def test_a_chat_answer_has_the_shape_of_an_openai_batch_result() -> None:
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3, "seed": 7}
    [record], _ = run([{"custom_id": "x", "url": "/v1/chat/completions", "body": body}])
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert record["id"].startswith("batch_req_")
    assert (record["custom_id"], record["error"], record["response"]["status_code"]) == ("x", None, 200)
    answer = record["response"]["body"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "mini")
    assert isinstance(answer["created"], int)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "\0ab", "refusal": None},
            "finish_reason": "length",
            "logprobs": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    timing = {"queue_s": 0.0, "ttft_s": 0.1, "total_s": 0.2}
    assert answer["trimkv"] == {
        "line": 1,
        "seed": 7,
        "kv_budget": 64,
        "prefill_chunk": 512,
        "cache": {"seen_tokens": 9, "kept_per_head": 4, "evicted": 5, "pinned_per_head": 0},
        "warnings": [],
        "timing": timing,
    }


def test_a_completion_answer_is_a_text_completion() -> None:
    line = {"custom_id": "x", "url": "/v1/completions", "body": {"prompt": "ab", "max_tokens": 2}}
    [record], _ = run([line])
    assert record["response"]["body"]["object"] == "text_completion"
    assert record["response"]["body"]["choices"] == [
        {"index": 0, "text": "ab", "finish_reason": "length", "logprobs": None}
    ]


def test_without_a_tokenizer_ids_work_and_words_are_refused() -> None:
    lines = [
        {"prompt_token_ids": [5, 6], "max_tokens": 3, "return_token_ids": True},
        {"prompt": "a"},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    records, summary = run(lines, engine=FakeEngine(), order="input")
    [choice] = records[0]["response"]["body"]["choices"]
    assert (choice["message"]["content"], choice["token_ids"]) == (None, [5, 6, 5])
    errors = [record["response"]["body"]["error"] for record in records[1:]]
    assert [(error["param"], error["code"]) for error in errors] == [
        ("prompt", "no_tokenizer"),
        ("messages", "no_tokenizer"),
    ]
    assert (summary.done, summary.bad, summary.failed) == (1, 2, 0)


def test_every_kind_of_bad_line_gets_one_record_and_stops_nobody() -> None:
    lines = [
        {"prompt": "a", "max_tokens": 1},
        "{",
        {"prompt": "x" * 101},
        {"prompt": "!x"},
        {"prompt_token_ids": [2**40]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"prompt": ""},
        {"prompt": "b", "max_tokens": 1},
    ]
    records, summary = run(lines, order="input")
    assert (summary.done, summary.bad, summary.failed, summary.lines) == (2, 5, 1, 8)
    assert [record["custom_id"] for record in records] == ["line-1", None, *(f"line-{n}" for n in range(3, 9))]
    _, unparsable, too_long, failed, no_token, no_template, empty, _ = records
    assert (unparsable["response"], unparsable["trimkv"]) == (None, {"line": 2})
    assert unparsable["error"]["code"] == "invalid_line"
    assert too_long["response"]["status_code"] == 400
    assert too_long["response"]["body"]["error"] == {
        "message": "101 tokens need more positions than there are",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "context_length_exceeded",
    }
    assert (too_long["error"], too_long["trimkv"]) == (None, {"line": 3})
    assert (failed["response"], failed["trimkv"]) == (None, {"line": 4})
    assert failed["error"] == {"code": "engine_error", "message": "the device went away"}
    assert no_token["response"]["body"]["error"]["param"] == "prompt_token_ids"
    assert no_template["response"]["body"]["error"]["message"] == "the template cannot end with the assistant"
    assert empty["response"]["body"]["error"]["message"] == "the prompt holds no tokens"


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_a_length_that_is_too_long_is_told_under_the_key_that_gave_it(key: str) -> None:
    """Catches "messages" as what is wrong with a line whose prompt is fine."""
    [record], _ = run([{"messages": [{"role": "user", "content": "a"}], key: 5000}])
    error = record["response"]["body"]["error"]
    assert (error["param"], error["code"]) == (key, "context_length_exceeded")


def test_results_come_as_they_are_done_or_in_the_order_of_the_input() -> None:
    lines = [{"prompt": "a", "max_tokens": n} for n in (9, 1, 5, 1)]
    came, _ = run(lines, engine=FakeEngine(text=FakeText(), starts_at=4))
    assert [record["custom_id"] for record in came] == ["line-2", "line-3", "line-4", "line-1"]
    sorted_, _ = run(lines, order="input")
    assert [record["custom_id"] for record in sorted_] == ["line-1", "line-2", "line-3", "line-4"]


def test_the_engine_is_kept_fed_but_never_holds_the_whole_input() -> None:
    engine = FakeEngine(max_rows=4, text=FakeText())
    records, _ = run(({"prompt": "a", "max_tokens": 1 + n % 7} for n in range(300)), engine=engine)
    assert len(records) == 300
    assert 4 < engine.most_queued <= 20


def test_an_input_that_waits_does_not_hold_results_back() -> None:
    written = threading.Event()

    class Stream(io.BytesIO):
        def write(self, data: Any) -> int:
            written.set()
            return super().write(data)

    def lines() -> Iterator[Item | BadLine]:
        yield from parse_lines(LineReader(io.BytesIO(b'{"prompt":"a","max_tokens":3}')), Rules())
        assert written.wait(10), "the first result has to be there before the input ends"

    summary = run_job(FakeEngine(text=FakeText()), Job(lines=lines(), sink=Writer(Stream()), recorder=RECORDER))
    assert summary.done == 1


def test_an_input_that_breaks_off_is_told_after_what_was_read_is_answered() -> None:
    def lines() -> Iterator[Item | BadLine]:
        yield from parse_lines(LineReader(io.BytesIO(b'{"prompt":"ab","max_tokens":3}\n' * 3)), Rules())
        raise UsageError("the archive is damaged")

    out = io.BytesIO()
    with pytest.raises(UsageError, match="damaged"):
        run_job(FakeEngine(text=FakeText()), Job(lines=lines(), sink=Writer(out), recorder=RECORDER))
    assert len(out.getvalue().splitlines()) == 3


@pytest.mark.parametrize("order", ["completion", "input"])
def test_a_reproducible_record_is_the_same_bytes_in_any_company(order: Order) -> None:
    """Ids, seeds and clocks must not tell of the other lines; only the line number may."""
    recorder = Recorder(model="mini", run_seed=3, kv_budget=64, prefill_chunk=512, reproducible=True)
    line = {"prompt": "ab", "id": "me", "max_tokens": 4}
    alone, _ = run([line], recorder=recorder)
    company, _ = run([line, *({"prompt": "x", "max_tokens": n + 1} for n in range(5))], recorder=recorder, order=order)
    [mine] = [record for record in company if record["custom_id"] == "me"]
    assert encode(mine) == encode(alone[0])
    assert mine["response"]["body"]["created"] == 0
    assert "timing" not in mine["response"]["body"]["trimkv"]


def test_what_was_passed_over_is_in_the_record_and_counted() -> None:
    records, summary = run([{"prompt": "a", "max_tokens": 1, "colour": 1} for _ in range(3)])
    assert summary.warnings == {"unknown key 'colour' ignored": 3}
    assert records[0]["response"]["body"]["trimkv"]["warnings"] == [
        {"code": "unknown_key", "message": "unknown key 'colour' ignored"}
    ]


def test_the_count_of_different_warnings_is_bounded() -> None:
    _, summary = run([{"prompt": "a", "max_tokens": 1, f"k{n}": 1} for n in range(150)])
    assert len(summary.warnings) == 101
    assert sum(summary.warnings.values()) == 150


def test_a_record_is_one_line_for_every_reader() -> None:
    data = encode({"text": "a\x7f\x85\x9b\u2028\n\té€"})
    assert data == b'{"text":"a\\u007f\\u0085\\u009b\\u2028\\n\\t\xc3\xa9\xe2\x82\xac"}\n'
    assert len(data.decode().splitlines()) == 1
    assert json.loads(data)["text"] == "a\x7f\x85\x9b\u2028\n\té€"


def test_a_run_seed_changes_ids_and_seeds() -> None:
    def seed_and_id(seed: int) -> tuple[int, str]:
        from trimkv_cli.request import SamplingParams

        recorder = Recorder(model="mini", run_seed=seed, kv_budget=64, prefill_chunk=512)
        line = {"prompt": "a", "max_tokens": 1}
        [record], _ = run([line], recorder=recorder, defaults=SamplingParams(seed=seed))
        return record["response"]["body"]["trimkv"]["seed"], record["id"]

    assert seed_and_id(1) == seed_and_id(1)
    assert seed_and_id(1)[0] != seed_and_id(2)[0]
    assert seed_and_id(1)[1] != seed_and_id(2)[1]


def test_a_length_that_nobody_gave_is_what_the_positions_leave() -> None:
    """Catches a line refused for 512 tokens that it never asked for, and one shortened that asked for its length."""
    defaults = SamplingParams(max_tokens=50)
    lines = [{"prompt": "x" * 30, "id": "default"}, {"prompt": "x" * 30, "id": "own", "max_tokens": 40}]
    engine = FakeEngine(text=FakeText(), max_positions=40)
    asked: dict[str, int] = {}
    add = engine.add

    def note(request: Request) -> None:
        asked[request.id] = request.params.max_tokens
        add(request)

    engine.add = note  # type: ignore[method-assign]
    _, summary = run(lines, engine=engine, defaults=defaults, max_tokens_said=False)
    assert asked == {"line-1": 11, "line-2": 40}
    assert summary.warnings == {"fewer positions are left than max_tokens is by default": 1}
