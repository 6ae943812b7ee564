"""Mistakes in what a request may ask beyond sampling: biases, penalties, log probabilities, formats, copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

from helpers import tiny_tokenizers
from helpers.engines import Shape, adjusted, make_engine, run
from trimkv_cli.engine.sampler import Sampler
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import UsageError
from trimkv_cli.request import Request, SamplingParams

VOCAB = 301
PLAIN = SamplingParams(temperature=0.0)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_bias_is_that_of_transformers_and_leaves_other_rows_alone() -> None:
    """Catches a bias that leaks into a neighbour, or into the next request of its row."""
    bias = ((3, 2.5), (7, -100.0), (300, 40.0))
    sampler, logits = Sampler(3, VOCAB, "cpu"), random_logits(2)
    sampler.set_row(0, SamplingParams(), [])
    sampler.set_row(2, SamplingParams(logit_bias=bias), [])
    oracle = SequenceBiasLogitsProcessor({(i,): b for i, b in bias})
    biased, plain = adjusted(sampler, logits, [2, 0])[0]
    assert torch.equal(biased, oracle(torch.zeros(1, 0, dtype=torch.int64), logits[:1].clone())[0])
    assert torch.equal(plain, logits[1])
    sampler.set_row(2, SamplingParams(), [])
    assert torch.equal(adjusted(sampler, logits, [2, 0])[0], logits)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    """Plain Python is the oracle: transformers has no such processors."""
    params = SamplingParams(presence_penalty=0.7, frequency_penalty=0.4)
    sampler = Sampler(3, VOCAB, "cpu")
    sampler.set_row(1, params, [5, 5, 6])
    made: list[int] = []
    for step in range(40):
        logits = random_logits(1, step % 3)
        want = logits[0].clone()
        for token in set(made):
            want[token] -= 0.7 + 0.4 * made.count(token)
        if step == 20:
            sampler.move_row(1, 2)
        rows = [2 if step >= 20 else 1]
        scores, chosen = adjusted(sampler, logits, rows)
        assert torch.allclose(scores[0], want, atol=1e-5)
        made.append(int(chosen))
    assert len(set(made)) > 3


def test_log_probabilities_are_the_models_own() -> None:
    """Catches values taken after temperature, penalties or filters."""
    hot = SamplingParams(temperature=5.0, top_k=2, repetition_penalty=2.0, logprobs=3, seed=1)
    sampler, logits = Sampler(3, VOCAB, "cpu"), random_logits(3)
    for row, params in enumerate((hot, PLAIN, replace(PLAIN, logprobs=0))):
        sampler.set_row(row, params, [1])
    tokens = sampler(logits, [0, 1, 2])
    on_their_way = sampler.logprobs(logits, [0, 1, 2], tokens)
    assert on_their_way is not None
    said = on_their_way.read()
    want = logits.log_softmax(-1)
    assert sorted(said) == [0, 2]
    assert said[0].logprob == pytest.approx(float(want[0, tokens[0]]))
    assert [i for i, _ in said[0].top] == want[0].topk(3).indices.tolist()
    assert (said[2].logprob, said[2].top) == (pytest.approx(float(want[2].max())), ())


def test_several_answers_read_their_prompt_once_and_are_as_if_alone(
    tiny_model: Callable[..., Any],
) -> None:
    """Catches twins that share a seed, a wrong copy, and prompts read again."""
    prompt = tuple(range(3, 40))
    params = SamplingParams(max_tokens=6, temperature=1.0)
    requests = [
        Request(id=str(i), prompt_token_ids=prompt, params=replace(params, seed=i), same_prompt="a") for i in range(3)
    ]
    for shape in (Shape(rows=4, prefill_chunk=16), Shape(rows=2, prefill_chunk=16), Shape(deterministic=True)):
        engine = make_engine(tiny_model("qwen3"), shape)
        got = run(engine, requests)
        read = engine.stats.prefill_tokens
        assert read == len(prompt) * (1 if shape.rows > 2 else 2)
        alone = make_engine(tiny_model("qwen3"), replace(shape, rows=1))
        assert got == run(alone, [replace(request, same_prompt=None) for request in requests])
        assert len({tuple(tokens) for tokens in got.values()}) == 3


def test_prefixes_that_take_turns_are_read_once_each(tiny_model: Callable[..., Any]) -> None:
    """Catches a store of one prefix that two system prompts throw out again and again."""
    prefixes = [tuple(range(3, 43)), tuple(range(50, 90))]
    requests = [
        Request(
            id=str(i),
            prompt_token_ids=(*prefixes[i % 2], 100 + i),
            prefix_len=40,
            params=SamplingParams(max_tokens=1 + i % 3, temperature=0.0),
        )
        for i in range(16)
    ]
    engine = make_engine(tiny_model("qwen3"), Shape(rows=2, prefill_chunk=16))
    for request in requests:
        engine.add(request)
    got = run(engine, [])
    assert engine.stats.prefill_tokens == 2 * 40 + len(requests)
    alone = make_engine(tiny_model("qwen3"), Shape(rows=1, prefill_chunk=16))
    assert got == run(alone, requests)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
    "additionalProperties": False,
}


def grammar(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    made: str = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": "[ ]?"})
    return made


def test_an_answer_follows_its_schema_beside_rows_without_one(tiny_model: Callable[..., Any]) -> None:
    """Catches a mask on the wrong row, a matcher lost when rows move, and an end that is not seen."""
    text = Text(tiny_tokenizers.chatml())
    eos = text.tokenizer.eos_token_id
    model = tiny_model("qwen3", vocab_size=512)  # more ids than the tokenizer has
    engine = make_engine(model, Shape(rows=4, eos=frozenset({eos})), text=text)
    follows = SamplingParams(max_tokens=90, temperature=1.0, grammar=grammar(SCHEMA))
    free = SamplingParams(max_tokens=3, temperature=1.0, ignore_eos=True)
    requests = [
        Request(id=str(i), prompt_token_ids=(5, 6 + i), params=replace(follows if i % 2 else free, seed=i))
        for i in range(8)
    ]
    for request in requests:
        engine.check(request)
    output = run(engine, requests)
    for i in range(1, 8, 2):
        assert output[str(i)][-1] == eos
        answer = json.loads(text.tokenizer.decode(output[str(i)][:-1]))
        assert set(answer) == {"name", "big"}
        assert isinstance(answer["big"], bool)
        assert len(answer["name"]) <= 5


def test_a_format_that_cannot_be_followed_any_further_ends_its_request_alone(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an answer that is cut off and passed off as complete."""
    engine = make_engine(tiny_model("qwen3"), Shape(rows=2))
    monkeypatch.setattr(Sampler, "failure", lambda _, row: "too complex" if row == 1 else None)
    requests = [Request(id=str(i), prompt_token_ids=(5, 6), params=replace(PLAIN, max_tokens=3)) for i in range(2)]
    ends = {event.request_id: event for event in engine.generate(requests) if event.finish_reason is not None}
    assert (ends["0"].finish_reason, ends["0"].error) == ("length", None)
    assert (ends["1"].finish_reason, ends["1"].error, ends["1"].token_ids != ()) == ("error", "too complex", True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"grammar": grammar({"type": "objct"})}, "cannot be followed"),
        ({"grammar": grammar({"$ref": "#"})}, "no answer satisfies it"),
        ({"logit_bias": ((512, 1.0),)}, "outside the vocabulary"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_it_runs(
    tiny_model: Callable[..., Any], params: dict[str, Any], message: str
) -> None:
    text = Text(tiny_tokenizers.chatml())
    model = tiny_model("qwen3", vocab_size=512)
    engine = make_engine(model, Shape(eos=frozenset({text.tokenizer.eos_token_id})), text=text)
    with pytest.raises(UsageError, match=message) as caught:
        engine.check(Request(id="a", prompt_token_ids=(5,), params=SamplingParams(**params)))
    assert caught.value.param == ("response_format" if "grammar" in params else "logit_bias")


def test_a_model_without_tokenizer_or_end_follows_no_format(tiny_model: Callable[..., Any]) -> None:
    request = Request(id="a", prompt_token_ids=(5,), params=SamplingParams(grammar=grammar(SCHEMA)))
    with pytest.raises(UsageError, match="no token that ends"):
        make_engine(tiny_model("qwen3", vocab_size=512), Shape(), text=Text(tiny_tokenizers.chatml())).check(request)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        make_engine(tiny_model("qwen3"), Shape()).check(request)
