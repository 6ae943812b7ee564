"""Mistakes in budgets of reasoning: plain Python, and the model itself fed what should have come, are the oracles."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import tiny_tokenizers
from helpers.engines import Shape, make_engine, run
from trimkv_cli.commands.run.work import check_template
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.sampler import Sampler
from trimkv_cli.engine.text import Text
from trimkv_cli.engine.thoughts import ThinkTags, Thought
from trimkv_cli.errors import UsageError
from trimkv_cli.events import RequestStats
from trimkv_cli.request import Request, SamplingParams

TinyModel = Callable[..., Any]
TEXT = Text(tiny_tokenizers.chatml(), name="tiny")
TAGS = TEXT.think_tags
assert TAGS is not None
OPEN, CLOSE = TAGS.ids or (0, 0)
VOCAB = len(TEXT.tokenizer)
GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
OPENED = tuple(TEXT._encode("<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n<think>\n"))


def make(tiny_model: TinyModel, *, ahead: bool = False, rows: int = 4) -> Engine:
    model = tiny_model("qwen3", vocab_size=VOCAB)
    engine = make_engine(model, Shape(kv_budget=96, rows=rows, gate="none"), text=TEXT, fast_path=not ahead)
    if ahead:
        engine._runner.run_ahead(frozenset())
    return engine


def ask(name: str, params: SamplingParams, prompt: tuple[int, ...] = OPENED) -> Request:
    return Request(id=name, prompt_token_ids=prompt, params=params)


def test_the_tags_are_those_of_tokenizer_and_template() -> None:
    """Catches a tag in pieces, and another gap behind it than the template leaves."""
    assert TEXT.token_text(CLOSE) == "</think>"
    assert TEXT.tokenizer.decode(list(TAGS.closing)) == "</think>\n\n"
    assert TEXT.tokenizer.decode(list(TAGS.closing_line)) == "\n</think>\n\n"
    assert TAGS.closing.count(CLOSE) == TAGS.closing_line.count(CLOSE) == 1
    for other in (tiny_tokenizers.llama3(), tiny_tokenizers.gemma()):
        text = Text(other, name="other")
        assert text.think_tags is None
        with pytest.raises(UsageError, match="other knows no <think>") as raised:
            text.check_thinking()
        assert raised.value.param == "reasoning_budget"
        assert raised.value.hint
        with pytest.raises(UsageError, match="other knows no <think>"):  # before a job's weights are read
            check_template(io.BytesIO(b'{"prompt": "a"}'), text, thinks=True)
    with pytest.raises(UsageError, match="knows no <think>"):
        Sampler(1, 9, "cpu").check(SamplingParams(think_budget=1))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_spent_budget_ends_the_thought_and_the_answer_goes_on(tiny_model: TinyModel, ahead: bool) -> None:
    """Catches a forced token that is not fed, one too early or late, and a neighbour that feels any of it."""
    budgets = (0, 1, 5, 29)
    plain = make(tiny_model)
    (free,) = run(plain, [ask("free", GREEDY)]).values()
    assert CLOSE not in free
    sampled = replace(GREEDY, temperature=1.5, seed=3)
    (alone,) = run(plain, [ask("alone", sampled)]).values()
    plain.close()
    requests = [ask(str(n), replace(GREEDY, think_budget=n)) for n in budgets]
    requests += [ask("sampled", sampled), ask("much", replace(GREEDY, think_budget=30))]
    found = run(make(tiny_model, ahead=ahead), requests)
    assert found["sampled"] == alone
    assert found["much"] == free
    plain = make(tiny_model)
    for n in budgets:
        on_a_line = TEXT.tokenizer.decode(free[:n]).endswith("\n")
        begun = [*free[:n], *(TAGS.closing if on_a_line else TAGS.closing_line)]
        left = 30 - len(begun)
        if left > 0:
            rest = ask("rest", replace(GREEDY, max_tokens=left), (*OPENED, *begun))
            (said,) = run(plain, [rest]).values()
            begun += said
        assert found[str(n)] == begun[:30], n


def test_a_tag_of_the_models_own_counts_as_well(tiny_model: TinyModel) -> None:
    """Catches a budget that only a template's tag starts, tags among the counted tokens, and tags counted later on."""
    always = replace(GREEDY, logit_bias=((OPEN, 100.0),), max_tokens=12)  # it writes <think> again and again
    plain = OPENED[:-2]
    assert plain[-1] != OPEN
    assert OPEN in OPENED[-2:]
    engine = make(tiny_model)
    stats: dict[str, RequestStats] = {}
    tokens: dict[str, list[int]] = {}
    requests = [ask("own", replace(always, think_budget=3), plain), ask("free", always, plain)]
    requests += [ask("none", GREEDY, plain)]
    for event in engine.generate(requests):
        tokens.setdefault(event.request_id, []).extend(event.token_ids)
        if event.stats is not None:
            stats[event.request_id] = event.stats
    closed = list(TAGS.closing_line)
    assert tokens["own"] == [*[OPEN] * 4, *closed, *[OPEN] * (8 - len(closed))]
    assert {name: each.reasoning_tokens for name, each in stats.items()} == {"own": 3, "free": 11, "none": 0}
    assert stats["own"].details(stats["free"]) == {"completion_tokens_details": {"reasoning_tokens": 14}}


