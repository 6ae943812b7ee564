"""Mistakes in going on past a model's positions: keys in other places than they say, positions past the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.cache.rebase import rotate
from trimkv_cli.engine.cpu import Decoder
from trimkv_cli.errors import ContextOverflow, DoesNotFit, UnsupportedModel, UsageError
from trimkv_cli.model.pins import Pins
from trimkv_cli.request import Request

TinyModel = Callable[..., Any]
LIMIT, SLOTS, SINKS, CHUNK = 64, 16, 4, 16
PROMPT = [3 + (7 * i) % 120 for i in range(150)]


def shape(**changes: Any) -> Shape:
    values = {"kv_budget": SLOTS, "rows": 1, "prefill_chunk": CHUNK, "gate": "streaming", "rebases": True}
    return Shape(**{**values, **changes})


class Oracle:
    """Sinks and recent tokens with the positions they have by the rule, in plain lists; for a model of one layer.

    There keys and values depend on the token alone, so that attention over what is kept can be had from the plain model
    with these tokens at these positions.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kept: list[tuple[int, int]] = []  # (token, position for the model)
        self.next = self.seen = 0

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> int:
        """Feed one chunk or one token; return the likeliest next."""
        if self.next + len(tokens) > LIMIT:
            self.kept = [(token, rank) for rank, (token, _) in enumerate(self.kept)]
            self.next = len(self.kept)
        self.kept += [(token, self.next + index) for index, token in enumerate(tokens)]
        self.next += len(tokens)
        ids, positions = zip(*self.kept, strict=True)
        logits = self.model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions])).logits
        if len(self.kept) > SLOTS:
            self.kept = self.kept[:SINKS] + self.kept[SINKS - SLOTS :]
        return int(logits[0, -1].argmax())

    def run(self, prompt: Sequence[int], count: int) -> list[int]:
        for start in range(0, len(prompt), CHUNK):
            token = self.feed(prompt[start : start + CHUNK])
        output = [token]
        while len(output) < count:
            output.append(self.feed([output[-1]]))
        return output


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3"])
def test_it_goes_on_as_attention_over_the_renumbered_tokens(family: str, tiny_model: TinyModel) -> None:
    """Catches keys that are rotated by another difference, ranks in another order, and positions counted wrong."""
    changes = {"num_hidden_layers": 1, "max_position_embeddings": LIMIT}
    engine = make_engine(tiny_model(family, **changes), shape())
    assert run(engine, [greedy("a", PROMPT, 120)])["a"] == Oracle(tiny_model(family, **changes)).run(PROMPT, 120)


def test_no_position_passes_the_end(tiny_model: TinyModel) -> None:
    """Catches a step that is fed past what the model was trained for."""
    model = tiny_model("qwen3", max_position_embeddings=LIMIT)
    fed: list[int] = []
    model.model.rotary_emb.register_forward_hook(lambda _, args, __: fed.append(int(args[1].max())))
    engine = make_engine(model, shape(rows=2, gate="random"))
    requests = [greedy(str(i), PROMPT[i:], 70 + i) for i in range(3)]
    outputs = run(engine, requests)
    assert {name: len(output) for name, output in outputs.items()} == {"0": 70, "1": 71, "2": 72}
    assert max(fed) < LIMIT


def test_within_the_positions_nothing_changes(tiny_model: TinyModel) -> None:
    """Catches a rebase that comes too early."""
    request = greedy("a", PROMPT[:40], 24)
    outputs = [run(make_engine(tiny_model("qwen3"), shape(gate="random", rebases=r)), [request]) for r in (False, True)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3"])
@pytest.mark.parametrize("pins", [Pins(), Pins(sinks=2, recent=3)])
def test_it_is_decoded_as_fast_as_without_before_and_after(
    family: str, pins: Pins, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an option that slows all down before anything overflows, and a fast way that stands elsewhere."""
    model = tiny_model(family, max_position_embeddings=LIMIT)
    engine = make_engine(model, shape(rows=3, gate="random"), pins=pins)
    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
    requests = [greedy(str(i), PROMPT[i : 40 + 9 * i], 50 + i) for i in range(4)]
    fast = run(engine, requests)
    assert len(steps) > 50
    engine.close()
    slow = make_engine(model, shape(rows=3, gate="random"), pins=pins, fast_path=False)
    assert run(slow, requests) == fast


def test_a_row_alone_is_as_among_others_and_can_be_put_back(tiny_model: TinyModel) -> None:
    """Catches offsets of another row, a shared prefix without its positions, and a saved row that loses them."""
    model = tiny_model("qwen3", max_position_embeddings=LIMIT)
    requests = [
        Request(id=str(i), prompt_token_ids=(*PROMPT[:90], 5 + i), prefix_len=90, params=greedy("", [1], 40).params)
        for i in range(4)
    ]
    engine = make_engine(model, shape(rows=3, gate="random"))
    together = run(engine, requests)
    engine.close()
    alone = make_engine(model, shape(rows=3, gate="random"))
    assert together == {request.id: run(alone, [request])[request.id] for request in requests}
    run(alone, [greedy("first", PROMPT, 30, keep=True)])
    state = alone.kept.save("first")
    ends = []
    for name in ("first", "again"):
        ends.append(run(alone, [greedy(f"{name}+", [9, 8, 7], 30, continues=name)])[f"{name}+"])
        alone.kept.restore(state, "again")
    assert ends[0] == ends[1]


def test_what_cannot_be_rebased_is_refused(tiny_model: TinyModel) -> None:
    """Catches sliding windows that see the wrong tokens, and a cache that leaves no position free."""
    with pytest.raises(UnsupportedModel, match="sliding windows"):
        make_engine(tiny_model("mistral"), shape())
    with pytest.raises(DoesNotFit, match="more than the 64 positions"):
        make_engine(tiny_model("qwen3", max_position_embeddings=LIMIT), shape(kv_budget=60))
    with pytest.raises(DoesNotFit, match="prefill-chunk 0"):
        make_engine(tiny_model("qwen3"), shape(prefill_chunk=0))
    with pytest.raises(ContextOverflow):
        run(
            make_engine(tiny_model("qwen3", max_position_embeddings=LIMIT), shape(rebases=False)),
            [greedy("a", PROMPT, 9)],
        )


def test_the_slots_stay_as_many_as_they_are(tiny_model: TinyModel) -> None:
    """Catches ranks of another size than the slots that they belong to."""
    engine = make_engine(tiny_model("qwen3"), shape())
    with pytest.raises(UsageError, match="as many as they are"):
        engine.resize(8)


def test_the_bytes_are_planned(tiny_model: TinyModel) -> None:
    """Catches four bytes a slot that no plan knows of."""
    engine = make_engine(tiny_model("qwen3"), shape(rows=3))
    parts = {part.name: part.bytes for part in engine.facts.plan.run.parts}
    assert parts["rebase"] == 4 * 3 * 2 * SLOTS * 4
    assert engine.kv_bytes == parts["kv"] + parts["shared_prefix"] + parts["rebase"]


def test_rotating_twice_is_rotating_once() -> None:
    """Catches a rotation in the other direction, and dimensions beyond the rotated ones that move."""
    inv_freq = 10000.0 ** -(torch.arange(4) / 4)
    key = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))
    by = torch.tensor([[3, -2, 7, 0, 1]]).expand(2, -1)
    assert torch.allclose(rotate(rotate(key, by, inv_freq), -by, inv_freq), key, atol=1e-6)
    assert torch.equal(rotate(key, by, inv_freq)[..., 8:], key[..., 8:])
    assert torch.equal(rotate(key, by * 0, inv_freq), key)