def test_a_row_taken_up_again_stands_where_it_stood() -> None:
    """Catches a budget that begins anew with an undone step, a moved row or another request in the row."""
    sampler = Sampler(3, VOCAB, "cpu", tags=TAGS)
    params = replace(GREEDY, think_budget=4)
    logits = torch.zeros(1, VOCAB)
    logits[0, 9] = 1.0
    want = [9] * 4 + list(TAGS.closing_line) + [9] * 3
    sampler.set_row(0, params, OPENED)
    row, made = 0, []
    for step in range(len(want)):
        if step % 3 == 1:  # as after a step that was taken back
            sampler.set_row(row, params, OPENED)
            sampler.replay(row, made)
        state = sampler.row_state(row)
        assert sampler.must_be_told(row) == (step < 4 + len(TAGS.closing_line))
        sampler(logits, [row])
        sampler.restore_row(row, state)
        sampler.move_row(row, 1 - row)
        row = 1 - row
        made.append(int(sampler(logits, [row])))
        sampler.advance(row, made[-1])
    assert made == want
    sampler.set_row(row, GREEDY, OPENED)
    assert not sampler.must_be_told(row)


def test_a_thought_is_followed_through_any_pieces() -> None:
    """Catches a tag that is missed where tokens cut it, and tokens of the tags among those of the thought."""
    pieces = ["<", "think", ">", "<think>", "</", "th", "ink>", "</think>", "a", "b\n", "\n", "<th", ">x"]
    tags = ThinkTags(token_text=pieces.__getitem__, ids=None, ends=(), closing=(7,), closing_line=(10, 7))
    draw = random.Random(4)
    ended = 0
    for _ in range(3000):
        ids = [draw.choice((3, 0, 11)), *draw.choices(range(13), k=draw.randint(2, 14))]
        thought = tags.follow(())
        for place, token in enumerate(ids, 1):
            thought.push(token)
            assert (thought.over, thought.tokens) == by_hand([pieces[each] for each in ids[:place]])
        ended += thought.over and thought.tokens > 0
    assert ended > 50
    assert tags.follow([8, 0, 1, 2, 10]).push(8) is None
    inside: Thought = tags.follow([8, 0, 1, 2, 10], budget=0)
    assert inside.forced == 10


def by_hand(pieces: list[str]) -> tuple[bool, int]:
    """Return whether the reasoning is over, and how many tokens lie in it, from the whole text."""
    text = "".join(pieces).lstrip()
    if not text.startswith("<think>"):
        return not "<think>".startswith(text), 0
    ends, length = [], -(len("".join(pieces)) - len(text))
    for piece in pieces:
        length += len(piece)
        ends.append(length)
    opened = next(i for i, end in enumerate(ends) if end >= len("<think>"))
    close = text.find("</think>", len("<think>"))
    if close < 0:
        return False, len(pieces) - opened - 1
    first = next(i for i, end in enumerate(ends) if end > close)
    last = next(i for i, end in enumerate(ends) if end >= close + len("</think>"))
    if len(pieces) - 1 < last:
        raise AssertionError
    return True, max(0, first - opened - 1)
